"""Images with masks of class indices: VOC-style files, plain folders, or the demo data.

    VOCdevkit/VOC2012            JPEGImages, SegmentationClass, ImageSets/Segmentation/{train,val}.txt
    streets.zip                  {train,val}/images and {train,val}/masks, of the same names but for their suffixes
    streets-{split}.zip          images and masks in each
    shapes[:key=value,...]       the embedded demo data: 0 is the background, then the ten kinds of objects

Pixels of value 255 are ignored.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from relicctl.config.transfer import SegmentationDataConfig
from relicctl.console import Console
from relicctl.data.datasets.archives import FileReader
from relicctl.data.datasets.base import DatasetSplit, ImageDataset
from relicctl.data.datasets.open import join_spec, open_dataset, parse_first_words, summarize_names
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.datasets.voc import VOC_CLASSES
from relicctl.data.decoding import IMAGE_FORMATS, MAX_PIXELS, BadImageError
from relicctl.errors import DataError
from relicctl.evaluation.dense.data import DenseDataset
from relicctl.evaluation.labelled_data import SPLIT_FOLDERS

IGNORE_INDEX = 255
LOSSLESS_FORMATS = tuple(name for name in IMAGE_FORMATS if name not in ("JPEG", "WEBP"))
EXIF_ORIENTATION = 0x0112
SEGMENTATION_LAYOUTS = (
    "VOC-style data with ImageSets/Segmentation/train.txt and val.txt, or folders train and val with images and masks "
    "in each"
)


class ShapesSegmentationDataset(DenseDataset):
    def __init__(self, source: ShapesDataset) -> None:
        self.source: ShapesDataset = source
        self.classes = ("background", *source.classes)

    def load_target(self, index: int) -> np.ndarray:
        return self.source.load_mask(index) * np.uint8(self.source.labels[index] + 1)


class SegmentationDataset(DenseDataset):
    """``masks``: one per image, in the images' order."""

    def __init__(self, source: ImageDataset, masks: ImageDataset, classes: tuple[str, ...]) -> None:
        self.source, self.masks, self.classes = source, masks, classes

    def load_target(self, index: int) -> np.ndarray:
        """uint8 ``[H, W]``."""
        data = self.masks.read(index)
        assert isinstance(data, bytes)
        return decode_mask(data, self.masks.get_name(index))

    def compute_fingerprint(self) -> str:
        fingerprints = f"{self.source.compute_fingerprint()} {self.masks.compute_fingerprint()}"
        return hashlib.sha256(fingerprints.encode()).hexdigest()


def open_segmentation_data(
    name: str, spec: str, config: SegmentationDataConfig, console: Console
) -> tuple[DenseDataset, DenseDataset]:
    """Open and check the images to train on and those to test on. Raises DataError."""
    if spec.partition(":")[0] == "shapes":
        shapes_train, shapes_val = (ShapesDataset.from_spec(spec, part) for part in ("train", "val"))
        return ShapesSegmentationDataset(shapes_train), ShapesSegmentationDataset(shapes_val)
    train, voc = _open_mask_split(name, spec, "train", config)
    val, _ = _open_mask_split(name, spec, "val", config)
    number = config.classes.get(name) or (len(VOC_CLASSES) + 1 if voc else None)
    console.info(f"{name}: checking {len(train) + len(val)} masks")
    largest = _check_mask_files(name, train, number)
    if number is None:
        number = largest + 1
        console.info(f"{name}: {number} classes, as many as the masks of train have (data.classes)")
    _check_mask_files(name, val, number)
    if number < 2:
        raise DataError(f"{name} has only one class in its masks.", "Give masks of two classes or more.")
    classes = ("background", *VOC_CLASSES) if voc and number == len(VOC_CLASSES) + 1 else tuple(map(str, range(number)))
    return SegmentationDataset(train.source, train.masks, classes), SegmentationDataset(val.source, val.masks, classes)


