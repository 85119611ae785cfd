"""Images with masks of class indices: VOC-style files, plain folders, or the demo data.

    VOCdevkit/VOC2012            JPEGImages, SegmentationClass, ImageSets/Segmentation/{train,val}.txt
    streets.zip                  {train,val}/images and {train,val}/masks, of the same names but for their suffixes
    streets-{split}.zip          images and masks in each
    shapes[:key=value,...]       the embedded demo data: 0 is the background, then the ten kinds of objects

Pixels of value 255 are ignored. ``data.mask_values`` maps other values to classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import PurePosixPath

import numpy as np

from relicctl.config.transfer import SegmentationDataConfig
from relicctl.console import Console
from relicctl.data.datasets.archives import FileReader
from relicctl.data.datasets.base import DatasetSplit, ImageDataset, find_by_name
from relicctl.data.datasets.open import open_dataset, parse_first_words, summarize_names
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.datasets.specs import join_spec
from relicctl.data.datasets.splits import list_split_names
from relicctl.data.datasets.voc import VOC_CLASSES
from relicctl.data.decoding import IMAGE_FORMATS, MAX_PIXELS, decode_image, read_values
from relicctl.data.value_range import warn_unused_range
from relicctl.errors import DataError
from relicctl.evaluation.dense.data import DenseDataset, read_image_size

IGNORE_INDEX = 255
LOSSLESS_FORMATS = tuple(name for name in IMAGE_FORMATS if name not in ("JPEG", "WEBP", "JPEG2000", "AVIF", "HEIF"))
MAX_MASK_VALUE = 65535  # of 16 bits
MIN_SHADES = 32  # values between 0 and 255 that are more likely a blurred edge than classes
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
    """``masks``: one per image, in the images' order. ``values``: the class of each value in them; None: the same."""

    def __init__(
        self, source: ImageDataset, masks: ImageDataset, classes: tuple[str, ...], values: dict[int, int] | None = None
    ) -> None:
        self.source, self.masks, self.classes, self.values = source, masks, classes, values

    def load_target(self, index: int) -> np.ndarray:
        """uint8 ``[H, W]``."""
        data = self.masks.read(index)
        assert isinstance(data, bytes)
        return decode_mask(data, self.masks.get_name(index), self.values, self.masks.decode.max_pixels)

    def compute_fingerprint(self) -> str:
        fingerprints = f"{self.source.compute_fingerprint()} {self.masks.compute_fingerprint()}"
        if self.values is not None:
            fingerprints += f" {sorted(self.values.items())}"
        return hashlib.sha256(fingerprints.encode()).hexdigest()


def open_segmentation_data(
    name: str, spec: str, config: SegmentationDataConfig, console: Console
) -> tuple[DenseDataset, DenseDataset]:
    """Open and check the images to train on and those to test on. Raises DataError."""
    if spec.partition(":")[0] == "shapes":
        shapes = ShapesDataset.from_spec(spec, "train", console.warn), ShapesDataset.from_spec(spec, "val")
        return ShapesSegmentationDataset(shapes[0]), ShapesSegmentationDataset(shapes[1])
    warn = cache(console.warn)  # of several splits once
    train, voc = _open_mask_split(name, spec, "train", config, warn)
    val, _ = _open_mask_split(name, spec, "val", config, warn)
    warn_unused_range(train.source, console.warn)
    given = config.classes.get(name)
    number = given or (len(VOC_CLASSES) + 1 if voc else None)
    console.info(f"{name}: checking {len(train) + len(val)} masks")
    pixels = _check_mask_files(name, train, number)
    if number is None:
        number = int(np.flatnonzero(pixels[:IGNORE_INDEX]).max(initial=0)) + 1
    pixels += _check_mask_files(name, val, number if number > 1 else None)
    _check_mask_values(name, pixels, train.values, None if given or voc else number, console)
    if number < 2:
        what = f"{name} has only one class in its masks of train."
        raise DataError(what, "Give masks of two classes or more; data.mask_values maps values to classes.")
    if not (given or voc):
        console.info(f"{name}: {number} classes, as many as the masks of train have (data.classes)")
    classes = ("background", *VOC_CLASSES) if voc and number == len(VOC_CLASSES) + 1 else tuple(map(str, range(number)))
    train.classes = val.classes = classes
    return train, val


