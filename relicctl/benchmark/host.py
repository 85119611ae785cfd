"""The host's half alone, on one core: read, decode, crop, collate."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from relicctl.benchmark.timing import measure_cpu_seconds, summarize_timings
from relicctl.data.feed import IMAGES_PER_DECODE, ViewSpec, crop_views
from relicctl.data.images import decode_rgb
from relicctl.data.sources import ImageDataset

IMAGES_PER_REPEAT = 32  # measured at a time


def measure_data_loading(source: ImageDataset, plan: ViewSpec, repeats: int) -> dict[str, Any]:
    """Images per second of a core, all in all and by stage (spreads)."""
    samples = np.arange(min(IMAGES_PER_REPEAT, len(source)))
    files = [source.read(int(i)) for i in samples]
    images = [_decode_file(file) for file in files]
    crops = [np.empty((s.count, len(samples), s.size, s.size, 3), dtype=np.uint8) for s in plan.crops]
    batch = [torch.empty(crop.shape, dtype=torch.uint8) for crop in crops]

    def read() -> None:
        for i in samples:
            source.read(int(i))

    def decode() -> None:
        for file in files:
            _decode_file(file)

    def crop() -> None:
        for start in range(0, len(samples), IMAGES_PER_DECODE):
            rows = slice(start, start + IMAGES_PER_DECODE)
            crop_views(images[rows], plan, 0, 0, samples[rows], [c[:, rows] for c in crops])

    def collate() -> None:
        for whole, part in zip(batch, crops, strict=True):
            whole.copy_(torch.from_numpy(part))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        seconds_by_stage = {
            stage.__name__: measure_cpu_seconds(stage, repeats) for stage in (read, decode, crop, collate)
        }
    finally:
        torch.set_num_threads(threads)
    seconds_by_stage = {
        "all": [sum(stages) for stages in zip(*seconds_by_stage.values(), strict=True)],
        **seconds_by_stage,
    }
    return {
        stage: summarize_timings([len(samples) / max(s, 1e-9) for s in seconds])
        for stage, seconds in seconds_by_stage.items()
    }


def _decode_file(file: bytes | np.ndarray) -> np.ndarray:
    return decode_rgb(file) if isinstance(file, bytes) else file
