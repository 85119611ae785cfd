"""The host's half alone, on one core: read, decode, crop, collate."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from relicctl.benchmark.timing import core_seconds, spread
from relicctl.data.feed import DECODED_AT_ONCE, ViewPlan, crop_views
from relicctl.data.images import decode_rgb
from relicctl.data.sources import Source

IMAGES = 32  # measured at a time


def host_figures(source: Source, plan: ViewPlan, repeats: int) -> dict[str, Any]:
    """Images per second of a core, all in all and by stage (spreads)."""
    samples = np.arange(min(IMAGES, len(source)))
    files = [source.read(int(i)) for i in samples]
    images = [_decoded(file) for file in files]
    crops = [np.empty((s.count, len(samples), s.size, s.size, 3), dtype=np.uint8) for s in plan.sizes]
    batch = [torch.empty(crop.shape, dtype=torch.uint8) for crop in crops]

    def read() -> None:
        for i in samples:
            source.read(int(i))

    def decode() -> None:
        for file in files:
            _decoded(file)

    def crop() -> None:
        for start in range(0, len(samples), DECODED_AT_ONCE):
            rows = slice(start, start + DECODED_AT_ONCE)
            crop_views(images[rows], plan, 0, 0, samples[rows], [c[:, rows] for c in crops])

    def collate() -> None:
        for whole, part in zip(batch, crops, strict=True):
            whole.copy_(torch.from_numpy(part))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        taken = {stage.__name__: core_seconds(stage, repeats) for stage in (read, decode, crop, collate)}
    finally:
        torch.set_num_threads(threads)
    taken = {"all": [sum(stages) for stages in zip(*taken.values(), strict=True)], **taken}
    return {stage: spread([len(samples) / max(s, 1e-9) for s in seconds]) for stage, seconds in taken.items()}


def _decoded(file: bytes | np.ndarray) -> np.ndarray:
    return decode_rgb(file) if isinstance(file, bytes) else file
