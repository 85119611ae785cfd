"""Data workers: processes that compute items in order, and end with the work that uses them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset, get_worker_info

from relicctl.console import Console
from relicctl.errors import RelicError, RunFailed

Unit = TypeVar("Unit")
Item = TypeVar("Item")


WORKER_TIMEOUT = 600.0  # seconds without an item after which workers count as stuck; one item takes seconds


@contextmanager
def load_in_workers(
    load: Callable[[Unit], Item], units: Iterable[Unit], workers: int, *, prefetch: int = 2, pin_memory: bool = False
) -> Iterator[Iterator[Item]]:
    """Give ``load(unit)`` of all ``units`` in their order, computed by ``workers`` processes (0: by this one).

    ``prefetch``: items that each worker computes ahead. A RelicError of ``load`` is raised here as it is, and
    RunFailed if nothing arrives for WORKER_TIMEOUT. The workers are shut down at the end of the block.
    """
    loader = DataLoader(
        _UnitDataset(load),
        batch_size=None,
        sampler=units,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=init_worker,
        prefetch_factor=prefetch if workers else None,
        timeout=WORKER_TIMEOUT if workers else 0,
    )
    with run_workers(loader) as items:
        yield _receive_items(items)


@contextmanager
def run_workers(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """Give the items of ``loader``, and shut its workers down at the end of the block.

    Otherwise they are shut down when their iterator is collected. An exception may hold that until the process ends,
    which then waits for the workers for ever: they ignore signals.
    """
    items = iter(loader)
    try:
        yield items
    except BaseException:
        _kill_workers(items)  # one that is stuck would be waited for
        raise
    finally:
        # torch raises when it hears that a worker died: here too, where the work is done or has failed already.
        try:
            getattr(items, "_shutdown_workers", lambda: None)()  # torch has no public name for it
        except RuntimeError:
            _kill_workers(items)  # the shutdown may not have reached them


def _kill_workers(items: Any) -> None:
    """Kill the workers of a DataLoader's iterator, after which torch no longer watches them."""
    if getattr(items, "_worker_pids_set", False):
        _remove_worker_pids(id(items))
        items._worker_pids_set = False
    for worker in getattr(items, "_workers", ()):
        worker.kill()
        worker.join()


def init_worker(_: int) -> None:
    """Set up a worker: the main process alone answers signals, and workers by cores need no threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    threadpool_limits(1)  # of BLAS too


class _UnitDataset(Dataset[Any], Generic[Unit, Item]):
    """Item ``unit`` is ``load(unit)``; in a worker process its tensors are in shared memory."""

    def __init__(self, load: Callable[[Unit], Item]) -> None:
        self._load = load

    def __getitem__(self, unit: Unit) -> Any:
        try:
            item: Item | RelicError = self._load(unit)
        except RelicError as error:
            item = error  # raised in the main process: on its way torch would wrap it up, with a traceback
        return item if get_worker_info() is None else _share_tensors(item)


def _share_tensors(item: Any) -> Any:
    """Move an item's tensors to shared memory while a lack of it is still an error: in torch's queue it is a hang.

    A container's /dev/shm may hold 64 MB. What finds no room goes through the pipe by value, which is slower.
    """
    try:
        return _map_leaves(torch.Tensor.share_memory_, item, torch.Tensor)
    except RuntimeError:
        return _map_leaves(lambda tensor: _PipedTensor(tensor.numpy(), tensor.stride()), item, torch.Tensor)


@dataclass(frozen=True)
class _PipedTensor:
    values: np.ndarray
    stride: tuple[int, ...]

    def restore(self) -> torch.Tensor:
        values = torch.from_numpy(self.values)
        return torch.empty_strided(values.shape, self.stride, dtype=values.dtype).copy_(values)


def _map_leaves(function: Callable[[Any], Any], item: Any, kind: type) -> Any:
    """Apply ``function`` to everything of type ``kind`` in nested lists, tuples, dictionaries and dataclasses."""
    if isinstance(item, kind):
        return function(item)
    if isinstance(item, (list, tuple)):
        return type(item)(_map_leaves(function, part, kind) for part in item)
    if isinstance(item, dict):
        return {name: _map_leaves(function, part, kind) for name, part in item.items()}
    if is_dataclass(item) and not isinstance(item, type):
        parts = {part.name: _map_leaves(function, getattr(item, part.name), kind) for part in fields(item)}
        return replace(item, **parts)
    return item


def _receive_items(items: Iterator[Any]) -> Iterator[Any]:
    def restore(tensor: _PipedTensor) -> torch.Tensor:
        _warn_of_full_shared_memory()
        return tensor.restore()

    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            what = f"The data workers have delivered nothing for {WORKER_TIMEOUT:.0f} s."
            fix = "Check the storage that the images lie on, or set --workers 0; --resume continues a run."
            raise RunFailed(what, fix) from None
        if isinstance(item, RelicError):
            raise item
        yield _map_leaves(restore, item, _PipedTensor)


@cache
def _warn_of_full_shared_memory() -> None:
    """Warn, once per process."""
    Console().warn(
        "/dev/shm is full, so data workers send batches through pipes, which is slower; "
        "give the container more (docker run --shm-size=8g), or lower --workers"
    )
