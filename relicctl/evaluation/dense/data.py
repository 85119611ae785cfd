"""From samples to batches of prepared images with their targets; whatever the number of workers, the same."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch

from relicctl.core.counter_rng import Stream, draw_uniform
from relicctl.core.distributed import World
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImageError, BadImages, UndecodableError, load_or_next
from relicctl.data.sampler import Sampler
from relicctl.data.workers import load_in_workers
from relicctl.errors import DataError

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
        load, steps, on_gpu = self._batches.build_batch, range(step, stop), self._device.type == "cuda"
        with load_in_workers(load, steps, self._workers, pin_memory=on_gpu) as items:
            for _ in steps:
                wait_start = time.perf_counter()
                try:
                    batch, skipped = next(items)
                except UndecodableError as error:
                    self._record_skipped(error.skipped)
                    raise
                self.data_wait_seconds += time.perf_counter() - wait_start
                self._record_skipped(skipped)
                yield to_device(batch, self._device)

    def _record_skipped(self, skipped: list[tuple[int, str]]) -> None:
        for index, reason in skipped:
            self._bad.add(self._key(index), reason)


class _DenseBatches:
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

    def build_batch(self, step: int) -> tuple[Any, list[tuple[int, str]]]:
        """Build the batch of ``step``; also return the images that were skipped."""
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


SplitName = Literal["train", "val"]
SPLIT_FOLDERS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "trainval"),
    "val": ("val", "valid", "validation"),
}


class DenseDataset(ABC):
    """``classes``: names of what ``target``'s numbers mean. Cheap to fork; safe to read from many threads."""

    source: ImageDataset
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def get_name(self, index: int) -> str:
        return self.source.get_name(index)

    def load(self, index: int) -> np.ndarray:
        """The image, uint8 ``[H, W, 3]``. Raises BadImage."""
        return self.source.load(index)

    @abstractmethod
    def load_target(self, index: int) -> Any:
        """What is known of an image that ``load`` gives. Raises DataError."""

    @abstractmethod
    def compute_fingerprint(self) -> str:
        """SHA-256 (hex) over the samples' names and sizes, and those of what is known of them."""


class CachedDenseDataset(DenseDataset):
    """``samples``, decoded once and kept in memory, which forked workers share."""

    def __init__(self, samples: DenseDataset) -> None:
        self.source, self.classes, self._samples = samples.source, samples.classes, samples

        def load_sample(index: int) -> tuple[np.ndarray | BadImageError, Any]:
            try:
                return samples.load(index), samples.load_target(index)
            except BadImageError as bad:
                return bad, None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self._cached = list(pool.map(load_sample, range(len(samples))))

    def load(self, index: int) -> np.ndarray:
        image = self._cached[index][0]
        if isinstance(image, BadImageError):
            raise image
        return image

    def load_target(self, index: int) -> Any:
        return self._cached[index][1]

    def compute_fingerprint(self) -> str:
        return self._samples.compute_fingerprint()


def make_missing_split_error(name: str, spec: str, part: SplitName, layouts: str) -> DataError:
    return DataError(f"{name} has no {part} split in {spec}.", f"Give {layouts}.")
