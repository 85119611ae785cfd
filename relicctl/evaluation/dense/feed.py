"""From samples to batches of prepared images with their targets; whatever the number of workers, the same."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from relicctl.core.counted import Stream, draw_uniform
from relicctl.core.distributed import World
from relicctl.data.bad_images import BadImages, UndecodableError, load_or_next
from relicctl.data.sampler import Sampler
from relicctl.data.workers import run_workers
from relicctl.errors import RelicError
from relicctl.evaluation.dense.samples import DenseDataset

UNIFORMS_PER_IMAGE = 6  # uniform numbers for each image: more than any way of preparing needs

Transform = Callable[[np.ndarray, Any, np.ndarray], Any]  # image, target, uniforms [DRAWS] -> an item of the batch
Collate = Callable[[list[Any]], Any]


class DenseLoader:
    """The loop's batches, this process's rows of each. An item is a function of (seed, epoch, its sample) alone.

    ``collate`` makes nested tuples and lists of tensors, which are sent to the device. Images that cannot be decoded
    are replaced by the next one.
    """

    def __init__(
        self,
        samples: DenseDataset,
        sampler: Sampler,
        transform: Transform,
        collate: Collate,
        *,
        seed: int,
        device: torch.device,
        world: World,
        workers: int,
        bad: BadImages,
    ) -> None:
        self.data_wait_seconds = 0.0
        self._batches = _DenseBatches(
            samples, sampler, transform, collate, seed, world.get_local_rows(sampler.batch_size)
        )
        self._key, self._device, self._workers, self._bad = samples.get_name, device, workers, bad

    def iter_from_step(self, step: int, stop: int) -> Iterator[Any]:
        """The batches of steps ``step`` to ``stop - 1``."""
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=range(step, stop),
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_init_dense_worker,
            prefetch_factor=2 if self._workers else None,
        )
        with run_workers(loader) as items:
            for _ in range(step, stop):
                wait_start = time.perf_counter()
                item = next(items)
                self.data_wait_seconds += time.perf_counter() - wait_start
                if isinstance(item, UndecodableError):
                    self._record_skipped(item.skipped)
                if isinstance(item, RelicError):
                    raise item
                batch, skipped = item
                self._record_skipped(skipped)
                yield to_device(batch, self._device)

    def _record_skipped(self, skipped: list[tuple[int, str]]) -> None:
        for index, reason in skipped:
            self._bad.add(self._key(index), reason)


class _DenseBatches(Dataset):
    """Item k: the batch of step k, and what was passed over."""

    def __init__(
        self,
        samples: DenseDataset,
        sampler: Sampler,
        transform: Transform,
        collate: Collate,
        seed: int,
        rows: tuple[int, int],
    ) -> None:
        self._samples, self._sampler, self._seed, self._rows = samples, sampler, seed, slice(*rows)
        self._transform, self._collate = transform, collate

    def __getitem__(self, step: int) -> tuple[Any, list[tuple[int, str]]] | RelicError:
        try:
            return self._build_batch(step)
        except RelicError as error:
            return error  # raised in the training process: torch would wrap it up, with a traceback, on the way

    def _build_batch(self, step: int) -> tuple[Any, list[tuple[int, str]]]:
        indices = self._sampler.get_batch_indices(step)[self._rows]
        uniforms = draw_uniform(
            self._seed, Stream.GEOMETRY, self._sampler.get_epoch(step), indices, n=UNIFORMS_PER_IMAGE
        )
        items, passed = [], []
        for index, uniform in zip(indices.tolist(), uniforms, strict=True):
            image, used, skipped = load_or_next(self._samples, index)
            passed += skipped
            items.append(self._transform(image, self._samples.load_target(used), uniform))
        return self._collate(items), passed


def to_device(batch: Any, device: torch.device) -> Any:
    """``batch`` with all its tensors on ``device``."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(part, device) for name, part in batch.items()}
    return type(batch)(to_device(part, device) for part in batch)


def _init_dense_worker(_: int) -> None:
    """Signals are the training process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
