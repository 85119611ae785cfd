"""Decoding of image files into pixels (RGB, uint8, upright), and the handling of those that cannot be decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Protocol

import numpy as np

# Importing a plugin registers its format; Pillow would otherwise load every plugin it has to find these two.
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

from relicctl.errors import DataError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # recognised by content, whatever a file's name says
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_SKIPPED = 1000  # samples tried in the place of one that cannot be decoded
MAX_PIXELS = 178_956_970  # 512 MiB of RGB; a header that claims more is treated as a decompression bomb
SkippedImages = list[tuple[int, str]]  # (index, reason) of images that cannot be decoded
_EXIF_KEYS = {"exif", "xmp", "Raw profile type exif"}
_ORIENTATION_TAG = 0x0112
_ORIENTATION_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(Exception):
    """One sample cannot be read or decoded, for ``reason``; the run continues without it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_rgb(data: bytes, *, keep_alpha: bool = False) -> np.ndarray:
    """Decode the (first) image in ``data`` into uint8 ``[H, W, 3]``, contiguous and writable.

    With ``keep_alpha`` an image with transparency becomes ``[H, W, 4]``, its alpha last. The EXIF orientation is
    applied. Transparent pixels are composited on white. Grey values of 16 bits and more are scaled to 8, palettes
    resolved, CMYK converted without its colour profile.
    Raises BadImageError for anything but a complete image of IMAGE_FORMATS with at most MAX_PIXELS.
    """
    try:
        image: Image.Image = Image.open(BytesIO(data), formats=IMAGE_FORMATS)
        if not 0 < image.width * image.height <= MAX_PIXELS:
            raise BadImageError(f"{image.width} x {image.height} pixels, outside 1 to {MAX_PIXELS}")
        image.load()
        turn = _ORIENTATION_TRANSPOSES.get(_read_orientation(image))
        rgb = _to_rgb(image)
        if keep_alpha and image.has_transparency_data:
            rgb.putalpha(image.convert("RGBA").getchannel("A"))
        return np.array(rgb if turn is None else rgb.transpose(turn))
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("no image in a known format") from None
    except Exception as error:  # on damaged files Pillow's plugins raise almost anything
        raise BadImageError(f"{error}" or type(error).__name__) from error


def _read_orientation(image: Image.Image) -> int:
    if _EXIF_KEYS.isdisjoint(image.info):
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata beside sound pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        sixteen_bits = image.mode != "F" and (image.mode != "I" or image.format == "PNG")
        grey = _to_uint8(np.asarray(image), white=65535 if sixteen_bits else None)
        image = Image.fromarray(grey)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_uint8(values: np.ndarray, white: int | None) -> np.ndarray:
    """Scale ``[H, W]`` linearly so that ``white`` becomes 255.

    Files of 32-bit integers or floats do not say what white is: it is taken to be the smallest of 1 (floats
    only), 255, 65535 and the values' maximum that no value exceeds.
    """
    grey = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    if white is None:
        usual = (1, 255, 65535) if values.dtype.kind == "f" else (255, 65535)
        white = next((w for w in usual if grey.max() <= w), grey.max())
    return np.rint(grey.clip(0, white) * (255 / white)).astype(np.uint8)


class ImageSource(Protocol):
    """What images are loaded from: a data set, or images in memory."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> np.ndarray: ...


@dataclass
class BadImages:
    """Samples that could not be decoded. Raises DataError when they are too many of ``size``."""

    size: int
    limit: float
    report: Callable[[str, str], None] = lambda name, reason: None
    seen: set[str] = field(default_factory=set)

    def add(self, name: str, reason: str) -> None:
        name = name.encode("unicode_escape").decode("ascii") if not name.isprintable() else name
        if name in self.seen:
            return
        self.seen.add(name)
        self.report(name, reason)
        if len(self.seen) > self.limit * self.size:
            raise DataError(
                f"{len(self.seen)} of {self.size} images cannot be decoded, more than the {self.limit:.1%} allowed; "
                f"the latest is {name} ({reason}).",
                "Repair or remove the files listed in bad_images.txt, or raise data.max_corrupt_fraction.",
            )


def is_decodable(source: ImageSource, index: int) -> bool:
    try:
        source.load(index)
    except BadImageError:
        return False
    return True


def load_or_next(source: ImageSource, index: int) -> tuple[np.ndarray, int, SkippedImages]:
    """Load image ``index``, or the next that can be decoded; return it, its index, and what was skipped."""
    skipped: SkippedImages = []
    for candidate in range(index, index + min(len(source), MAX_SKIPPED)):
        candidate %= len(source)
        try:
            return source.load(candidate), candidate, skipped
        except BadImageError as bad:
            skipped.append((candidate, bad.reason))
    raise UndecodableError(skipped)


class UndecodableError(DataError):
    """Not one of many samples in a row can be decoded; ``skipped`` are their indices and reasons."""

    def __init__(self, skipped: SkippedImages) -> None:
        super().__init__(
            f"{len(skipped)} images in a row cannot be decoded, the first because: {skipped[0][1]}.",
            "Check that the files are images.",
        )
        self.skipped = skipped

    def __reduce__(self) -> Any:
        return type(self), (self.skipped,)
