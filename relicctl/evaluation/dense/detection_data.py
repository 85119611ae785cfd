"""Images with boxes: from COCO's JSON, from VOC's XML, or from the demo data."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from PIL import Image

from relicctl.config.base import DecodingConfig
from relicctl.config.transfer import DetectionDataConfig
from relicctl.console import Console
from relicctl.data.datasets.archives import FileReader
from relicctl.data.datasets.base import DatasetSplit, ImageDataset, find_by_name
from relicctl.data.datasets.open import open_dataset, parse_first_words, summarize_names
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.datasets.specs import join_spec
from relicctl.data.datasets.splits import list_split_names
from relicctl.data.datasets.voc import BoxAnnotations, Boxes, read_voc
from relicctl.data.decoding import BadImageError
from relicctl.data.value_range import warn_unused_range
from relicctl.errors import DataError
from relicctl.evaluation.dense.data import DenseDataset, read_image_size

MIN_BOX_SIDE = 0.01  # pixels; smaller boxes vanish when images are resized
ANNOTATION_FILES = (
    "annotations/instances_{part}2017.json", "annotations/instances_{part}2014.json",
    "annotations/instances_{part}.json", "annotations/{part}.json", "{part}.json", "{part}/_annotations.coco.json",
)  # fmt: skip
IMAGE_FOLDERS = (
    "{part}2017", "{part}2014", "{part}", "images/{part}2017", "images/{part}2014", "images/{part}", "images", "",
)  # fmt: skip
DETECTION_LAYOUTS = (
    "a folder or archive with annotations/instances_train2017.json or train.json, the same of val, and the images; "
    "or VOC-style data"
)


def read_annotations(
    name: str, spec: str, part: DatasetSplit, config: DetectionDataConfig, classes: tuple[str, ...] | None,
    warn: Callable[[str], None],
) -> DetectionDataset:  # fmt: skip
    """Read one split. ``classes``: those of train, if this is another split. Raises DataError."""
    files = FileReader(spec)
    chosen = config.voc_train if part == "train" else config.voc_val
    stems = files.read(f"ImageSets/Main/{chosen}.txt")
    if stems is not None:
        source = open_dataset(join_spec(spec, "JPEGImages"), decoding=config.decoding, class_folders=False)
        annotations = read_voc(files, source, parse_first_words(stems), classes, spec)
    else:
        places = [(word, place.format(part=word)) for word in list_split_names(part) for place in ANNOTATION_FILES]
        read = ((word, place, files.read(place)) for word, place in places)
        word, place, content = next((r for r in read if r[2] is not None), ("", "", None))
        if content is None:
            raise DataError(f"{name} has no {part} split in {spec}.", f"Give {DETECTION_LAYOUTS}.")
        annotations = parse_coco(content, f"{place} in {spec}")
        source, stripped = _find_images(spec, word, posixpath.dirname(place), annotations.files, config.decoding)
        annotations = replace(annotations, files=stripped)
    rows = find_by_name([source.get_name(row) for row in range(len(source))], annotations.files)
    missing = [file for file, row in zip(annotations.files, rows, strict=True) if row < 0]
    if missing:
        what = f"{name} lacks images of {part}'s annotations: {summarize_names(missing)}, of {len(annotations.files)}."
        raise DataError(what, "Put the images where the annotations say, or in a folder of the split's name.")
    source, boxes = source.select(rows), annotations.boxes
    annotations = replace(annotations, sizes=_fill_sizes(annotations.sizes, source))
    if classes is not None and annotations.classes != classes:
        number = {known: label for label, known in enumerate(classes)}
        unknown = sorted({annotations.classes[label] for label in np.unique(boxes.labels)} - set(classes))
        if unknown:
            what = f"{name} has boxes in {part} of categories that are not in train: {summarize_names(unknown)}."
            raise DataError(what, "Give both the same categories.")
        labels = np.array([number.get(known, -1) for known in annotations.classes], dtype=np.int64)[boxes.labels]
        boxes = replace(boxes, labels=labels)
    annotations = replace(annotations, boxes=boxes, classes=classes or annotations.classes)
    return build_detection_dataset(name, source, annotations, config.max_corrupt_fraction, warn)


def parse_coco(content: bytes, where: str) -> BoxAnnotations:
    """Parse COCO's JSON; ``where`` names the file. Raises DataError for anything that is not in COCO's format."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as reason:
        raise DataError(f"{where} is not JSON ({reason}).", "Write or copy it again.") from None
    try:
        images, annotations, categories = tree["images"], tree["annotations"], tree["categories"]
        categories = sorted(categories, key=lambda category: category["id"])
        label = {category["id"]: number for number, category in enumerate(categories)}
        row = {image["id"]: number for number, image in enumerate(images)}
        files = [str(image["file_name"]).lstrip("/") for image in images]
        sides = [(image.get("height") or 0, image.get("width") or 0) for image in images]
        sizes = np.array(sides, dtype=np.int64).reshape(-1, 2)
        image_indices = np.array([row[a["image_id"]] for a in annotations], dtype=np.int64)
        labels = np.array([label[a["category_id"]] for a in annotations], dtype=np.int64)
        boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
        crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
        area = np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in annotations], dtype=np.float64)
        names = tuple(str(category["name"]) for category in categories)
        if len(row) < len(images) or len(label) < len(categories) or len(set(names)) < len(names):
            raise ValueError("ids or names of categories occur twice")
        if not np.isfinite(boxes).all() or not np.isfinite(area).all():
            raise ValueError("a box is not finite")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        problem = f"nothing has the key or id {error}" if isinstance(error, KeyError) else error
        raise DataError(
            f"{where} is not in COCO's format: {problem}.",
            "Give images with id, file_name, width and height; annotations with image_id, category_id and bbox; "
            "and categories with id and name.",
        ) from None
    boxes[:, 2:] += boxes[:, :2]
    return BoxAnnotations(files, sizes, image_indices, Boxes(boxes, labels, crowd, area), names)


