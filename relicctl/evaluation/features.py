"""Features of whole data sets: images are prepared once, the encoder is left exactly as it was."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

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

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._kept:
            yield from self._kept
            return
        made = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for first in range(0, len(self), CHUNK):
                chunk = np.stack(list(pool.map(self._crop, range(first, min(first + CHUNK, len(self))))))
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


def extract(encoder: nn.Module, images: Iterable[np.ndarray], device: torch.device) -> torch.Tensor:
    """float32 ``[N, F]`` features on ``device``, in float32 arithmetic; ``images`` as EvalImages gives them."""
    mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(STD, device=device).view(3, 1, 1)
    with frozen(encoder):
        return torch.cat(
            [encoder(((torch.from_numpy(c).to(device).permute(0, 3, 1, 2) / 255) - mean) / std) for c in images]
        )
