"""Boxes from COCO's JSON and from VOC's XML."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from relicctl.config.dense import DetectionDataConfig
from relicctl.data.sources import ImageDataset, open_dataset
from relicctl.errors import DataError
from relicctl.evaluation.dense.boxes import VOC_CLASSES, Boxes, DetectionDataset, build_detection_dataset
from relicctl.evaluation.dense.samples import (
    SPLIT_FOLDERS,
    FileReader,
    SplitName,
    join_spec,
    make_missing_split_error,
    parse_first_words,
    summarize_names,
)

ANNOTATION_FILES = (
    "annotations/instances_{part}2017.json", "annotations/instances_{part}2014.json",
    "annotations/instances_{part}.json", "annotations/{part}.json", "{part}.json", "{part}/_annotations.coco.json",
)  # fmt: skip
IMAGE_FOLDERS = (
    "{part}2017", "{part}2014", "{part}", "images/{part}2017", "images/{part}2014", "images/{part}", "images", "",
)  # fmt: skip
DETECTION_LAYOUTS = (
    f"a folder or archive with {ANNOTATION_FILES[0].format(part='train')} or "
    f"{ANNOTATION_FILES[4].format(part='train')}, the same of val, "
    "and the images; or VOC-style data"
)


@dataclass(frozen=True)
class BoxAnnotations:
    """Images by file name with their height and width; boxes with the rows of their images."""

    files: list[str]
    sizes: np.ndarray
    image_indices: np.ndarray
    boxes: Boxes
    classes: tuple[str, ...]


def read_annotations(
    name: str, spec: str, part: SplitName, config: DetectionDataConfig, classes: tuple[str, ...] | None,
    warn: Callable[[str], None],
) -> DetectionDataset:  # fmt: skip
    """One split. ``classes``: those of train, where this is another one. Raises DataError."""
    files = FileReader(spec)
    chosen = config.voc_train if part == "train" else config.voc_val
    stems = files.read(f"ImageSets/Main/{chosen}.txt")
    if stems is not None:
        annotations = read_voc(files, parse_first_words(stems), classes, spec)
        source = open_dataset(join_spec(spec, "JPEGImages"))
    else:
        places = [(word, place.format(part=word)) for word in SPLIT_FOLDERS[part] for place in ANNOTATION_FILES]
        read = ((word, place, files.read(place)) for word, place in places)
        word, place, content = next((r for r in read if r[2] is not None), ("", "", None))
        if content is None:
            raise make_missing_split_error(name, spec, part, DETECTION_LAYOUTS)
        annotations = parse_coco(content, f"{place} in {spec}")
        source, stripped = _find_images(spec, word, posixpath.dirname(place), annotations.files)
        annotations = BoxAnnotations(
            stripped, annotations.sizes, annotations.image_indices, annotations.boxes, annotations.classes
        )
    rows = {source.get_name(row): row for row in range(len(source))}
    missing = [file for file in annotations.files if file not in rows]
    if missing:
        raise DataError(
            f"{name} lacks images that {part}'s annotations name: {summarize_names(missing)}, of "
            f"{len(annotations.files)}.",
            "Put the images where the annotations say, or in a folder of the split's name.",
        )
    source, boxes = source.select([rows[file] for file in annotations.files]), annotations.boxes
    if classes is not None and annotations.classes != classes:
        number = {known: label for label, known in enumerate(classes)}
        unknown = sorted({annotations.classes[label] for label in np.unique(boxes.labels)} - set(classes))
        if unknown:
            raise DataError(
                f"{name} has boxes in {part} of categories that train has not: {summarize_names(unknown)}.",
                "Give both the same categories.",
            )
        labels = np.array([number.get(known, -1) for known in annotations.classes], dtype=np.int64)[boxes.labels]
        boxes = Boxes(boxes.corners, labels, boxes.ignored, boxes.area)
    return build_detection_dataset(
        name,
        source,
        classes or annotations.classes,
        annotations.sizes,
        annotations.image_indices,
        boxes,
        config.max_bad,
        warn,
    )


def parse_coco(content: bytes, where: str) -> BoxAnnotations:
    """``where`` names the file. Raises DataError for anything that is not as COCO writes it."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as reason:
        raise DataError(f"{where} is no JSON ({reason}).", "Write or copy it again.") from None
    try:
        images, annotations, categories = tree["images"], tree["annotations"], tree["categories"]
        categories = sorted(categories, key=lambda category: category["id"])
        label = {category["id"]: number for number, category in enumerate(categories)}
        row = {image["id"]: number for number, image in enumerate(images)}
        files = [str(image["file_name"]).lstrip("/") for image in images]
        sizes = np.array([(image["height"], image["width"]) for image in images], dtype=np.int64).reshape(-1, 2)
        image_indices = np.array([row[a["image_id"]] for a in annotations], dtype=np.int64)
        labels = np.array([label[a["category_id"]] for a in annotations], dtype=np.int64)
        boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
        crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
        area = np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in annotations], dtype=np.float64)
        names = tuple(str(category["name"]) for category in categories)
    except KeyError as reason:
        raise _make_coco_error(where, f"nothing has the key or id {reason}") from None
    except (TypeError, ValueError, IndexError, AttributeError, OverflowError) as reason:
        raise _make_coco_error(where, str(reason)) from None
    if len(row) < len(images) or len(label) < len(categories) or len(set(names)) < len(names):
        raise _make_coco_error(where, "ids or names of categories occur twice")
    if not np.isfinite(boxes).all() or not np.isfinite(area).all():
        raise _make_coco_error(where, "a box is not finite")
    boxes[:, 2:] += boxes[:, :2]
    return BoxAnnotations(files, sizes, image_indices, Boxes(boxes, labels, crowd, area), names)


