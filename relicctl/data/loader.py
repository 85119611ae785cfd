"""From samples to batches of views: images are decoded on the CPU side, the rest runs on the GPU side.

There are two ways to the same views. Images of one size that fit are decoded once, stay on the device and are cropped
there. All others are cropped on the host in uint8: decoded for every batch by worker processes, or cached decoded
in memory. Whatever the number of workers, a batch is a function of (seed, step) alone; the two ways differ by
the rounding of a resize.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from relicctl.core.distributed import SINGLE_PROCESS, World
from relicctl.core.hardware import GIB, get_free_host_memory
from relicctl.data.augment import apply_augmentations
from relicctl.data.background_removal import BackgroundRemoval, DeviceMasks
from relicctl.data.crops import crop_on_device
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImageError, BadImages, ImageSource, SkippedImages, UndecodableError, load_or_next
from relicctl.data.photometric import draw_augment_params
from relicctl.data.sampler import DrawKey, Sampler
from relicctl.data.views import IMAGES_PER_DECODE, Batch, ViewSpec, crop_views, draw_view_boxes
from relicctl.data.workers import load_in_workers
from relicctl.errors import UsageError

ROWS_PER_CHUNK = 64  # a worker's unit of work: small enough to share a batch among workers


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are loaded, and where to.

    ``cache``: keep decoded images in "memory", on the "device" or not at all ("none"). Images of several sizes are
    cached in memory instead of on the device, or raise UsageError with ``strict_cache``. ``workers``: processes that
    decode and crop (0: this one).
    """

    seed: int
    device: torch.device
    world: World = SINGLE_PROCESS
    cache: str = "none"
    strict_cache: bool = False
    workers: int = 0


