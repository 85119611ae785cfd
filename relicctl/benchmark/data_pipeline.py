"""Timing of data loading on one CPU core: read, decode, crop, collate; and generated photos to time it with."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from relicctl.benchmark.train_step import Spread, measure_cpu_seconds, summarize_timings
from relicctl.core.counter_rng import draw_uniform
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import decode_rgb
from relicctl.data.sampler import DrawKey
from relicctl.data.views import IMAGES_PER_DECODE, ViewSpec, crop_views

IMAGES_PER_REPEAT = 32  # measured at a time
WIDTH, HEIGHT, QUALITY = 500, 375, 88  # of generated photos: about 110 KB each
NUM_DISTINCT = 48  # generated photos


def measure_data_loading(source: ImageDataset, plan: ViewSpec, repeats: int) -> dict[str, Spread]:
    """Return images per second on one core, for each stage and for ``all`` together."""
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
            crop_views(images[rows], plan, DrawKey(0, 0, samples[rows]), [c[:, rows] for c in crops])

    def collate() -> None:
        for whole, part in zip(batch, crops, strict=True):
            whole.copy_(torch.from_numpy(part))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        stages = {stage.__name__: measure_cpu_seconds(stage, repeats) for stage in (read, decode, crop, collate)}
    finally:
        torch.set_num_threads(threads)
    stages["all"] = [sum(seconds) for seconds in zip(*stages.values(), strict=True)]
    return {
        stage: summarize_timings([len(samples) / max(s, 1e-9) for s in seconds]) for stage, seconds in stages.items()
    }


def _decode_file(file: bytes | np.ndarray) -> np.ndarray:
    return decode_rgb(file) if isinstance(file, bytes) else file


class GeneratedPhotos(ImageDataset):
    """``length`` samples: NUM_DISTINCT different JPEGs, repeated.

    Noise whose amplitude falls with frequency as in photographs, with correlated channels: a JPEG decoder takes as
    long for it as for a photo of the same size in bytes.
    """

    spec = "generated"

    def __init__(self, length: int, width: int = WIDTH, height: int = HEIGHT) -> None:
        self._length = length
        self._files = [_generate_jpeg(number, width, height) for number in range(min(length, NUM_DISTINCT))]

    def __len__(self) -> int:
        return self._length

    def get_name(self, index: int) -> str:
        return f"{index:08d}.jpg"

    def read(self, index: int) -> bytes:
        return self._files[index % len(self._files)]


def _generate_jpeg(number: int, width: int, height: int) -> bytes:
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    amplitude = 1 / np.maximum(np.hypot(down, across), 1 / max(width, height))
    turns = draw_uniform(0, 0, number, np.arange(4)[:, None], np.arange(height), n=len(across))
    waves = np.fft.irfft2(amplitude * np.exp(2j * np.pi * turns), s=(height, width))
    waves /= waves.std(axis=(1, 2), keepdims=True)
    pixels = 120 + 50 * waves[:1] + 20 * waves[1:]  # common to the channels, and of each alone
    buffer = io.BytesIO()
    Image.fromarray(np.moveaxis(pixels, 0, -1).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
