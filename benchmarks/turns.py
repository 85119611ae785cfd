"""What the benchmarks share: taking turns, and the usual PIL pipeline."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image

from relicctl.benchmark.data_pipeline import GeneratedPhotos
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.photometric import AugmentConfig
from relicctl.data.sampler import DrawKey
from relicctl.data.views import CropSpec, ViewSpec, crop_views

LARGE, SMALL = CropSpec(4, 224, (0.14, 1.0)), CropSpec(2, 96, (0.05, 0.14))
PLAN = ViewSpec((LARGE, SMALL), (3 / 4, 4 / 3), AugmentConfig())
IMAGES = 24


def photos() -> ImageDataset:
    return GeneratedPhotos(IMAGES)


def device_clock() -> float:
    """Seconds, after the CUDA device has finished its work."""
    torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(
    ways: dict[str, Callable[[], object]], runs: int = 5, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds (of the processor) of every way in each of ``runs`` rounds, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for counted in [False] + [True] * runs:
        for name, way in ways.items():
            start = clock()
            way()
            if counted:
                seconds[name].append(clock() - start)
    return seconds


def ratio(of: list[float], to: list[float]) -> dict[str, float]:
    """How many times as long ``of`` takes as ``to``: median and spread over the rounds."""
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    return {
        "median": round(statistics.median(ratios), 4), "min": round(min(ratios), 4), "max": round(max(ratios), 4),
        "runs": len(ratios),
    }  # fmt: skip


def pil_view(size: CropSpec, blur: float, solarize: float) -> T.Compose:
    """torchvision's first transforms on PIL images, with the operations and chances of our views."""
    return T.Compose(
        [
            T.RandomResizedCrop(size.size, scale=size.area, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.GaussianBlur(2 * int(size.size / 10 / 2) + 1, (0.1, 2.0))], p=blur),
            T.RandomSolarize(128, solarize),
            T.ToTensor(),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def pil_pipeline(source: ImageDataset) -> Callable[[], object]:
    sets = {size: (pil_view(size, 1.0, 0.0), pil_view(size, 0.1, 0.2)) for size in PLAN.crops}

    def run() -> None:
        for index in range(len(source)):
            image = Image.open(io.BytesIO(source.read(index))).convert("RGB")
            for size, both in sets.items():
                for view in range(size.count):
                    both[view % 2](image)

    return run


def our_host(source: ImageDataset) -> Callable[[], list[np.ndarray]]:
    """Read, decode, crop, collate: what a worker does."""

    def run() -> list[np.ndarray]:
        crops = [np.empty((s.count, len(source), s.size, s.size, 3), dtype=np.uint8) for s in PLAN.crops]
        for start in range(0, len(source), 8):
            rows = slice(start, start + 8)
            images = [source.load(index) for index in range(*rows.indices(len(source)))]
            crop_views(images, PLAN, DrawKey(0, 0, np.arange(len(source))[rows]), [c[:, rows] for c in crops])
        return [crop.copy() for crop in crops]

    return run
