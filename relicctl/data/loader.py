"""From samples to batches of views: the host decodes and crops, the device does the rest.

Two roads lead to the same views. Images of one size that fit are decoded once, stay on the device and are cropped
there. All others are cropped on the host in uint8: decoded for every batch by worker processes, or kept decoded
in memory. Whatever the number of workers, a batch is a function of (seed, step) alone; the two roads differ by
the rounding of a resize.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from relicctl.core.distributed import World
from relicctl.core.hardware import GIB, get_free_host_memory
from relicctl.data.augment import apply_augmentations
from relicctl.data.background_removal import BackgroundRemoval, DeviceMasks
from relicctl.data.crops import crop_on_device
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImageError, BadImages, ImageSource, UndecodableError, load_or_next
from relicctl.data.photometric import draw_augment_params
from relicctl.data.sampler import Sampler
from relicctl.data.views import IMAGES_PER_DECODE, Batch, ViewSpec, _draw_view_boxes, crop_views
from relicctl.data.workers import _init_worker, run_workers
from relicctl.errors import RelicError, UsageError

ROWS_PER_CHUNK = 64  # a worker's unit of work: small enough to share a batch among workers


class ViewLoader:
    """Batches of views from any step on. ``waited`` counts the seconds spent waiting for the host's half.

    Images of several sizes cannot be kept on the device: then they are kept in memory, or with ``strict_cache``
    UsageError is raised.
    """

    def __init__(
        self,
        source: ImageDataset,
        sampler: Sampler,
        plan: ViewSpec,
        *,
        seed: int,
        device: torch.device,
        world: World,
        cache: str,
        strict_cache: bool = False,
        workers: int,
        bad: BadImages,
        masking: BackgroundRemoval | None = None,
    ) -> None:
        self.data_wait_seconds = 0.0
        self._source: ImageSource = source if masking is None else masking.masks.get_image_source(source)
        self._get_name = source.get_name
        self._sampler, self._plan = sampler, plan
        self._seed, self._device, self._bad, self._workers = seed, device, bad, workers
        self._upload_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._masking = masking
        self._device_masks: DeviceMasks | None = None
        self._first, self._last = world.get_local_rows(sampler.batch_size)
        self._labels = source.labels
        self._device_images: torch.Tensor | None = None
        if cache != "none":
            self._cache_images(cache, strict_cache)

    def iter_from_step(self, step: int, stop: int) -> Iterator[Batch]:
        """The batches of steps ``step`` to ``stop - 1``."""
        crops = self._crop_on_device if self._device_images is not None else self._crop_on_host
        rows = np.arange(self._first, self._last)
        for number, (views, samples) in zip(range(step, stop), crops(step, stop), strict=True):
            draw = draw_augment_params(self._plan.augment, self._seed, number, rows, self._plan.count)
            first, finished = 0, []
            for size, view in zip(self._plan.crops, views, strict=True):
                finished.append(apply_augmentations(view, draw[first : first + size.count]))
                first += size.count
            yield Batch(finished, self._gather_labels(samples))

    def _gather_labels(self, samples: np.ndarray) -> torch.Tensor | None:
        if self._labels is None:
            return None
        return torch.from_numpy(self._labels[samples]).to(self._device, non_blocking=True)

    # Decoded once, cropped on the device

    def _cache_images(self, cache: str, strict: bool) -> None:
        """Decode every image once: into one tensor on the device, or into host memory (``memory``)."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding leaves Python's lock
            loaded = list(pool.map(lambda i: load_or_next(self._source, i), range(len(self._source))))
        for _, _, skipped in loaded:
            self._record_skipped(skipped)
        images, indices = [image for image, _, _ in loaded], [index for _, index, _ in loaded]
        if self._labels is not None:
            self._labels = self._labels[indices]
        if self._masking is not None:
            self._masking = replace(self._masking, masks=self._masking.masks.select(images, indices))
            images = [np.ascontiguousarray(image[..., :3]) for image in images]
        one_size = len({image.shape for image in images}) == 1
        if cache == "memory" or not (one_size or strict):
            self._source = CachedImages(images)
        elif not one_size:
            raise UsageError(
                "data.cache is device, but the images differ in size.",
                "Set data.cache to memory, auto or none.",
            )
        else:
            planes = torch.empty(len(images), 3, *images[0].shape[:2], dtype=torch.uint8)
            for row, image in zip(planes, images, strict=True):
                row.copy_(torch.from_numpy(image).permute(2, 0, 1))
            self._device_images = planes.to(self._device)
            if self._masking is not None:
                self._device_masks = DeviceMasks(self._masking, images, self._device)

    def _crop_on_device(self, step: int, stop: int) -> Iterator[tuple[list[torch.Tensor], np.ndarray]]:
        assert self._device_images is not None
        height, width = self._device_images.shape[2:]
        for number in range(step, stop):
            samples = self._sampler.get_batch_indices(number)[self._first : self._last]
            picked = torch.from_numpy(samples).to(self._device, non_blocking=True)
            images = self._device_images[picked]
            boxes = _draw_view_boxes(
                self._plan, self._seed, self._sampler.get_epoch(number), samples,
                np.full(len(samples), height), np.full(len(samples), width),
            )  # fmt: skip
            views = [crop_on_device(images, b, s.size) for b, s in zip(boxes, self._plan.crops, strict=True)]
            if self._device_masks is not None:
                self._device_masks.crop_masked_views(
                    views[0], images, boxes[0], self._seed, self._sampler.get_epoch(number), samples
                )
            yield views, samples

    # Decoded for every batch by workers

    def _crop_on_host(self, step: int, stop: int) -> Iterator[tuple[list[torch.Tensor], np.ndarray]]:
        chunks = [
            (row, min(row + ROWS_PER_CHUNK, self._last)) for row in range(self._first, self._last, ROWS_PER_CHUNK)
        ]
        loader = DataLoader(
            _ChunkDataset(self._source, self._sampler, self._plan, self._seed, self._masking),
            batch_size=None,
            sampler=_ChunkSampler(step, stop, chunks),
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_init_worker,
            prefetch_factor=4 if self._workers else None,
        )
        rows = self._last - self._first
        with run_workers(loader) as items:
            for _ in range(step, stop):
                with self._open_upload_stream():
                    views = [
                        torch.empty(s.count, rows, s.size, s.size, 3, dtype=torch.uint8, device=self._device)
                        for s in self._plan.crops
                    ]
                samples = np.empty(rows, dtype=np.int64)
                for first, last in chunks:
                    start_time = time.perf_counter()
                    item = next(items)
                    self.data_wait_seconds += time.perf_counter() - start_time
                    if isinstance(item, UndecodableError):
                        self._record_skipped(item.skipped)
                    if isinstance(item, RelicError):
                        raise item
                    crops, used, skipped = item
                    self._record_skipped(skipped)
                    here = slice(first - self._first, last - self._first)
                    samples[here] = used
                    with self._open_upload_stream():
                        for view, crop in zip(views, crops, strict=True):
                            view[:, here].copy_(crop, non_blocking=True)
                self._wait_for_uploads(views)
                yield [view.permute(0, 1, 4, 2, 3) for view in views], samples

    def _open_upload_stream(self) -> AbstractContextManager[Any]:
        """Copies go to a GPU on a stream of their own: the host is ahead of it, so they overlap the step before."""
        return nullcontext() if self._upload_stream is None else torch.cuda.stream(self._upload_stream)

    def _wait_for_uploads(self, views: list[torch.Tensor]) -> None:
        """The step waits, on the device, for what was copied; the memory is not used again before it is done."""
        if self._upload_stream is not None:
            step = torch.cuda.current_stream(self._device)
            step.wait_stream(self._upload_stream)
            for view in views:
                view.record_stream(step)

    def _record_skipped(self, skipped: list[tuple[int, str]]) -> None:
        for index, reason in skipped:
            self._bad.add(self._get_name(index), reason)


