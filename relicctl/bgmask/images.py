"""Images resized to squares, whatever their shape: streamed through data workers, or all in memory."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from relicctl.bgmask.priors.maps import build_prior_channels, compute_prior_maps, quantize_maps
from relicctl.core.distributed import SINGLE_PROCESS, World
from relicctl.data.crops import crop_on_host
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImageError, BadImages
from relicctl.data.workers import load_in_workers
from relicctl.errors import DataError


@dataclass(frozen=True)
class ResizedBatch:
    """Some samples of a data set. ``bad``: (index, reason) of those that cannot be decoded."""

    indices: np.ndarray  # int64 [K], in their order, without the bad ones
    images: Tensor  # uint8 [K, 3, S, S]
    bad: list[tuple[int, str]]
    prior_channels: Tensor | None = None  # uint8 [K, P, h, h]


@dataclass(frozen=True)
class InMemoryImages:
    """The decodable images of a data set, in memory."""

    indices: np.ndarray  # int64 [K]
    images: Tensor  # uint8 [K, 3, S, S]

    def __len__(self) -> int:
        return len(self.indices)


def resize_to_square(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the whole image, uint8 ``[H, W, 3]``, to uint8 ``[size, size, 3]`` (antialiased bicubic)."""
    whole = np.array([[0, 0, image.shape[1], image.shape[0]]], dtype=np.int32)
    return np.asarray(crop_on_host(image, whole, size)[0])


def load_resized_images(
    source: ImageDataset,
    size: int,
    *,
    workers: int,
    bad: BadImages,
    show: Callable[[int], None] = lambda done: None,
    world: World = SINGLE_PROCESS,
) -> InMemoryImages:
    """Decode every image of ``source`` once, each rank its part, and return all of them on every rank.

    Bad ones are left out and added to ``bad``; raises DataError if all are bad. ``show`` gets the number decoded,
    assuming that the other ranks are as fast as this one.
    """
    first, last = world.split_evenly(len(source))[world.rank]
    images = torch.empty(last - first, 3, size, size, dtype=torch.uint8)
    indices, failed = list[int](), list[tuple[int, str]]()
    with closing(iter_resized_batches(source, np.arange(first, last), size, batch_size=64, workers=workers)) as decoded:
        for batch in decoded:
            images[len(indices) : len(indices) + len(batch.indices)] = batch.images
            indices += batch.indices.tolist()
            failed += batch.bad
            show(min(len(source), world.size * (len(indices) + len(failed))))
    gathered = world.all_gather_object([indices, failed])
    for index, reason in (pair for _, pairs in gathered for pair in pairs):
        bad.add(source.get_name(index), reason)
    all_indices = [index for part, _ in gathered for index in part]
    if not all_indices:
        raise DataError(f"None of the {len(source)} images can be decoded.", "Check that the files are images.")
    all_images = world.gather_rows(images[: len(indices)], [len(part) for part, _ in gathered])
    return InMemoryImages(np.array(all_indices, dtype=np.int64), all_images)


def iter_resized_batches(
    source: ImageDataset, indices: np.ndarray, size: int, *, batch_size: int, workers: int, prior_size: int = 0
) -> Generator[ResizedBatch, None, None]:
    """Yield the samples at ``indices``, int64 ``[K]``, in batches, a few of which are in memory at a time.

    ``prior_size``: side in pixels of the prior maps that are computed as well; 0 = none.
    """
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    load = partial(_load_batch, source, size, prior_size)
    with load_in_workers(load, batches, min(workers, len(batches))) as items:
        yield from items


def _load_batch(source: ImageDataset, size: int, prior_size: int, batch: np.ndarray) -> ResizedBatch:
    used, images, priors, bad = [], [], [], []
    for index in batch.tolist():
        try:
            image = source.load(index)
        except BadImageError as reason:
            bad.append((index, reason.reason))
            continue
        used.append(index)
        images.append(resize_to_square(image, size))
        if prior_size:
            with threadpool_limits(1):  # sums depend on the number of threads in their last bits
                priors.append(quantize_maps(compute_prior_maps(image, prior_size)))
    pixels = np.stack(images) if images else np.empty((0, size, size, 3), np.uint8)
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    prior_channels = build_prior_channels(*map(np.stack, zip(*priors, strict=True))) if priors else None
    return ResizedBatch(np.array(used, dtype=np.int64), planes, bad, prior_channels)
