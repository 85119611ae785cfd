"""Images with masks of class indices, from files as VOC has them, from plain folders, or from the demo data.

    VOCdevkit/VOC2012            JPEGImages, SegmentationClass, ImageSets/Segmentation/{train,val}.txt
    streets.zip                  {train,val}/images and {train,val}/masks: masks of the same names but their endings
    streets-{split}.zip          images and masks in each
    shapes[:key=value,...]       the embedded demo data: 0 is the background, then the ten kinds of objects

255 in a mask is nothing that counts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from relicctl.config.dense import SegmentationData
from relicctl.data.images import FORMATS, MAX_PIXELS, BadImage
from relicctl.data.shapes import ShapesSource
from relicctl.data.sources import Source, open_source
from relicctl.errors import DataError
from relicctl.evaluation.dense.boxes import VOC
from relicctl.evaluation.dense.samples import NAMES, Files, Part, Samples, inside, lines, no_split, shown

IGNORED = 255
LOSSLESS = tuple(name for name in FORMATS if name not in ("JPEG", "WEBP"))
ORIENTATION = 0x0112
LAYOUTS = (
    "VOC-style data with ImageSets/Segmentation/train.txt and val.txt, or folders train and val with images and masks "
    "in each"
)


class ShapesMasks(Samples):
    def __init__(self, source: ShapesSource) -> None:
        self.source: ShapesSource = source
        self.classes = ("background", *source.classes)

    def target(self, index: int) -> np.ndarray:
        return self.source.mask(index) * np.uint8(self.source.labels[index] + 1)

    def fingerprint(self) -> str:
        return self.source.fingerprint()


class FileMasks(Samples):
    """``masks``: one of each image, in the images' order."""

    def __init__(self, source: Source, masks: Source, classes: tuple[str, ...]) -> None:
        self.source, self.masks, self.classes = source, masks, classes

    def target(self, index: int) -> np.ndarray:
        """uint8 ``[H, W]``."""
        data = self.masks.read(index)
        assert isinstance(data, bytes)
        return decode_mask(data, self.masks.key(index))

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.source.fingerprint()} {self.masks.fingerprint()}".encode()).hexdigest()


def open_masked(name: str, spec: str, config: SegmentationData, note: Callable[[str], None]) -> tuple[Samples, Samples]:
    """The images to train on and those to test on, checked. Raises DataError."""
    if spec.partition(":")[0] == "shapes":
        return ShapesMasks(ShapesSource.from_spec(spec, "train")), ShapesMasks(ShapesSource.from_spec(spec, "val"))
    train, voc = _open(name, spec, "train", config)
    val, _ = _open(name, spec, "val", config)
    number = config.classes.get(name) or (len(VOC) + 1 if voc else None)
    note(f"{name}: checking {len(train) + len(val)} masks")
    largest = _check(name, train, number)
    if number is None:
        number = largest + 1
        note(f"{name}: {number} classes, as many as the masks of train have (data.classes)")
    _check(name, val, number)
    if number < 2:
        raise DataError(f"{name} has only one class in its masks.", "Give masks of two classes or more.")
    classes = ("background", *VOC) if voc and number == len(VOC) + 1 else tuple(map(str, range(number)))
    return FileMasks(train.source, train.masks, classes), FileMasks(val.source, val.masks, classes)


def decode_mask(data: bytes, name: str) -> np.ndarray:
    """uint8 ``[H, W]`` of class indices: a palette's or grey picture's numbers as they are. Raises DataError."""
    try:
        image = Image.open(BytesIO(data), formats=LOSSLESS)
        if not 0 < image.width * image.height <= MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        values = np.asarray(image)
    except Exception as reason:  # on damaged files Pillow's plugins raise almost anything
        raise DataError(
            f"The mask {name} cannot be read ({reason}).".replace("<_io.BytesIO object", "<file"),
            "Give a PNG of class indices; JPEG would blur them.",
        ) from None
    if values.ndim != 2:
        raise DataError(
            f"The mask {name} is a picture in {image.mode}, not one of class indices.",
            "Save it as a palette or grey PNG whose numbers are the classes.",
        )
    if values.min() < 0 or values.max() > IGNORED:
        raise DataError(f"The mask {name} has the class index {values.max()}.", "Indices go from 0 to 254.")
    return values.astype(np.uint8)