CropChunk = tuple[list[torch.Tensor], np.ndarray, list[tuple[int, str]]]  # per size, samples used, samples passed over


class _ChunkDataset(Dataset):
    """Item (step, first, last): crops of those rows of the step's global batch, in uint8."""

    def __init__(
        self, source: ImageSource, sampler: Sampler, plan: ViewSpec, seed: int, masking: BackgroundRemoval | None = None
    ) -> None:
        self._source, self._sampler, self._plan, self._seed = source, sampler, plan, seed
        self._masking = masking

    def __getitem__(self, unit: tuple[int, int, int]) -> CropChunk | RelicError:
        try:
            return self._make_crops(*unit)
        except RelicError as error:
            return error  # raised in the training process: torch would wrap it up, with a traceback, on the way

    def _make_crops(self, step: int, first: int, last: int) -> CropChunk:
        samples = self._sampler.get_batch_indices(step)[first:last]
        crops = [np.empty((s.count, len(samples), s.size, s.size, 3), dtype=np.uint8) for s in self._plan.crops]
        used, all_skipped, epoch = np.empty_like(samples), [], self._sampler.get_epoch(step)
        masking, fills = self._masking, None
        if masking is not None:
            drawn = masking.draw_masked_views(self._seed, epoch, samples, self._plan.crops[0].count)
        for start in range(0, len(samples), IMAGES_PER_DECODE):
            rows = slice(start, start + IMAGES_PER_DECODE)
            loaded = [load_or_next(self._source, int(sample)) for sample in samples[rows]]
            used[rows] = [index for _, index, _ in loaded]
            all_skipped += [bad for _, _, skipped in loaded for bad in skipped]
            images, out = [image for image, _, _ in loaded], [crop[:, rows] for crop in crops]
            if masking is not None:
                fills = masking.build_fills(drawn[rows], self._seed, epoch, samples[rows], used[rows], images)
                images = [image[..., :3] for image in images]
            crop_views(images, self._plan, self._seed, epoch, samples[rows], out, fills)
        return [torch.from_numpy(crop) for crop in crops], used, all_skipped


