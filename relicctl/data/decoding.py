"""Decoding of image files into pixels (RGB, uint8, upright), and the handling of those that cannot be decoded."""

from __future__ import annotations

import itertools
import struct
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from io import BytesIO
from typing import Any, Protocol, TypeVar

import numpy as np

# Importing a plugin registers its format; Pillow would otherwise load every plugin it has to find these.
from PIL import Image, Jpeg2KImagePlugin, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

from relicctl.errors import DataError

HEIF_EXTENSIONS = {".heic", ".heif", ".hif"}
_EXTENSIONS = {  # of the formats that Pillow always has; more are added below
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"),
}
with suppress(ImportError):  # Pillow before 11.3 has no AVIF, and may be built without it
    from PIL import AvifImagePlugin

    if AvifImagePlugin.SUPPORTED:
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # data workers are as many as cores
        _EXTENSIONS["AVIF"] = (".avif", ".avifs")
with suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
    pillow_heif.options.DECODE_THREADS = 1
    _EXTENSIONS["HEIF"] = tuple(sorted(HEIF_EXTENSIONS))
IMAGE_FORMATS = tuple(_EXTENSIONS)  # recognised by content, whatever a file's name says
IMAGE_EXTENSIONS = tuple(itertools.chain(*_EXTENSIONS.values()))
USUAL_EXTENSIONS = tuple(extensions[0] for extensions in _EXTENSIONS.values())
MIN_ALLOWED = 3  # undecodable images that stop no run, however few images there are
MAX_SKIPPED = 1000  # samples tried in the place of one that cannot be decoded
MAX_PIXELS = 178_956_970  # 512 MiB of RGB; a header that claims more is treated as a decompression bomb
WHITE_16 = 65535  # the largest value of 16 bits
Decoded = TypeVar("Decoded")
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
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_PNG_TEXTS_WITH_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_OTHER_ORDER = {"B": "L", "L": "B", "N": {"little": "B", "big": "L"}[sys.byteorder]}  # of bytes in Pillow's raw modes
_SWAPPED_RAWMODES = {
    f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA") for order, other in _OTHER_ORDER.items()
}


class BadImageError(Exception):
    """One sample cannot be read or decoded, for ``reason``; the run continues without it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Decoder:
    """Decodes the files of a data set as ``decode_rgb`` does with these settings."""

    white_point: float | None = None
    max_pixels: int = MAX_PIXELS
    keep_alpha: bool = False

    def __call__(self, data: bytes) -> np.ndarray:
        return decode_rgb(data, keep_alpha=self.keep_alpha, white_point=self.white_point, max_pixels=self.max_pixels)


def decode_rgb(
    data: bytes, *, keep_alpha: bool = False, white_point: float | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode the (first) image in ``data`` into uint8 ``[H, W, 3]``, contiguous and writable, as ``convert_to_rgb``.

    Raises BadImageError for anything but a complete image of IMAGE_FORMATS with at most ``max_pixels``.
    """
    try:
        convert = partial(convert_to_rgb, keep_alpha=keep_alpha, white_point=white_point)
        return decode_image(data, convert, max_pixels=max_pixels)
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("no image in a known format") from None
    except Exception as error:  # on damaged files Pillow's plugins raise almost anything
        raise BadImageError(f"{error}" or type(error).__name__) from error


def convert_to_rgb(image: Image.Image, *, keep_alpha: bool = False, white_point: float | None = None) -> np.ndarray:
    """Convert an image into uint8 ``[H, W, 3]``, upright by its EXIF orientation.

    With ``keep_alpha`` an image with transparency becomes ``[H, W, 4]``, its alpha last. Transparent pixels are
    composited on white. Values of more than 8 bits are scaled to 8 so that ``white_point`` becomes 255 (None: the
    largest of their type, or the smallest usual one), palettes are resolved, CMYK is converted without its colour
    profile.
    """
    channels = _read_16_bit_channels(image) if white_point is not None else None
    image.load()
    turn = _ORIENTATION_TRANSPOSES.get(_read_orientation(image))
    if channels is not None and white_point is not None:
        image = Image.fromarray(
            np.dstack([_scale_to_uint8(channels[..., :3], white_point), (channels[..., 3:] >> 8).astype(np.uint8)])
        )
    rgb = _to_rgb(image, white_point)
    if keep_alpha and image.has_transparency_data:
        rgb.putalpha(image.convert("RGBA").getchannel("A"))
    return np.array(rgb if turn is None else rgb.transpose(turn))