def _open(name: str, spec: str, part: Part, config: SegmentationData) -> tuple[FileMasks, bool]:
    """One split, and whether it is laid out as VOC is."""
    if "{split}" not in spec:
        chosen = config.voc_train if part == "train" else config.voc_val
        listed = Files(spec).read(f"ImageSets/Segmentation/{chosen}.txt")
        if listed is not None:
            images, masks = (open_source(inside(spec, folder)) for folder in ("JPEGImages", config.voc_masks))
            return _paired(name, images, masks, lines(listed)), True
    for word in NAMES[part]:
        place = spec.replace("{split}", word) if "{split}" in spec else inside(spec, word)
        try:
            images = open_source(inside(place, "images"))
        except DataError:
            continue
        return _paired(name, images, open_source(inside(place, "masks")), None), False
    raise no_split(name, spec, part, LAYOUTS)


def _paired(name: str, images: Source, masks: Source, stems: list[str] | None) -> FileMasks:
    """Each image that ``stems`` name, or each there is, with its mask."""
    image_rows, mask_rows = (
        {str(PurePosixPath(s.key(row)).with_suffix("")): row for row in range(len(s))} for s in (images, masks)
    )
    stems = list(image_rows) if stems is None else stems
    if not stems:
        raise DataError(f"{name} has an empty list of images.", "Name one image a line.")
    for what, rows in (("image", image_rows), ("mask", mask_rows)):
        missing = [stem for stem in stems if stem not in rows]
        if missing:
            raise DataError(
                f"{name} lacks the {what} of {shown(missing)}, of {len(stems)} in {images.spec}.",
                "Give images and masks the same names but for their endings.",
            )
    return FileMasks(
        images.select([image_rows[stem] for stem in stems]), masks.select([mask_rows[stem] for stem in stems]), ()
    )


def _check(name: str, samples: FileMasks, classes: int | None) -> int:
    """The largest index. Raises DataError for masks of another size than their image or with other classes."""

    def facts(index: int) -> tuple[int, tuple[int, int], tuple[int, int]]:
        mask = samples.target(index)
        return int(mask.max(initial=0, where=mask != IGNORED)), mask.shape, _image_size(samples, index) or mask.shape

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(facts, range(len(samples))))
    keys = samples.masks.key
    odd = [f"{keys(i)}: {m[1]} x {m[0]}, image {s[1]} x {s[0]}" for i, (_, m, s) in enumerate(found) if m != s]
    if odd:
        raise DataError(
            f"{name} has masks of another size than their image: {shown(odd)}.", "Give one index for every pixel."
        )
    beyond = [f"{keys(i)} with {largest}" for i, (largest, _, _) in enumerate(found) if classes and largest >= classes]
    if beyond:
        raise DataError(
            f"{name} has masks with a class index beyond its {classes} classes: {shown(beyond)}.",
            f"Set data.classes={{{name}: N}}, or use 255 for what does not count.",
        )
    return max(largest for largest, _, _ in found)


def _image_size(samples: Samples, index: int) -> tuple[int, int] | None:
    """Height and width of the image upright, from its header; None where it cannot be read."""
    try:
        data = samples.source.read(index)
        assert isinstance(data, bytes)
        image = Image.open(BytesIO(data), formats=FORMATS)
        turned = image.getexif().get(ORIENTATION, 1) >= 5
    except (BadImage, OSError, ValueError, SyntaxError):
        return None  # told, and left out, when it is trained on
    return image.size if turned else (image.height, image.width)
