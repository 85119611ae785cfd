"""Images with any number of classes each.

They are those of VOC-style folders, and of folders and archives with a table ``labels.csv``, one line
``name.jpg,class;class`` for each image, without a header. Where a table has one class for every image, they are
single-label.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence

import numpy as np

from relicctl.data.datasets.archives import FileReader
from relicctl.data.datasets.base import ImageDataset, Subset, find_by_name, normalize_unicode
from relicctl.data.datasets.open import decode_text, open_dataset, parse_first_words, summarize_names
from relicctl.data.datasets.specs import join_spec
from relicctl.data.datasets.voc import read_voc
from relicctl.errors import DataError
from relicctl.evaluation.labelled_data import LabelledDataset

LABELS_FILE = "labels.csv"


class MultiLabelDataset(Subset):
    """``images`` with ``labels`` int8 ``[N, C]``: 1 for present classes, -1 for absent ones, 0 where it is ignored."""

    def __init__(self, images: ImageDataset, classes: tuple[str, ...], labels: np.ndarray) -> None:
        super().__init__(images, np.arange(len(images)))
        self.images, self.classes = images, classes
        self.labels: np.ndarray = labels

    def select(self, indices: Sequence[int] | np.ndarray) -> MultiLabelDataset:
        rows = np.asarray(indices, dtype=np.int64)
        return MultiLabelDataset(self.images.select(rows), self.classes, self.labels[rows])

    def compute_fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.images.compute_fingerprint()} {self.classes}".encode())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()


class TableDataset(MultiLabelDataset):
    """Labels from a table, which may have a single class for every image."""


def has_one_class_each(source: ImageDataset) -> bool:
    """Return whether the labels are those of a table that has exactly one class for every image."""
    return isinstance(source, TableDataset) and bool(((source.labels > 0).sum(1) == 1).all())


def convert_to_single_label(source: ImageDataset) -> ImageDataset:
    """Return the images of a table that has one class for each, labelled as those in class folders are."""
    assert isinstance(source, MultiLabelDataset)
    single = Subset(source.images, np.arange(len(source)))
    single.classes, single.labels = source.classes, source.labels.argmax(1)
    return single


def open_multilabel(
    spec: str, place: str, word: str, classes: tuple[str, ...], open_images: Callable[..., ImageDataset] = open_dataset
) -> MultiLabelDataset | None:
    """Open split ``word`` of VOC-style data at ``spec``, or the folder or archive ``place`` of that split.

    Returns None if neither is multi-label. ``classes``: those of train, where this is another split; further ones
    come after them. Raises DataError for lists, annotations or tables that cannot be used.
    """
    files = _open_file_reader(spec)
    if files is not None and (listed := files.read(f"ImageSets/Main/{word}.txt")) is not None:
        images = open_images(join_spec(spec, "JPEGImages"), class_folders=False)
        voc = read_voc(files, images, parse_first_words(listed), classes or None, spec)
        easy, boxes = ~voc.boxes.ignored, voc.boxes
        labels = np.full((len(voc.files), len(voc.classes)), -1, dtype=np.int8)
        labels[voc.image_indices, boxes.labels] = 0
        labels[voc.image_indices[easy], boxes.labels[easy]] = 1
        return MultiLabelDataset(_select_listed_images(images, voc.files), voc.classes, labels)
    if (files := _open_file_reader(place)) is not None and (content := files.read(LABELS_FILE)) is not None:
        table = _read_label_table(content, f"{LABELS_FILE} in {place}")
        known = {normalize_unicode(name): name for name in classes}
        for name in sorted(set().union(*table.values())):
            known.setdefault(normalize_unicode(name), name)
        number = {name: index for index, name in enumerate(known)}
        labels = np.full((len(table), len(number)), -1, dtype=np.int8)
        for row, names in enumerate(table.values()):
            labels[row, [number[normalize_unicode(name)] for name in names]] = 1
        images = _select_listed_images(open_images(place, class_folders=False), list(table))
        return TableDataset(images, tuple(known.values()), labels)
    return None


def match_multilabel_classes(source: MultiLabelDataset, classes: tuple[str, ...]) -> LabelledDataset:
    """Return the images with labels of ``classes``, which are the first of the data set's. Raises DataError."""
    if len(classes) < 2:
        what = f"{source.spec} has only {len(classes)} class, but a classifier needs two."
        raise DataError(what, "Give labels of two classes.")
    present = np.any(source.labels > 0, axis=0).tolist()
    if not any(present):
        raise DataError(f"No image that {source.spec} lists has a class.", "Check its labels.")
    missing = tuple(name for name, is_present in zip(classes, present, strict=False) if not is_present)
    return LabelledDataset(source, source.labels, classes, missing, source.classes[len(classes) :])


def _open_file_reader(spec: str) -> FileReader | None:
    try:
        return FileReader(spec)
    except DataError:
        return None  # missing, or no archive: opening it as plain images raises the error


def _read_label_table(content: bytes, where: str) -> dict[str, set[str]]:
    """Return the classes of each image by its name."""
    table: dict[str, set[str]] = {}
    try:
        text = decode_text(content)
        tabs = "\t" in text.partition("\n")[0] and "," not in text.partition("\n")[0]  # as spreadsheets save Unicode
        for cells in csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True):
            if not cells:
                continue
            if len(cells) != 2:
                raise ValueError(f"{len(cells)} columns, where {', '.join(cells)[:50]} stands")
            name, classes = cells
            if name in table:
                raise ValueError(f"{name} is listed twice")
            table[name] = {text.strip() for text in classes.split(";")} - {""}
    except UnicodeDecodeError:
        raise DataError(f"{where} is no text in UTF-8.", "Save it as UTF-8, or as Unicode text.") from None
    except (ValueError, csv.Error) as reason:
        raise DataError(f"{where} cannot be read ({reason}).", "Write lines like name.jpg,class;class.") from None
    return table


def _select_listed_images(images: ImageDataset, names: list[str]) -> ImageDataset:
    """Return the images of these names."""
    if not names:
        raise DataError(f"A list of {images.spec} is empty.", "Write one image name per line.")
    found = find_by_name([images.get_name(row) for row in range(len(images))], names)
    missing = [name for name, row in zip(names, found, strict=True) if row < 0]
    if missing:
        what = f"{images.spec} lacks listed images: {summarize_names(missing)}, of {len(names)}."
        raise DataError(what, "Add them, or remove them from the list, which has no header.")
    return images.select(found)