def decode_mask(data: bytes, name: str) -> np.ndarray:
    """Decode a mask to class indices, uint8 ``[H, W]``: the values of a palette or grey image. Raises DataError."""
    try:
        image = Image.open(BytesIO(data), formats=LOSSLESS_FORMATS)
        if not 0 < image.width * image.height <= MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        values = np.asarray(image)
    except Exception as reason:  # on damaged files Pillow's plugins raise almost anything
        what = f"The mask {name} cannot be read ({reason}).".replace("<_io.BytesIO object", "<file")
        raise DataError(what, "Give a PNG of class indices; JPEG would blur them.") from None
    if values.ndim != 2:
        what = f"The mask {name} is an image in {image.mode}, not one of class indices."
        raise DataError(what, "Save it as a palette or grey PNG whose values are the classes.")
    if values.min() < 0 or values.max() > IGNORE_INDEX:
        raise DataError(f"The mask {name} has the class index {values.max()}.", "Indices go from 0 to 254.")
    return values.astype(np.uint8)


def _open_mask_split(
    name: str, spec: str, part: DatasetSplit, config: SegmentationDataConfig
) -> tuple[SegmentationDataset, bool]:
    """Open one split; return also whether it is VOC-style."""
    if "{split}" not in spec:
        chosen = config.voc_train if part == "train" else config.voc_val
        listed = FileReader(spec).read(f"ImageSets/Segmentation/{chosen}.txt")
        if listed is not None:
            images, masks = (open_dataset(join_spec(spec, folder)) for folder in ("JPEGImages", config.voc_masks))
            return _pair_masks(name, images, masks, parse_first_words(listed)), True
    for word in SPLIT_FOLDERS[part]:
        place = spec.replace("{split}", word) if "{split}" in spec else join_spec(spec, word)
        try:
            images = open_dataset(join_spec(place, "images"))
        except DataError:
            continue
        return _pair_masks(name, images, open_dataset(join_spec(place, "masks")), None), False
    raise DataError(f"{name} has no {part} split in {spec}.", f"Give {SEGMENTATION_LAYOUTS}.")


def _pair_masks(name: str, images: ImageDataset, masks: ImageDataset, stems: list[str] | None) -> SegmentationDataset:
    """Pair each image of ``stems``, or every image, with its mask."""
    image_rows, mask_rows = (
        {str(PurePosixPath(s.get_name(row)).with_suffix("")): row for row in range(len(s))} for s in (images, masks)
    )
    stems = list(image_rows) if stems is None else stems
    if not stems:
        raise DataError(f"{name} has an empty list of images.", "Write one image name per line.")
    for kind, rows in (("image", image_rows), ("mask", mask_rows)):
        missing = [stem for stem in stems if stem not in rows]
        if missing:
            what = f"{name} lacks the {kind} of {summarize_names(missing)}, of {len(stems)} in {images.spec}."
            raise DataError(what, "Give images and masks the same names but for their suffixes.")
    return SegmentationDataset(
        images.select([image_rows[stem] for stem in stems]), masks.select([mask_rows[stem] for stem in stems]), ()
    )


def _check_mask_files(name: str, samples: SegmentationDataset, classes: int | None) -> int:
    """Return the largest index. Raises DataError for masks of another size than their image, or with other classes."""

    def get_mask_info(index: int) -> tuple[int, tuple[int, int], tuple[int, int]]:
        mask = samples.load_target(index)
        largest = int(mask.max(initial=0, where=mask != IGNORE_INDEX))
        return largest, mask.shape, _read_image_size(samples, index) or mask.shape

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        infos = list(pool.map(get_mask_info, range(len(samples))))
    names = samples.masks.get_name
    odd = [f"{names(i)}: {m[1]} x {m[0]}, image {s[1]} x {s[0]}" for i, (_, m, s) in enumerate(infos) if m != s]
    if odd:
        what = f"{name} has masks of another size than their image: {summarize_names(odd)}."
        raise DataError(what, "Give one index for every pixel.")
    beyond = [f"{names(i)} with {largest}" for i, (largest, _, _) in enumerate(infos) if classes and largest >= classes]
    if beyond:
        what = f"{name} has masks with a class index beyond its {classes} classes: {summarize_names(beyond)}."
        raise DataError(what, f"Set data.classes={{{name}: N}}, or use 255 for pixels to ignore.")
    return max(largest for largest, _, _ in infos)


def _read_image_size(samples: DenseDataset, index: int) -> tuple[int, int] | None:
    """Return height and width of the upright image from its header; None if it cannot be read."""
    try:
        data = samples.source.read(index)
        assert isinstance(data, bytes)
        image = Image.open(BytesIO(data), formats=IMAGE_FORMATS)
        rotated = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
    except (BadImageError, OSError, ValueError, SyntaxError):
        return None  # training skips and lists it
    return image.size if rotated else (image.height, image.width)