@dataclass(frozen=True)
class _ChunkSampler:
    """The order in which workers' units are wanted."""

    step: int
    stop: int
    chunks: list[tuple[int, int]]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return ((step, *chunk) for step in range(self.step, self.stop) for chunk in self.chunks)

    def __len__(self) -> int:
        return (self.stop - self.step) * len(self.chunks)


class CachedImages:
    """Images of different sizes that were decoded before, in the memory that workers share with their parent."""

    def __init__(self, images: list[np.ndarray]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> np.ndarray:
        return self._images[index]


def resolve_cache(cache: str, source: ImageDataset, device: torch.device, masked: bool = False) -> str:
    """Settle ``auto``: ``device`` or ``memory`` where the decoded images take at most a quarter of what is free.

    With ``masked`` their masks, one bit a pixel, count too. The device crops images of one size; a CPU does so only
    up to 64 px, above which its host's road is faster.
    """
    if cache != "auto":
        return cache
    images = []
    for index in range(0, len(source), max(1, len(source) // 64)):
        try:
            images.append(source.load(index))
        except BadImageError:
            continue
    if not images:
        return "none"
    need = len(source) * sum(image.nbytes for image in images) / len(images) * (25 / 24 if masked else 1)
    if need > min(get_free_host_memory() / 4, 8 * GIB):
        return "none"
    if len({image.shape for image in images}) > 1:
        return "memory"
    if device.type == "cuda":
        return "device" if need <= torch.cuda.mem_get_info(device)[0] / 4 else "memory"
    return "device" if max(images[0].shape) <= 64 else "memory"