def read_values(image: Image.Image) -> np.ndarray:
    """Return the values that an image stores, upright: of a palette the indices, not its colours."""
    maximum = next((tile.args[-1] for tile in getattr(image, "tile", []) if image.format == "PPM"), None)
    image.load()
    turn = _ORIENTATION_TRANSPOSES.get(_read_orientation(image))
    values = np.array(image if turn is None else image.transpose(turn))
    if isinstance(maximum, int):  # Pillow has scaled what the file calls its largest value to that of the mode
        values = np.rint(values * (maximum / (WHITE_16 if image.mode == "I" else 255))).astype(values.dtype)
    return values


def decode_image(
    data: bytes,
    convert: Callable[[Image.Image], Decoded],
    *,
    formats: tuple[str, ...] = IMAGE_FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Decoded:
    """Open an image file by its header, and return what ``convert`` makes of it.

    Raises BadImageError for more than ``max_pixels``; for a file that is damaged or no image almost anything.
    """
    try:
        return convert(_open_image(data, formats, max_pixels))
    except ValueError:  # texts or a profile longer than Pillow reads are no reason to do without the picture
        shorter = _drop_png_texts(data)
        if len(shorter) == len(data):
            raise
        return convert(_open_image(shorter, formats, max_pixels))


def read_value_range(image: Image.Image) -> tuple[float, float] | None:
    """Return the largest value in an image of more than 8 bits, and the value of white; None for other images."""
    if _is_wide_grey(image):
        values = np.asarray(image)
        return float(np.nan_to_num(values, posinf=0, neginf=0).max()), _find_white_point(image, values)
    channels = _read_16_bit_channels(image)
    return None if channels is None else (float(channels[..., :3].max()), WHITE_16)


def read_upright_size(image: Image.Image) -> tuple[int, int]:
    """Return height and width of the upright image from its header."""
    # Pillow gives the upright size of a TIFF whose own tag says how it is turned
    stored = not isinstance(image, TiffImagePlugin.TiffImageFile) or image.tag_v2.get(_ORIENTATION_TAG, 1) < 5
    return image.size if stored and _read_orientation(image) >= 5 else (image.height, image.width)


def _open_image(data: bytes, formats: tuple[str, ...], max_pixels: int) -> Image.Image:
    _silence_pillow()
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit for the whole process; raised, never lowered
    try:
        image = Image.open(BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise BadImageError(f"more than {max_pixels} pixels (data.decoding.max_pixels)") from None
    if not 0 < image.width * image.height <= max_pixels:
        size = f"{image.width} x {image.height} pixels"
        raise BadImageError(f"{size}, outside 1 to {max_pixels} (data.decoding.max_pixels)")
    return image


@cache
def _silence_pillow() -> None:
    """Silence Pillow's warnings, in this process: what matters of them is that an image can be decoded, or not.

    They are about metadata, and about sizes within our own limit; every data worker would print them.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _drop_png_texts(data: bytes) -> bytes:
    """Return a PNG without its texts and colour profile, except those that may tell its orientation."""
    if not data.startswith(_PNG_SIGNATURE):
        return data
    kept, place = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        chunk = data[place : place + 12 + length]
        if kind not in _PNG_TEXTS or chunk[8:].startswith(_PNG_TEXTS_WITH_ORIENTATION):
            kept.append(chunk)
        place += 12 + length
    return b"".join(kept)


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that still has to be applied: after its header is read, or its pixels too."""
    if _EXIF_KEYS.isdisjoint(image.info):  # Pillow turns a TIFF by itself, and its size with it
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata beside sound pixels
        return 1


def _to_rgb(image: Image.Image, white_point: float | None) -> Image.Image:
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    if _is_wide_grey(image):
        values = np.asarray(image)
        image = Image.fromarray(_scale_to_uint8(values, white_point or _find_white_point(image, values)))
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_wide_grey(image: Image.Image) -> bool:
    """Return whether it is a grey image of more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def _find_white_point(image: Image.Image, values: np.ndarray) -> float:
    """Return the value of white in a grey image of more than 8 bits, whose ``values`` are ``[H, W]``.

    Files of 32-bit integers or floats do not say what white is: it is taken to be the smallest of 1 (floats
    only), 255, 65535 and the values' maximum that no value exceeds.
    """
    if image.mode != "F" and (image.mode != "I" or image.format in ("PNG", "PPM")):
        return WHITE_16
    top = float(np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0).max())
    usual = (1, 255, WHITE_16) if values.dtype.kind == "f" else (255, WHITE_16)
    return next((white for white in usual if top <= white), top)


def _scale_to_uint8(values: np.ndarray, white: float) -> np.ndarray:
    """Scale linearly so that ``white`` becomes 255, and what is brighter too; NaN is black."""
    finite = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    return np.rint(finite.clip(0, white) * (255 / white)).astype(np.uint8)


def _read_16_bit_channels(image: Image.Image) -> np.ndarray | None:
    """Return uint16 ``[H, W, C]`` of a file with 16 bits per colour, before its pixels are loaded; None of others.

    Pillow keeps the high byte of every value. The low bytes are what it keeps of the same file with the bytes said to
    be in the other order.
    """
    tiles = getattr(image, "tile", [])
    rawmodes = [tile.args if isinstance(tile.args, str) else (tile.args or [None])[0] for tile in tiles]
    if not rawmodes or not all(rawmode in _SWAPPED_RAWMODES for rawmode in rawmodes):
        return None
    other: Any = Image.open(image.fp, formats=[image.format])  # type: ignore[attr-defined, list-item]
    other.tile = [
        tile._replace(args=swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:]))
        for tile, swapped in zip(tiles, map(_SWAPPED_RAWMODES.get, rawmodes), strict=True)
    ]
    return np.asarray(np.asarray(image).astype(np.uint16) << 8 | np.asarray(other))


class ImageSource(Protocol):
    """What images are loaded from: a data set, or images in memory."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> np.ndarray: ...


@dataclass
class BadImages:
    """Samples that could not be decoded. Raises DataError when they are too many of ``size``.

    Up to MIN_ALLOWED are never too many, so that one bad file among a few photos stops no run, unless ``limit`` is 0.
    """

    size: int
    limit: float
    report: Callable[[str, str], None] = lambda name, reason: None
    listed_in: str = ""  # the file that lists them, for the message
    seen: set[str] = field(default_factory=set)

    def add(self, name: str, reason: str) -> None:
        name = name.encode("unicode_escape").decode("ascii") if not name.isprintable() else name
        if name in self.seen:
            return
        self.seen.add(name)
        self.report(name, reason)
        if len(self.seen) > max(self.limit * self.size, MIN_ALLOWED if self.limit else 0):
            ratio = len(self.seen) / self.size
            enough = next((fraction for fraction in (0.02, 0.05, 0.1, 0.2, 0.5) if fraction >= 1.5 * ratio), 1)
            files = f"the files listed in {self.listed_in}" if self.listed_in else "the files"
            raise DataError(
                f"{len(self.seen)} of {self.size} images cannot be decoded, more than the {self.limit:.1%} allowed; "
                f"the latest is {name} ({reason}).",
                f"Repair or remove {files}, or accept them: --set data.max_corrupt_fraction={enough}.",
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
