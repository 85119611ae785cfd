"""Generated photos: JPEGs of ImageNet's usual size, so that a bench needs no data."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from relicctl.core.counted import draw_uniform
from relicctl.data.sources import ImageDataset

WIDTH, HEIGHT, QUALITY = 500, 375, 88  # about 110 KB each
NUM_DISTINCT = 48


class GeneratedPhotos(ImageDataset):
    """``length`` samples, DISTINCT different ones over and over.

    Noise whose amplitude falls with frequency as in photographs, the channels alike: it costs a JPEG decoder what
    a photo of the same bytes does.
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

    def size(self, index: int) -> int:
        return len(self.read(index))


def _generate_jpeg(number: int, width: int, height: int) -> bytes:
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    amplitude = 1 / np.maximum(np.hypot(down, across), 1 / max(width, height))
    turns = draw_uniform(0, 0, number, np.arange(4)[:, None], np.arange(height), n=len(across))
    waves = np.fft.irfft2(amplitude * np.exp(2j * np.pi * turns), s=(height, width))
    waves /= waves.std(axis=(1, 2), keepdims=True)
    pixels = 120 + 50 * waves[:1] + 20 * waves[1:]  # what the channels share, and what is their own
    buffer = io.BytesIO()
    Image.fromarray(np.moveaxis(pixels, 0, -1).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
