"""Data sets of images with targets, and their batches, which are the same for any number of workers."""

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

UNIFORMS_PER_IMAGE = 6  # at least as many as a transform uses; the draws depend on it
# (image, target, uniforms [UNIFORMS_PER_IMAGE]) -> an item of the batch
Transform = Callable[[np.ndarray, Any, np.ndarray], Any]
Collate = Callable[[list[Any]], Any]


class DenseBatches:
    """Batches of images and targets; ``rows``: those of this rank.

    An image's item is a function of (seed, epoch, image) alone; ``collate`` makes nested tuples and lists of tensors.
    Images that cannot be decoded are replaced by the next one.
    """

    def __init__(
        self, samples: DenseDataset, sampler: Sampler, transform: Transform, collate: Collate, seed: int
    ) -> None:
        self.samples, self.sampler, self.rows = samples, sampler, slice(None)
        self._transform, self._collate, self._seed = transform, collate, seed

    def build_batch(self, step: int) -> tuple[Any, list[tuple[int, str]]]:
        """Build the batch of ``step``; also return the images that were skipped."""
        indices = self.sampler.get_batch_indices(step)[self.rows]
        uniforms = draw_uniform(
            self._seed, Stream.GEOMETRY, self.sampler.get_epoch(step), indices, n=UNIFORMS_PER_IMAGE
        )
        items, all_skipped = [], []
        for index, uniform in zip(indices.tolist(), uniforms, strict=True):
            image, used, skipped = load_or_next(self.samples, index)
            all_skipped += skipped
            items.append(self._transform(image, self.samples.load_target(used), uniform))
        return self._collate(items), all_skipped


class DenseLoader:
    """The loop's batches, on ``device``: of each batch the rows of this rank."""

    def __init__(self, batches: DenseBatches, device: torch.device, world: World, workers: int, bad: BadImages) -> None:
        self.data_wait_seconds = 0.0
        batches.rows = slice(*world.get_local_rows(batches.sampler.batch_size))
        self._batches, self._device, self._workers, self._bad = batches, device, workers, bad

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
            self._bad.add(self._batches.samples.get_name(index), reason)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with all its tensors on ``device``."""
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
    """Images with targets; ``classes`` names the indices in them. Cheap to fork; safe to read from many threads."""

    source: ImageDataset
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def get_name(self, index: int) -> str:
        return self.source.get_name(index)

    def load(self, index: int) -> np.ndarray:
        """Load the image, uint8 ``[H, W, 3]``. Raises BadImageError."""
        return self.source.load(index)

    @abstractmethod
    def load_target(self, index: int) -> Any:
        """Load the target of the image: a mask, or boxes. Raises DataError."""

    @abstractmethod
    def compute_fingerprint(self) -> str:
        """Return the SHA-256 (hex) over the names and sizes of images and targets."""


class CachedDenseDataset(DenseDataset):
    """``samples``, decoded once and cached in memory, which forked workers share."""

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
