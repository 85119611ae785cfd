"""Images of more than 8 bits whose values use a small part of their type's range, as 12 bits saved in 16."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImageError, decode_image, read_value_range

NUM_PROBED_IMAGES = 16  # images whose values are examined, spread over the data set
MIN_USED_RANGE = 0.25  # of the range up to white; below, two bits of eight are lost


def warn_unused_range(images: ImageDataset, warn: Callable[[str], None]) -> None:
    """Warn where the brightest of a few images is far below white, or above a white point that was set."""
    ranges = []
    for index in np.linspace(0, len(images) - 1, min(NUM_PROBED_IMAGES, len(images))).astype(int).tolist():
        with suppress(BadImageError):
            data = images.read(index)
            if isinstance(data, bytes):
                ranges.append(_measure(data, images.decode.max_pixels))
    measured = [one for one in ranges if one is not None]
    if not measured:
        return
    key = "data.decoding.white_point"
    top, white = max(top for top, _ in measured), images.decode.white_point or max(white for _, white in measured)
    if 0 < top < MIN_USED_RANGE * white:
        levels, better = round(255 * top / white) + 1, 2 ** int(top).bit_length() - 1
        warn(
            f"{images.spec}: the values of its images reach only {top:g} of {white:g}, which leaves {levels} of 256 "
            f"grey levels, all dark; set {key}={max(better, 1)}"
        )
    elif top > white:
        warn(f"{images.spec}: its images have values up to {top:g}; what is above {key} {white:g} becomes white")


def _measure(data: bytes, max_pixels: int) -> tuple[float, float] | None:
    try:
        return decode_image(data, read_value_range, max_pixels=max_pixels)
    except Exception:  # on damaged files Pillow's plugins raise almost anything; training lists them
        return None