def _fill_sizes(sizes: np.ndarray, source: ImageDataset) -> np.ndarray:
    """Return ``sizes``, those of 0 x 0 replaced by what the images' headers say."""
    filled = sizes.copy()
    for row in np.flatnonzero((sizes <= 0).any(1)).tolist():
        filled[row] = read_image_size(source, row) or np.iinfo(np.int32).max  # a bad image is skipped when loaded
    return filled


def _find_images(
    spec: str, word: str, beside: str, files: list[str], decoding: DecodingConfig
) -> tuple[ImageDataset, list[str]]:
    """Return the data set of the listed images, and their names in it. Raises DataError if the first is not found."""
    if not files:
        raise DataError(f"{spec} lists no image in {word}.", "Give annotations with images.")
    shared = posixpath.commonpath([posixpath.dirname(file) for file in files])  # "" unless all are in one folder
    stripped = [posixpath.relpath(file, shared) if shared else file for file in files]
    for folder in dict.fromkeys([*(f.format(part=word) for f in IMAGE_FOLDERS), beside]):
        try:
            place = join_spec(spec, posixpath.join(folder, shared))
            source = open_dataset(place, decoding=decoding, class_folders=False)
        except DataError:
            continue
        if find_by_name([source.get_name(row) for row in range(len(source))], stripped[:1]) != [-1]:
            return source, stripped
    what = f"{spec} has no image {files[0]}, which the annotations of {word} name."
    raise DataError(what, f"Put the images into a folder {word} or images, or where the annotations say.")


class DetectionDataset(DenseDataset):
    """``boxes`` of all images, those of image i from ``starts[i]`` to ``starts[i + 1]``; ``sizes`` int64 ``[N, 2]``."""

    def __init__(
        self, source: ImageDataset, classes: tuple[str, ...], boxes: Boxes, starts: np.ndarray, sizes: np.ndarray
    ) -> None:
        self.source, self.classes, self.boxes, self.starts, self.sizes = source, classes, boxes, starts, sizes

    def load(self, index: int) -> np.ndarray:
        image = super().load(index)
        height, width = self.sizes[index].tolist()
        if image.shape[:2] != (height, width):
            raise BadImageError(f"is {image.shape[1]} x {image.shape[0]}, but its boxes are of {width} x {height}")
        return image

    def load_target(self, index: int) -> Boxes:
        return self.boxes[self.starts[index] : self.starts[index + 1]]

    def compute_fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.source.compute_fingerprint()} {self.classes}".encode())
        for array in (self.boxes.corners, self.boxes.labels, self.boxes.ignored, self.starts, self.sizes):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def select_with_boxes(self) -> DetectionDataset:
        """Return the images that have a box to train on."""
        image_indices = np.repeat(np.arange(len(self)), np.diff(self.starts))
        rows = np.unique(image_indices[~self.boxes.ignored])
        kept = np.isin(image_indices, rows)
        starts = np.append(np.searchsorted(image_indices[kept], rows), kept.sum())
        return DetectionDataset(self.source.select(rows), self.classes, self.boxes[kept], starts, self.sizes[rows])


