"""Data workers: processes that compute items in order, and end with the work that uses them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, Dataset

from relicctl.errors import RelicError

Unit = TypeVar("Unit")
Item = TypeVar("Item")


@contextmanager
def load_in_workers(
    load: Callable[[Unit], Item], units: Iterable[Unit], workers: int, *, prefetch: int = 2, pin_memory: bool = False
) -> Iterator[Iterator[Item]]:
    """Give ``load(unit)`` of all ``units`` in their order, computed by ``workers`` processes (0: by this one).

    ``prefetch``: items that each worker computes ahead. A RelicError of ``load`` is raised here as it is. The workers
    are shut down at the end of the block.
    """
    loader = DataLoader(
        _UnitDataset(load),
        batch_size=None,
        sampler=units,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=init_worker,
        prefetch_factor=prefetch if workers else None,
    )
    with run_workers(loader) as items:
        yield map(_raise_relic_error, items)


@contextmanager
def run_workers(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """Give the items of ``loader``, and shut its workers down at the end of the block.

    Otherwise they are shut down when their iterator is collected. An exception may hold that until the process ends,
    which then waits for the workers for ever: they ignore signals.
    """
    items = iter(loader)
    try:
        yield items
    finally:
        # torch raises when it hears that a worker died: here too, where the work is done or has failed already.
        try:
            getattr(items, "_shutdown_workers", lambda: None)()  # torch has no public name for it
        except RuntimeError:
            for worker in getattr(items, "_workers", ()):
                worker.kill()  # the shutdown may not have reached it
                worker.join()


def init_worker(_: int) -> None:
    """Set up a worker: the main process alone answers signals, and workers by cores need no threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    threadpool_limits(1)  # of BLAS too


class _UnitDataset(Dataset[Any], Generic[Unit, Item]):
    """Item ``unit`` is ``load(unit)``."""

    def __init__(self, load: Callable[[Unit], Item]) -> None:
        self._load = load

    def __getitem__(self, unit: Unit) -> Item | RelicError:
        try:
            return self._load(unit)
        except RelicError as error:
            return error  # raised in the main process: on its way torch would wrap it up, with a traceback


def _raise_relic_error(item: Item | RelicError) -> Item:
    if isinstance(item, RelicError):
        raise item
    return item