def decode_mask(
    data: bytes, name: str, values: dict[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode a mask to class indices, uint8 ``[H, W]``: the values of a palette or grey image. Raises DataError.

    ``values``: the class of each value, the others being ignored; None: a value is its class.
    """
    try:
        stored = decode_image(data, read_values, formats=LOSSLESS_FORMATS, max_pixels=max_pixels)
    except Exception as reason:  # on damaged files Pillow's plugins raise almost anything
        what = f"The mask {name} cannot be read ({reason}).".replace("<_io.BytesIO object", "<file")
        raise DataError(what, "Give a PNG of class indices; JPEG would blur them.") from None
    if stored.ndim != 2:
        what = f"The mask {name} is an image of {stored.shape[2]} channels, not one of class indices."
        raise DataError(what, "Save it as a palette or grey PNG whose values are the classes.")
    largest = IGNORE_INDEX if values is None else MAX_MASK_VALUE
    if stored.min() < 0 or stored.max() > largest:
        what = f"The mask {name} has the class index {stored.max() if stored.min() >= 0 else stored.min()}."
        raise DataError(what, "Indices go from 0 to 254; data.mask_values maps values up to 65535 to them.")
    if values is None:
        return stored.astype(np.uint8)
    classes = np.full(MAX_MASK_VALUE + 1, IGNORE_INDEX, np.uint8)
    classes[list(values)] = list(values.values())
    return np.asarray(classes[stored.astype(np.uint16)])


def _check_mask_values(
    name: str, pixels: np.ndarray, values: dict[int, int] | None, inferred: int | None, console: Console
) -> None:
    """Recognise masks whose values are no class indices, most often 0 and 255 for background and object.

    ``pixels``: int64 ``[256]``, those of each class and of IGNORE_INDEX. ``inferred``: the number of classes, where it
    was counted from the masks. Raises DataError when no class is left to learn or shades are taken for classes.
    """
    ignored, classes = int(pixels[IGNORE_INDEX]), np.flatnonzero(pixels[:IGNORE_INDEX])
    objects = int(pixels[1:IGNORE_INDEX].sum())
    key, example = "data.mask_values", f"data.mask_values={{{name}: {{0: 0, 255: 1}}}}"
    if values is not None:
        if ignored:
            share = ignored / int(pixels.sum())
            console.info(f"{name}: {share:.1%} of the masks' pixels have values that {key} does not list: ignored")
        return
    if ignored and not objects:
        what = f"The masks of {name} hold only the values 0 and 255, and 255 means ignored: no class is left to learn."
        raise DataError(what, f"If 255 is a class, set {example}.")
    if inferred and len(classes) >= MIN_SHADES and ignored > max(objects / 4, pixels[1:IGNORE_INDEX].max()):
        what = f"The masks of {name} are mostly 0 and 255 with {len(classes) - 1} shades between, which are no classes."
        raise DataError(what, f"Set {example}, which ignores the shades; or data.classes if they are classes.")
    if ignored > objects:
        console.warn(
            f"{name}: more pixels of the masks have the value 255, which is ignored, than any value from 1 to 254; if "
            f"255 is a class, say so by {key}"
        )
    elif inferred and 2 * len(classes) < inferred:
        console.warn(
            f"{name}: the masks have {len(classes)} values, the largest of them {inferred - 1}, which makes {inferred} "
            f"classes; if the values are no class indices, map them by {key}"
        )


def _open_mask_split(
    name: str, spec: str, part: DatasetSplit, config: SegmentationDataConfig, warn: Callable[[str], None]
) -> tuple[SegmentationDataset, bool]:
    """Open one split; return also whether it is VOC-style."""
    open_images = partial(open_dataset, decoding=config.decoding, warn=warn, class_folders=False)
    values = config.mask_values.get(name)
    if "{split}" not in spec:
        chosen = config.voc_train if part == "train" else config.voc_val
        listed = FileReader(spec).read(f"ImageSets/Segmentation/{chosen}.txt")
        if listed is not None:
            images, masks = (open_images(join_spec(spec, folder)) for folder in ("JPEGImages", config.voc_masks))
            return _pair_masks(name, images, masks, parse_first_words(listed), values), True
    for word in list_split_names(part):
        place = spec.replace("{split}", word) if "{split}" in spec else join_spec(spec, word)
        try:
            images = open_images(join_spec(place, "images"))
        except DataError:
            continue
        return _pair_masks(name, images, open_images(join_spec(place, "masks")), None, values), False
    raise DataError(f"{name} has no {part} split in {spec}.", f"Give {SEGMENTATION_LAYOUTS}.")


def _pair_masks(
    name: str, images: ImageDataset, masks: ImageDataset, stems: list[str] | None, values: dict[int, int] | None
) -> SegmentationDataset:
    """Pair each image of ``stems``, or every image, with its mask."""
    image_stems, mask_stems = (
        [str(PurePosixPath(s.get_name(row)).with_suffix("")) for row in range(len(s))] for s in (images, masks)
    )
    stems = list(dict.fromkeys(image_stems)) if stems is None else stems
    if not stems:
        raise DataError(f"{name} has an empty list of images.", "Write one image name per line.")
    image_rows, mask_rows = find_by_name(image_stems, stems), find_by_name(mask_stems, stems)
    for kind, rows in (("image", image_rows), ("mask", mask_rows)):
        missing = [stem for stem, row in zip(stems, rows, strict=True) if row < 0]
        if missing:
            what = f"{name} lacks the {kind} of {summarize_names(missing)}, of {len(stems)} in {images.spec}."
            raise DataError(what, "Give images and masks the same names but for their suffixes.")
    return SegmentationDataset(images.select(image_rows), masks.select(mask_rows), (), values)


def _check_mask_files(name: str, samples: SegmentationDataset, classes: int | None) -> np.ndarray:
    """Return the number of pixels of each class and of IGNORE_INDEX, int64 ``[256]``.

    Raises DataError for masks of another size than their image, or with other classes.
    """

    def get_mask_info(index: int) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]:
        mask = samples.load_target(index)
        pixels = np.bincount(mask.ravel(), minlength=IGNORE_INDEX + 1)
        return pixels, mask.shape, read_image_size(samples.source, index) or mask.shape

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        infos = list(pool.map(get_mask_info, range(len(samples))))
    names = samples.masks.get_name
    odd = [f"{names(i)}: {m[1]} x {m[0]}, image {s[1]} x {s[0]}" for i, (_, m, s) in enumerate(infos) if m != s]
    if odd:
        what = f"{name} has masks of another size than their image: {summarize_names(odd)}."
        raise DataError(what, "Give one index for every pixel.")
    largest = [int(np.flatnonzero(pixels[:IGNORE_INDEX]).max(initial=0)) for pixels, _, _ in infos]
    beyond = [f"{names(i)} with {value}" for i, value in enumerate(largest) if classes and value >= classes]
    if beyond:
        what = f"{name} has masks with a class index beyond its {classes} classes: {summarize_names(beyond)}."
        fix = f"Set data.classes={{{name}: N}}, use 255 for pixels to ignore, or map values to classes by"
        raise DataError(what, f"{fix} data.mask_values={{{name}: {{0: 0, {max(largest)}: 1}}}}.")
    return np.asarray(np.sum([pixels for pixels, _, _ in infos], axis=0))
