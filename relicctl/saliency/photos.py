"""Images squashed to a square, whatever their shape: streamed through data workers, or all kept in memory."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from relicctl.core.distributed import World
from relicctl.data.bad_images import BadImages
from relicctl.data.crops import host_crops
from relicctl.data.images import BadImage
from relicctl.data.sources import Source
from relicctl.data.workers import working
from relicctl.errors import DataError
from relicctl.saliency.hints import hints, quantised
from relicctl.saliency.priors import prior_maps


@dataclass(frozen=True)
class Squashed:
    """Some samples of a source. ``bad`` are (index, reason) of those among them that cannot be decoded."""

    indices: np.ndarray  # int64 [K], in the order asked for, without the bad ones
    images: Tensor  # uint8 [K, 3, S, S]
    bad: list[tuple[int, str]]
    hints: Tensor | None = None  # uint8 [K, P, h, h]


@dataclass(frozen=True)
class Photos:
    """The decodable images of a source, in memory."""

    indices: np.ndarray  # int64 [K]
    images: Tensor  # uint8 [K, 3, S, S]

    def __len__(self) -> int:
        return len(self.indices)


def squash(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 ``[size, size, 3]``: the whole image, uint8 ``[H, W, 3]``, its aspect given up (antialiased bicubic)."""
    whole = np.array([[0, 0, image.shape[1], image.shape[0]]], dtype=np.int32)
    return host_crops(image, whole, size)[0]


def load_photos(
    source: Source,
    size: int,
    *,
    workers: int,
    bad: BadImages,
    show: Callable[[int], None] = lambda done: None,
    world: World | None = None,
) -> Photos:
    """Decode every image of ``source`` once, each process its share; in the end all have all.

    Bad ones are left out and told to ``bad``; DataError if all are bad. ``show`` is told how many are decoded, where
    the other processes are taken to be as fast as this one.
    """
    world = world or World()
    first, last = world.shares(len(source))[world.rank]
    images = torch.empty(last - first, 3, size, size, dtype=torch.uint8)
    indices: list[int] = []
    unread: list[tuple[int, str]] = []
    with closing(stream(source, np.arange(first, last), size, batch_size=64, workers=workers)) as decoded:
        for some in decoded:
            images[len(indices) : len(indices) + len(some.indices)] = some.images
            indices += some.indices.tolist()
            unread += some.bad
            show(min(len(source), world.size * (len(indices) + len(unread))))
    told = world.tell([indices, unread])
    for index, reason in (pair for _, theirs in told for pair in theirs):
        bad.add(source.key(index), reason)
    kept = [index for theirs, _ in told for index in theirs]
    if not kept:
        raise DataError(f"Not one of the {len(source)} images can be decoded.", "Check that the files are images.")
    whole = world.gather_rows(images[: len(indices)], [len(theirs) for theirs, _ in told])
    return Photos(np.array(kept, dtype=np.int64), whole)


def stream(
    source: Source, indices: np.ndarray, size: int, *, batch_size: int, workers: int, with_hints: int = 0
) -> Generator[Squashed, None, None]:
    """The samples at ``indices``, int64 ``[K]``, batch after batch; only a few batches are in memory at a time.

    ``with_hints``: side in pixels of the priors' maps that come along; 0 = none.
    """
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    loader = DataLoader(
        _Batches(source, batches, size, with_hints),
        batch_size=None,
        num_workers=min(workers, len(batches)),
        worker_init_fn=_quiet_worker,
        prefetch_factor=2 if workers and batches else None,
    )
    with working(loader) as items:
        yield from items


class _Batches(Dataset):
    def __init__(self, source: Source, batches: Sequence[np.ndarray], size: int, with_hints: int) -> None:
        self._source, self._batches, self._size, self._hints = source, batches, size, with_hints

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Squashed:
        # Sums depend on the number of threads in their last bits.
        with threadpool_limits(1) if self._hints else nullcontext():
            return self._made(self._batches[number])

    def _made(self, batch: np.ndarray) -> Squashed:
        kept, images, priors, bad = [], [], [], []
        for index in batch.tolist():
            try:
                image = self._source.load(index)
            except BadImage as reason:
                bad.append((index, reason.reason))
                continue
            kept.append(index)
            images.append(squash(image, self._size))
            if self._hints:
                priors.append(quantised(prior_maps(image, self._hints)))
        pixels = np.stack(images) if images else np.empty((0, self._size, self._size, 3), np.uint8)
        planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        made = hints(*map(np.stack, zip(*priors, strict=True))) if priors else None
        return Squashed(np.array(kept, dtype=np.int64), planes, bad, made)


def _quiet_worker(_: int) -> None:
    """Signals are the main process's business: a worker goes on until it is told there is no more to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