class ViewLoader:
    """Batches of views, this rank's rows of each, from any step on.

    ``data_wait_seconds`` counts the time spent waiting for the CPU side. Images that cannot be decoded are replaced
    by the next one and reported to ``bad``.
    """

    def __init__(
        self,
        source: ImageDataset,
        sampler: Sampler,
        views: ViewSpec,
        config: LoaderConfig,
        bad: BadImages,
        masking: BackgroundRemoval | None = None,
    ) -> None:
        self.data_wait_seconds = 0.0
        self._source: ImageSource = source if masking is None else masking.masks.get_image_source(source)
        self._get_name, self._labels, self._bad = source.get_name, source.labels, bad
        self._sampler, self._views, self._masking = sampler, views, masking
        self._seed, self._device, self._workers = config.seed, config.device, config.workers
        self._upload_stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._device_masks: DeviceMasks | None = None
        self._device_images: torch.Tensor | None = None
        self._first, self._last = config.world.get_local_rows(sampler.batch_size)
        if config.cache != "none":
            self._cache_images(config.cache, config.strict_cache)

    def iter_from_step(self, step: int, stop: int) -> Iterator[Batch]:
        """Load the batches of steps ``step`` to ``stop - 1``."""
        crops = self._crop_on_device if self._device_images is not None else self._crop_on_host
        rows = np.arange(self._first, self._last)
        for number, (views, samples) in zip(range(step, stop), crops(step, stop), strict=True):
            params = draw_augment_params(self._views.augment, self._seed, number, rows, self._views.count)
            first, finished = 0, []
            for view in views:
                finished.append(apply_augmentations(view, params[first : first + len(view)]))
                first += len(view)
            labels = None if self._labels is None else torch.from_numpy(self._labels[samples])
            yield Batch(finished, None if labels is None else labels.to(self._device, non_blocking=True))

    # Decoded once, cropped on the device

    def _cache_images(self, cache: str, strict: bool) -> None:
        """Decode every image once: into one tensor on the device, or into host memory (``memory``)."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the GIL
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
            what = "data.cache is device, but the images differ in size."
            raise UsageError(what, "Set data.cache to memory, auto or none.")
        else:
            planes = torch.empty(len(images), 3, *images[0].shape[:2], dtype=torch.uint8)
            for row, image in zip(planes, images, strict=True):
                row.copy_(torch.from_numpy(image).permute(2, 0, 1))
            self._device_images = planes.to(self._device)
            if self._masking is not None:
                self._device_masks = DeviceMasks(self._masking, images, self._device)

    def _crop_on_device(self, step: int, stop: int) -> Iterator[tuple[list[torch.Tensor], np.ndarray]]:
        assert self._device_images is not None
        for number in range(step, stop):
            samples = self._sampler.get_batch_indices(number)[self._first : self._last]
            images = self._device_images[torch.from_numpy(samples).to(self._device, non_blocking=True)]
            key = DrawKey(self._seed, self._sampler.get_epoch(number), samples)
            boxes = draw_view_boxes(self._views, key, np.tile(images.shape[2:], (len(samples), 1)))
            views = [crop_on_device(images, b, crop.size) for b, crop in zip(boxes, self._views.crops, strict=True)]
            if self._device_masks is not None:
                self._device_masks.crop_masked_views(views[0], images, boxes[0], key)
            yield views, samples

    # Decoded for every batch by workers

    def _crop_on_host(self, step: int, stop: int) -> Iterator[tuple[list[torch.Tensor], np.ndarray]]:
        starts = range(self._first, self._last, ROWS_PER_CHUNK)
        chunks = [(first, min(first + ROWS_PER_CHUNK, self._last)) for first in starts]
        crop_chunk = partial(_crop_chunk, self._source, self._sampler, self._views, self._seed, self._masking)
        units = ((number, *chunk) for number in range(step, stop) for chunk in chunks)
        rows, on_gpu = self._last - self._first, self._device.type == "cuda"
        with load_in_workers(crop_chunk, units, self._workers, prefetch=4, pin_memory=on_gpu) as items:
            for _ in range(step, stop):
                with self._open_upload_stream():
                    views = [
                        torch.empty(crop.count, rows, crop.size, crop.size, 3, dtype=torch.uint8, device=self._device)
                        for crop in self._views.crops
                    ]
                samples = np.empty(rows, dtype=np.int64)
                for first, last in chunks:
                    crops, used = self._wait_for_chunk(items)
                    here = slice(first - self._first, last - self._first)
                    samples[here] = used
                    with self._open_upload_stream():
                        for view, crop in zip(views, crops, strict=True):
                            view[:, here].copy_(crop, non_blocking=True)
                self._wait_for_uploads(views)
                yield [view.permute(0, 1, 4, 2, 3) for view in views], samples

    def _wait_for_chunk(self, items: Iterator[CropChunk]) -> tuple[list[torch.Tensor], np.ndarray]:
        start_time = time.perf_counter()
        try:
            crops, used, skipped = next(items)
        except UndecodableError as error:
            self._record_skipped(error.skipped)
            raise
        self.data_wait_seconds += time.perf_counter() - start_time
        self._record_skipped(skipped)
        return crops, used

    def _open_upload_stream(self) -> AbstractContextManager[object]:
        """Copy to a GPU on a separate stream: the host is ahead of it, so copies overlap the step before."""
        if self._upload_stream is None:
            return nullcontext()  # torch.cuda.stream(None) would start CUDA, or fail without it on a Mac
        return torch.cuda.stream(self._upload_stream)

    def _wait_for_uploads(self, views: list[torch.Tensor]) -> None:
        """Let the step wait, on the device, for the copies; their memory is not reused before it is done."""
        if self._upload_stream is not None:
            step = torch.cuda.current_stream(self._device)
            step.wait_stream(self._upload_stream)
            for view in views:
                view.record_stream(step)

    def _record_skipped(self, skipped: SkippedImages) -> None:
        for index, reason in skipped:
            self._bad.add(self._get_name(index), reason)


CropChunk = tuple[list[torch.Tensor], np.ndarray, SkippedImages]  # crops per size, samples used, samples skipped


def _crop_chunk(
    source: ImageSource, sampler: Sampler, views: ViewSpec, seed: int, masking: BackgroundRemoval | None,
    unit: tuple[int, int, int],
) -> CropChunk:  # fmt: skip
    """Crop, in uint8, the rows of one step's global batch that ``unit`` (step, first, last) names."""
    step, first, last = unit
    key = DrawKey(seed, sampler.get_epoch(step), sampler.get_batch_indices(step)[first:last])
    count = len(key.samples)
    crops = [np.empty((c.count, count, c.size, c.size, 3), dtype=np.uint8) for c in views.crops]
    used, all_skipped, fills = np.empty_like(key.samples), [], None
    for start in range(0, count, IMAGES_PER_DECODE):
        rows = slice(start, start + IMAGES_PER_DECODE)
        loaded = [load_or_next(source, int(sample)) for sample in key.samples[rows]]
        used[rows] = [index for _, index, _ in loaded]
        all_skipped += [bad for _, _, skipped in loaded for bad in skipped]
        images, out = [image for image, _, _ in loaded], [crop[:, rows] for crop in crops]
        if masking is not None:
            fills = masking.build_fills(key[rows], views.crops[0].count, used[rows], images)
            images = [image[..., :3] for image in images]
        crop_views(images, views, key[rows], out, fills)
    return [torch.from_numpy(crop) for crop in crops], used, all_skipped


class CachedImages(list[np.ndarray]):
    """Decoded images of any sizes, in the memory that workers share with their parent."""

    def load(self, index: int) -> np.ndarray:
        return self[index]


def resolve_cache(cache: str, source: ImageDataset, device: torch.device, masked: bool = False) -> str:
    """Resolve ``auto``: ``device`` or ``memory`` where the decoded images take at most a quarter of the free memory.

    ``masked``: their masks, one bit per pixel, count too. The device crops images of one size; a CPU only up to 64 px,
    above which cropping on the host is faster.
    """
    if cache != "auto":
        return cache
    images = []
    for index in range(0, len(source), max(1, len(source) // 64)):
        with suppress(BadImageError):
            images.append(source.load(index))
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