def read_voc(files: FileReader, stems: list[str], classes: tuple[str, ...] | None, spec: str) -> BoxAnnotations:
    """Boxes of ``Annotations/STEM.xml``, whose pixels count from 1; difficult ones are ignored."""
    sizes, image_indices, corners, names, ignored = [], [], [], [], []
    for image_index, stem in enumerate(stems):
        place = f"Annotations/{stem}.xml"
        content = files.read(place) if "/" not in stem else None
        if content is None:
            raise DataError(f"{spec} has no {place}.", "Give one for every image that is listed.")
        try:
            tree = ElementTree.fromstring(content)
            sizes.append([_parse_number(tree, f"size/{side}") for side in ("height", "width")])
            for thing in tree.iter("object"):
                image_indices.append(image_index)
                left, top, right, bottom = (
                    _parse_number(thing, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")
                )
                corners.append([left - 1, top - 1, right, bottom])
                names.append(thing.findtext("name", "").strip())
                ignored.append(thing.findtext("difficult", "0").strip() == "1")
        except (ElementTree.ParseError, ValueError) as reason:
            raise DataError(f"{place} in {spec} is not as VOC writes it ({reason}).", "Mend or remove it.") from None
    known = classes or (VOC_CLASSES if set(names) <= set(VOC_CLASSES) else tuple(sorted(set(names))))
    known += tuple(sorted(set(names) - set(known)))
    boxes = np.array(corners, dtype=np.float64).reshape(-1, 4)
    labels = np.array([known.index(name) for name in names], dtype=np.int64)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return BoxAnnotations(
        [f"{stem}.jpg" for stem in stems],
        np.array(sizes, dtype=np.int64).reshape(-1, 2),
        np.array(image_indices, dtype=np.int64),
        Boxes(boxes, labels, np.array(ignored, dtype=bool), area),
        known,
    )


def _parse_number(tree: ElementTree.Element, place: str) -> float:
    value = float(tree.findtext(place, ""))
    if not np.isfinite(value):
        raise ValueError(f"{place} is {value}")
    return value


def _find_images(spec: str, word: str, beside: str, files: list[str]) -> tuple[ImageDataset, list[str]]:
    """Where the listed images lie, and their names from there. Raises DataError if the first is nowhere."""
    if not files:
        raise DataError(f"{spec} lists no image in {word}.", "Give annotations with images.")
    shared = posixpath.commonpath([posixpath.dirname(file) for file in files])  # "" unless all are in one folder
    stripped = [posixpath.relpath(file, shared) if shared else file for file in files]
    for folder in dict.fromkeys([*(f.format(part=word) for f in IMAGE_FOLDERS), beside]):
        try:
            source = open_dataset(join_spec(spec, posixpath.join(folder, shared)))
        except DataError:
            continue
        if stripped[0] in {source.get_name(row) for row in range(len(source))}:
            return source, stripped
    raise DataError(
        f"{spec} has no image {files[0]}, which the annotations of {word} name.",
        f"Put the images into a folder {word} or images, or where the annotations say.",
    )


def _make_coco_error(where: str, reason: Any) -> DataError:
    return DataError(
        f"{where} is not as COCO writes it: {reason}.",
        "Give images with id, file_name, width and height; annotations with image_id, category_id and bbox; "
        "and categories with id and name.",
    )
