"""Images with any number of classes each, from PASCAL VOC's layout or from folders with a table.

    VOCdevkit/VOC2007    JPEGImages, Annotations, ImageSets/Main/{train,val,test}.txt: torchvision:VOCDetection#2007
    photos.zip           {train,val,test}/labels.csv beside the images, a line each: name.jpg,class;class
    photos-{split}.zip   labels.csv in each

VOC's classes are those of an image's objects. As in VOC's own lists, an image that shows a class in difficult objects
alone does not count for it: neither in learning nor in the class's average precision.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence

import numpy as np

from relicctl.data.sources import ImageDataset, open_dataset
from relicctl.errors import DataError
from relicctl.evaluation.dense.annotations import read_voc
from relicctl.evaluation.dense.samples import FileReader, join_spec, parse_first_words, summarize_names
from relicctl.evaluation.labelled import LabelledDataset

LABELS_FILE = "labels.csv"


class MultiLabelDataset(ImageDataset):
    """``images`` with ``labels`` int8 ``[N, C]``: 1 for a class that is there, -1 for others, 0 where none counts."""

    def __init__(self, images: ImageDataset, classes: tuple[str, ...], labels: np.ndarray) -> None:
        self.spec, self.namespace, self.images = images.spec, images.namespace, images
        self.classes: tuple[str, ...] = classes
        self.labels: np.ndarray = labels

    def __len__(self) -> int:
        return len(self.images)

    def get_name(self, index: int) -> str:
        return self.images.get_name(index)

    def read(self, index: int) -> bytes | np.ndarray:
        return self.images.read(index)

    def size(self, index: int) -> int:
        return self.images.size(index)

    def select(self, indices: Sequence[int] | np.ndarray) -> MultiLabelDataset:
        rows = np.asarray(indices, dtype=np.int64)
        return MultiLabelDataset(self.images.select(rows), self.classes, self.labels[rows])

    def compute_fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.images.compute_fingerprint()} {self.classes}".encode())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()


def open_multilabel(spec: str, place: str, word: str, classes: tuple[str, ...]) -> MultiLabelDataset | None:
    """The split ``word`` of data at ``spec``, or the folder or archive ``place`` of that split.

    None if neither is laid out as above. ``classes``: those of train, where this is another split; what it has
    beside them comes after them. Raises DataError for lists, annotations or tables that cannot be used.
    """
    if (files := _open_file_reader(spec)) is not None and (
        listed := files.read(f"ImageSets/Main/{word}.txt")
    ) is not None:
        found = read_voc(files, parse_first_words(listed), classes or None, spec)
        easy, boxes = ~found.boxes.ignored, found.boxes
        labels = np.full((len(found.files), len(found.classes)), -1, dtype=np.int8)
        labels[found.image_indices, boxes.labels] = 0
        labels[found.image_indices[easy], boxes.labels[easy]] = 1
        return _open_listed_images(join_spec(spec, "JPEGImages"), found.files, found.classes, labels)
    if (files := _open_file_reader(place)) is not None and (content := files.read(LABELS_FILE)) is not None:
        table = _read_label_table(content, f"{LABELS_FILE} in {place}")
        known = {tag: number for number, tag in enumerate(classes)}
        for tag in sorted(set().union(*table.values())):
            known.setdefault(tag, len(known))
        labels = np.full((len(table), len(known)), -1, dtype=np.int8)
        for row, tags in enumerate(table.values()):
            labels[row, [known[tag] for tag in tags]] = 1
        return _open_listed_images(place, list(table), tuple(known), labels)
    return None


def match_multilabel_classes(source: MultiLabelDataset, classes: tuple[str, ...]) -> LabelledDataset:
    """Its images in the numbering of ``classes``, which are the first of its own. Raises DataError."""
    if len(classes) < 2:
        raise DataError(
            f"{source.spec} has only {len(classes)} class, but a classifier needs two.", "Give labels of two classes."
        )
    there = np.any(source.labels > 0, axis=0).tolist()
    if not any(there):
        raise DataError(f"No image that {source.spec} lists has a class.", "Check its labels.")
    missing = tuple(name for name, found in zip(classes, there, strict=False) if not found)
    return LabelledDataset(source, source.labels, classes, missing, source.classes[len(classes) :])


def _open_file_reader(spec: str) -> FileReader | None:
    try:
        return FileReader(spec)
    except DataError:
        return None  # not there, or no archive: told where it is opened as plain data


def _read_label_table(content: bytes, where: str) -> dict[str, set[str]]:
    """Classes by the name of the image."""
    table: dict[str, set[str]] = {}
    try:
        for cells in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True):
            if not cells:
                continue
            name, tags = cells  # ValueError unless they are two
            if name in table:
                raise ValueError(f"{name} stands there twice")
            table[name] = {tag.strip() for tag in tags.split(";")} - {""}
    except (ValueError, csv.Error) as reason:
        raise DataError(f"{where} cannot be read ({reason}).", "Write lines like name.jpg,class;class.") from None
    return table


def _open_listed_images(
    place: str, names: list[str], classes: tuple[str, ...], labels: np.ndarray
) -> MultiLabelDataset:
    if not names:
        raise DataError(f"A list of {place} names no image.", "Name one image a line.")
    images = open_dataset(place)
    rows = {images.get_name(row): row for row in range(len(images))}
    missing = [name for name in names if name not in rows]
    if missing:
        raise DataError(
            f"{place} lacks images that its lists name: {summarize_names(missing)}, of {len(names)}.",
            "Add them or take them out of the list, which has no header.",
        )
    return MultiLabelDataset(images.select([rows[name] for name in names]), classes, labels)
