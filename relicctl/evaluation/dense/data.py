"""Data sets of images with targets, and their batches, which are the same for any number of workers."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from relicctl.core.counter_rng import Stream, draw_uniform
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import (
    BadImageError,
    BadImages,
    SkippedImages,
    UndecodableError,
    decode_image,
    load_or_next,
    read_upright_size,
)
from relicctl.data.loader import LoaderConfig
from relicctl.data.sampler import Sampler
from relicctl.data.workers import load_in_workers
from relicctl.errors import DataError

UNIFORMS_PER_IMAGE = 6  # at least as many as a transform uses; the draws depend on it
# (image, target, uniforms [UNIFORMS_PER_IMAGE]) -> an item of the batch
Transform = Callable[[np.ndarray, Any, np.ndarray], Any]
Collate = Callable[[list[Any]], Any]


class DenseLoader:
    """The loop's batches of images and targets, on its device; of each batch the rows of this rank.

    An image's item is a function of (seed, epoch, image) alone; ``collate`` makes nested tuples and lists of tensors.
    Images that cannot be decoded are replaced by the next one and reported to ``bad``.
    """

    def __init__(
        self, samples: DenseDataset, sampler: Sampler, transform: Transform, collate: Collate, config: LoaderConfig,
        bad: BadImages,
    ) -> None:  # fmt: skip
        self.data_wait_seconds = 0.0
        self._rows = slice(*config.world.get_local_rows(sampler.batch_size))
        self._samples, self._sampler, self._bad = samples, sampler, bad
        self._transform, self._collate, self._config = transform, collate, config

    def iter_from_step(self, step: int, stop: int) -> Iterator[Any]:
        """The batches of steps ``step`` to ``stop - 1``."""
        steps, device = range(step, stop), self._config.device
        on_gpu = device.type == "cuda"
        # no method of this object: the callback for bad images does not fit into a pickle, which spawned workers need
        load = partial(
            _build_batch, self._samples, self._sampler, self._rows, self._transform, self._collate, self._config.seed
        )
        with load_in_workers(load, steps, self._config.workers, pin_memory=on_gpu) as items:
            for _ in steps:
                wait_start = time.perf_counter()
                try:
                    batch, skipped = next(items)
                except UndecodableError as error:
                    self._record_skipped(error.skipped)
                    raise
                self.data_wait_seconds += time.perf_counter() - wait_start
                self._record_skipped(skipped)
                yield to_device(batch, device)

    def _record_skipped(self, skipped: SkippedImages) -> None:
        for index, reason in skipped:
            self._bad.add(self._samples.source.get_name(index), reason)


def _build_batch(
    samples: DenseDataset, sampler: Sampler, rows: slice, transform: Transform, collate: Collate, seed: int, step: int
) -> tuple[Any, SkippedImages]:
    indices, epoch = sampler.get_batch_indices(step)[rows], sampler.get_epoch(step)
    uniforms = draw_uniform(seed, Stream.GEOMETRY, epoch, indices, n=UNIFORMS_PER_IMAGE)
    items, all_skipped = [], []
    for index, uniform in zip(indices.tolist(), uniforms, strict=True):
        image, used, skipped = load_or_next(samples, index)
        all_skipped += skipped
        items.append(transform(image, samples.load_target(used), uniform))
    return collate(items), all_skipped


def to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with all its tensors on ``device``."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(part, device) for name, part in batch.items()}
    return type(batch)(to_device(part, device) for part in batch)


class DenseDataset(ABC):
    """Images with targets; ``classes`` names the indices in them. Cheap to fork; safe to read from many threads."""

    source: ImageDataset
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> np.ndarray:
        """Load the image, uint8 ``[H, W, 3]``. Raises BadImageError."""
        return self.source.load(index)

    @abstractmethod
    def load_target(self, index: int) -> Any:
        """Load the target of the image: a mask, or boxes. Raises DataError."""

    def compute_fingerprint(self) -> str:
        """Return the SHA-256 (hex) over the names and sizes of images and targets."""
        return self.source.compute_fingerprint()


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


def read_image_size(source: ImageDataset, row: int) -> tuple[int, int] | None:
    """Return height and width of an image from its header; None if that cannot be read."""
    try:
        data = source.read(row)
        if isinstance(data, bytes):
            return decode_image(data, read_upright_size, max_pixels=source.decode.max_pixels)
        return data.shape[0], data.shape[1]
    except DataError:
        raise
    except Exception:  # on damaged files Pillow's plugins raise almost anything; training skips and lists them
        return None


def iter_decodable(samples: DenseDataset, rows: Iterable[int], bad: dict[int, str]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the rows of images that can be decoded, and their pixels; add the others to ``bad``."""
    for row in rows:
        try:
            yield row, samples.load(row)
        except BadImageError as error:
            bad[row] = error.reason