def build_detection_dataset(
    name: str, source: ImageDataset, annotations: BoxAnnotations, max_bad: float, warn: Callable[[str], None]
) -> DetectionDataset:
    """Clip boxes to their images, and put them in the images' order.

    Boxes of no size, or outside their image, are left out; DataError when they are more than ``max_bad`` of all.
    """
    sizes, image_indices, boxes = annotations.sizes, annotations.image_indices, annotations.boxes
    limits = sizes[image_indices][:, [1, 0, 1, 0]] if len(image_indices) else np.empty((0, 4))
    corners = np.clip(boxes.corners, 0, limits).astype(np.float32)
    usable = (corners[:, 2:] - corners[:, :2]).min(1, initial=np.inf) > MIN_BOX_SIDE
    if not usable.all():
        first = int(np.flatnonzero(~usable)[0])
        what = (
            f"{name}: {(~usable).sum()} of {len(usable)} boxes have no size or lie outside their image, "
            f"{boxes.corners[first].round(1).tolist()} of {source.get_name(int(image_indices[first]))} among them"
        )
        if (~usable).mean() > max_bad:
            raise DataError(
                f"{what}.", "Fix the boxes ([left, top, width, height] in pixels), or raise data.max_corrupt_fraction."
            )
        warn(f"{what}; they are left out")
    order = np.flatnonzero(usable)[np.argsort(image_indices[usable], kind="stable")]
    starts = np.searchsorted(image_indices[order], np.arange(len(source) + 1))
    usable_boxes = Boxes(corners[order], boxes.labels[order], boxes.ignored[order], boxes.area[order])
    return DetectionDataset(source, annotations.classes, usable_boxes, starts, sizes)


def open_detection_data(
    name: str, spec: str, config: DetectionDataConfig, console: Console
) -> tuple[DetectionDataset, DetectionDataset]:
    """Open the images with boxes to train on, and the images to test on. Raises DataError."""
    if spec.partition(":")[0] == "shapes":
        shapes = ShapesDataset.from_spec(spec, "train", console.warn), ShapesDataset.from_spec(spec, "val")
        train, val = map(build_shapes_detection, shapes)
    else:
        train = read_annotations(name, spec, "train", config, None, console.warn)
        val = read_annotations(name, spec, "val", config, train.classes, console.warn)
    warn_unused_range(train.source, console.warn)
    train = train.select_with_boxes()
    for part, samples in (("train", train), ("val", val)):
        if not len(samples) or samples.boxes.ignored.all():
            raise DataError(f"{name} has no box in {part}.", "Give annotations with boxes.")
    return train, val


def build_shapes_detection(source: ShapesDataset) -> DetectionDataset:
    """Return the demo data with the bounding box of every object."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda index: Image.fromarray(source.load_mask(index)).getbbox(), range(len(source))))
    image_indices = np.array([index for index, corners in enumerate(found) if corners is not None], dtype=np.int64)
    corners = np.array([c for c in found if c is not None], dtype=np.float32).reshape(-1, 4)
    area = (corners[:, 2:] - corners[:, :2]).prod(1).astype(np.float64)
    boxes = Boxes(corners, source.labels[image_indices], np.zeros(len(image_indices), bool), area)
    starts = np.searchsorted(image_indices, np.arange(len(source) + 1))
    sizes = np.full((len(source), 2), source.settings.size)
    return DetectionDataset(source, source.classes, boxes, starts, sizes)
