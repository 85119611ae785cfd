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
from relicctl.data.augment import MEAN, STD
from relicctl.data.bad_images import BadImages, load_or_next
from relicctl.data.crops import eval_box, host_crops
from relicctl.data.feed import GIB
from relicctl.data.sources import Source

CHUNK = 128


class EvalImages:
    """The centre crops of a source's images, in chunks of uint8 ``[n, size, size, 3]``; kept when they are small.

    ``bad``: after a pass, what is wrong with each image that could not be decoded and was replaced by the next.
    """

    def __init__(self, source: Source, size: int, crop_ratio: float) -> None:
        self._source, self._size, self._ratio = source, size, crop_ratio
        self.labels = source.labels
        self._keep = len(source) * size * size * 3 <= GIB
        self._kept: list[np.ndarray] = []
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._source)

    def good_rows(self, report: BadImages) -> np.ndarray:
        """int64: the rows whose image could be decoded, after a pass; the others are reported by name."""
        for index, reason in sorted(self.bad.items()):
            report.add(self._source.key(index), reason)
        return np.array([row for row in range(len(self)) if row not in self.bad], dtype=np.int64)

    def shares(self, world: World) -> list[tuple[int, int]]:
        """Of each process, the first and last+1 image."""
        chunks = -(-len(self) // CHUNK)
        return [(first * CHUNK, min(last * CHUNK, len(self))) for first, last in world.shares(chunks)]

    def chunks(self, world: World) -> Iterator[np.ndarray]:
        """This process's share, the same at every call."""
        if self._kept:
            yield from self._kept
            return
        made = []
        start, stop = self.shares(world)[world.rank]
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // processes)) as pool:
            for first in range(start, stop, CHUNK):
                chunk = np.stack(list(pool.map(self._crop, range(first, min(first + CHUNK, stop)))))
                if self._keep:
                    made.append(chunk)
                yield chunk
        self._kept = made

    def _crop(self, index: int) -> np.ndarray:
        image, _, passed = load_or_next(self._source, index)
        self.bad.update(passed)
        height, width = image.shape[:2]
        return host_crops(image, eval_box(height, width, self._ratio)[None], self._size)[0]


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` in eval mode without gradients; every submodule's own mode comes back afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield module
    finally:
        for m, mode in modes.items():
            m.training = mode


def extract(
    encoder: nn.Module,
    images: EvalImages,
    device: torch.device,
    world: World | None = None,
    show: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """float32 ``[N, F]`` features of all images on ``device``, in float32 arithmetic, alike on every process.

    Each process extracts its share; ``show`` is told how many chunks of it are done.
    """
    world = world or World()
    mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(STD, device=device).view(3, 1, 1)
    mine = []
    with frozen(encoder):
        for chunk in images.chunks(world):
            pixels = torch.from_numpy(chunk).to(device).permute(0, 3, 1, 2)
            mine.append(encoder((pixels / 255 - mean) / std))
            show(len(mine))
    told = world.tell([mine[0].shape[1] if mine else None, sorted(images.bad.items())])
    width = next(found for found, _ in told if found is not None)
    for _, bad in told:
        images.bad.update((index, reason) for index, reason in bad)
    features = torch.cat(mine) if mine else torch.empty(0, width, device=device)
    return world.gather_rows(features, [last - first for first, last in images.shares(world)])
