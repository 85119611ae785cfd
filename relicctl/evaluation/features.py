"""Features of whole data sets: images are prepared once, the encoder is left exactly as it was.

Several processes share the images out in whole chunks. So the encoder sees the very batches that it sees in one
process, and the features are the same to the bit where machines and thread counts are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from relicctl.core.distributed import World
from relicctl.data.augment import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.bad_images import BadImages, load_or_next
from relicctl.data.crops import crop_on_host, make_eval_box
from relicctl.data.feed import GIB
from relicctl.data.sources import ImageDataset

IMAGES_PER_CHUNK = 128


class EvalImages:
    """The centre crops of a source's images, in chunks of uint8 ``[n, size, size, 3]``; kept when they are small.

    ``bad``: after a pass, what is wrong with each image that could not be decoded and was replaced by the next.
    """

    def __init__(self, source: ImageDataset, size: int, crop_ratio: float) -> None:
        self._source, self._size, self._ratio = source, size, crop_ratio
        self.labels = source.labels
        self._use_cache = len(source) * size * size * 3 <= GIB
        self._cached: list[np.ndarray] = []
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._source)

    def get_decodable_rows(self, report: BadImages) -> np.ndarray:
        """int64: the rows whose image could be decoded, after a pass; the others are reported by name."""
        for index, reason in sorted(self.bad.items()):
            report.add(self._source.get_name(index), reason)
        return np.array([row for row in range(len(self)) if row not in self.bad], dtype=np.int64)

    def get_rank_ranges(self, world: World) -> list[tuple[int, int]]:
        """Of each process, the first and last+1 image."""
        chunks = -(-len(self) // IMAGES_PER_CHUNK)
        return [
            (first * IMAGES_PER_CHUNK, min(last * IMAGES_PER_CHUNK, len(self)))
            for first, last in world.split_evenly(chunks)
        ]

    def iter_chunks(self, world: World) -> Iterator[np.ndarray]:
        """This process's share, the same at every call."""
        if self._cached:
            yield from self._cached
            return
        computed = []
        start, stop = self.get_rank_ranges(world)[world.rank]
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // processes)) as pool:
            for first in range(start, stop, IMAGES_PER_CHUNK):
                chunk = np.stack(list(pool.map(self._crop, range(first, min(first + IMAGES_PER_CHUNK, stop)))))
                if self._use_cache:
                    computed.append(chunk)
                yield chunk
        self._cached = computed

    def _crop(self, index: int) -> np.ndarray:
        image, _, passed = load_or_next(self._source, index)
        self.bad.update(passed)
        height, width = image.shape[:2]
        return crop_on_host(image, make_eval_box(height, width, self._ratio)[None], self._size)[0]


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` in eval mode without gradients; every submodule's own mode comes back afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield module
    finally:
        for m, mode in modes.items():
            m.training = mode


def extract_features(
    encoder: nn.Module,
    images: EvalImages,
    device: torch.device,
    world: World | None = None,
    on_chunk: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """float32 ``[N, F]`` features of all images on ``device``, in float32 arithmetic, alike on every process.

    Each process extracts its share; ``show`` is told how many chunks of it are done.
    """
    world = world or World()
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    local_features = []
    with eval_mode(encoder):
        for chunk in images.iter_chunks(world):
            pixels = torch.from_numpy(chunk).to(device).permute(0, 3, 1, 2)
            local_features.append(encoder((pixels / 255 - mean) / std))
            on_chunk(len(local_features))
    gathered = world.all_gather_object(
        [local_features[0].shape[1] if local_features else None, sorted(images.bad.items())]
    )
    width = next(found for found, _ in gathered if found is not None)
    for _, bad in gathered:
        images.bad.update((index, reason) for index, reason in bad)
    features = torch.cat(local_features) if local_features else torch.empty(0, width, device=device)
    return world.gather_rows(features, [last - first for first, last in images.get_rank_ranges(world)])
