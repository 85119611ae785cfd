"""A data set of the transfer suite: what is learned from, what choices are made on, and what is tested once.

``photos.zip`` or a folder holds ``train``, ``val`` (or ``valid``, ``validation``) and ``test``; where ``{split}``
stands in a name, as in ``cifar10-{split}.zip``, it becomes those words. torchvision's sets bring their own splits.
The demo data are tested on what they call val. Data without splits are divided by a counted draw, which is our own
and no published list. Images may have any number of classes each (see tagged.py).
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from relicctl.core.counter_rng import Stream
from relicctl.data.datasets.archives import FileReader
from relicctl.data.datasets.base import ConcatDataset, ImageDataset
from relicctl.data.datasets.open import join_spec, open_dataset, parse_first_words, summarize_names
from relicctl.data.datasets.voc import find_voc_folder, read_voc
from relicctl.errors import DataError, RelicError
from relicctl.evaluation.labelled_data import (
    LabelledDataset,
    match_classes,
    sample_per_class,
    select_labelled_rows,
    split_stratified,
)

TRAIN_NAMES, VAL_NAMES = ("train", "trainval"), ("val", "valid", "validation")


@dataclass(frozen=True)
class TransferDataset:
    """All images outside the test split are ``known``: the first ``trained`` of them are train, the others val."""

    name: str
    trainval: LabelledDataset
    num_train: int
    test: LabelledDataset


@dataclass(frozen=True)
class Split:
    """Rows of the known images: ``fit`` are learned from, ``val`` decide; in the end both are learned from.

    ``validation`` says in words where the latter come from.
    """

    train: np.ndarray
    val: np.ndarray
    val_source: str


def open_transfer_dataset(
    name: str, spec: str, *, download: bool, warn: Callable[[str], None], test: str = "test",
    draw: tuple[int, ...] = (), seed: int = 0,
) -> TransferDataset:  # fmt: skip
    """``test``: the split to test on. ``draw``: how many images of each class to take where there are no splits.

    Raises DataError when there is no train or test split, or they cannot make a classification.
    """
    found: dict[str, ImageDataset | None] = {}
    if draw:
        found["train"], found["test"] = draw_train_test(name, open_dataset(spec, download=download), draw, seed)
    elif spec.partition(":")[0] == "shapes":
        found = {"train": open_dataset(spec, split="train"), "test": open_dataset(spec, split="val")}
    else:
        spec = find_voc_folder(spec, download) or spec
        train = found["train"] = _open_image_split(spec, TRAIN_NAMES, (), download, required=True)
        known_classes = train.classes if train is not None else ()
        for part, words in (("val", tuple(word for word in VAL_NAMES if word != test)), ("test", (test,))):
            found[part] = _open_image_split(spec, words, known_classes, download, required=False)
    train, val, test_source = (found.get(part) for part in ("train", "val", "test"))
    assert train is not None
    if test_source is None:
        raise DataError(
            f"{name} has no {test} split in {spec}.",
            "Give a folder or archive with train and test in it, a name with {split} where the two words go, or set "
            f"data.test_split={{{name}: val}} to test on another, or data.samples_per_class={{{name}: [30]}} to learn "
            "from 30 images of each class.",
        )
    trainval = _match_split_classes(name, "train", train, train.classes, warn)
    if not isinstance(train, MultiLabelDataset) and len(trainval.labels) < len(trainval.classes):
        raise DataError(
            f"{name} has {len(trainval.labels)} images to learn from, fewer than its {len(trainval.classes)} classes.",
            "Give at least one image of every class.",
        )
    test_images = _match_split_classes(name, "test", test_source, trainval.classes, warn)
    if val is None:
        return TransferDataset(name, trainval, len(trainval.labels), test_images)
    return TransferDataset(
        name,
        _concat_labelled(trainval, _match_split_classes(name, "val", val, trainval.classes, warn)),
        len(trainval.labels),
        test_images,
    )


def draw_train_test(
    name: str, source: ImageDataset, draw: tuple[int, ...], seed: int
) -> tuple[ImageDataset, ImageDataset]:
    """Images to learn from, the first number of each class, and to test on: the second number, or all others.

    Our counted draw: it depends on the seed and the order of the images alone.
    """
    labels = match_classes(source, source.classes).labels
    counts = np.bincount(labels, minlength=len(source.classes))
    if counts.min() < max(sum(draw), draw[0] + 1):
        few = int(counts.argmin())
        raise DataError(
            f"{name} has only {counts[few]} images of {source.classes[few]}, too few for data.samples_per_class "
            f"{list(draw)}.",
            "Draw fewer.",
        )
    train, taken = (sample_per_class(labels, np.full(len(counts), n), seed, Stream.EVAL) for n in (draw[0], sum(draw)))
    candidates = taken if len(draw) > 1 else np.arange(len(labels))
    return source.select(train), source.select(np.setdiff1d(candidates, train))


def split_trainval(data: TransferDataset, labels: str, share: float, seed: int) -> Split:
    """Which labels are known and which decide. With fewer labels than all, val's are not read either."""
    if labels == "all" and data.num_train < len(data.trainval.labels):
        rows = np.arange(len(data.trainval.labels))
        return Split(rows[: data.num_train], rows[data.num_train :], "val")
    train = data.trainval.source.select(np.arange(data.num_train))
    truth = data.trainval.labels[: data.num_train]
    rows = select_labelled_rows(train, truth, labels, seed)
    fit, chosen_on = split_stratified(truth[rows], share, seed)
    if not _is_usable_split(truth[rows], fit, chosen_on):
        raise DataError(
            f"{data.name} with --labels {labels} has too few labels to choose on some of them.",
            "Keep at least two images of some class, and two classes.",
        )
    of = "of each class of train" if truth.ndim == 1 else "of train"
    return Split(rows[fit], rows[chosen_on], f"{share:.0%} {of}, cut by seed {seed}")


def _is_usable_split(labels: np.ndarray, train: np.ndarray, val: np.ndarray) -> bool:
    """Whether a classifier can be learned from some of ``labels`` and judged by others."""
    if labels.ndim == 1:
        return len(val) > 0 and len(np.unique(labels)) > 1
    learned = (labels[train] > 0).any(0) & (labels[train] < 0).any(0)
    return bool((learned & (labels[val] > 0).any(0)).any())


def _concat_labelled(train: LabelledDataset, val: LabelledDataset) -> LabelledDataset:
    labels = np.concatenate([train.labels, val.labels])
    if isinstance(train.source, MultiLabelDataset) and isinstance(val.source, MultiLabelDataset):
        images = ConcatDataset([train.source.images, val.source.images], ("train", "val"))
        return LabelledDataset(MultiLabelDataset(images, train.classes, labels), labels, train.classes)
    return LabelledDataset(ConcatDataset([train.source, val.source], ("train", "val"), labels), labels, train.classes)


def _match_split_classes(
    name: str, part: str, source: ImageDataset, classes: tuple[str, ...], warn: Callable[[str], None]
) -> LabelledDataset:
    images = (
        match_multilabel_classes(source, classes)
        if isinstance(source, MultiLabelDataset)
        else match_classes(source, classes)
    )
    if images.unknown_classes:
        raise DataError(
            f"{name} has classes in {part} that are not in train, {images.unknown_classes[0]!r} among them.",
            "Name its classes as those of train.",
        )
    if images.missing_classes:
        warn(
            f"{name}: {len(images.missing_classes)} classes have no image in {part}, "
            f"{images.missing_classes[0]!r} among them"
        )
    return images


def _assign_folder_class(source: ImageDataset, classes: tuple[str, ...]) -> ImageDataset:
    """``source``; where it is a single folder that is one of the known ``classes``, with these and their labels."""
    if source.labels is None and classes:
        folders = {source.get_name(row).partition("/")[0] for row in range(len(source))}
        if len(folders) == 1 and folders <= set(classes):
            number = classes.index(folders.pop())
            source.classes, source.labels = classes, np.full(len(source), number, dtype=np.int64)
    return source


def _open_image_split(
    spec: str, words: tuple[str, ...], classes: tuple[str, ...], download: bool, *, required: bool
) -> ImageDataset | None:
    """The first of a split's names that is there; None, or the last refusal, if none is."""
    refusal: RelicError | None = None
    for word in words:
        place = spec.replace("{split}", word) if "{split}" in spec else join_spec(spec, word)
        tagged = open_multilabel(spec, place, word, classes)
        if tagged is not None:
            return tagged
        try:
            return _assign_folder_class(
                open_dataset(place, split="train" if word in TRAIN_NAMES else "val", download=download), classes
            )
        except DataError as error:
            refusal = refusal or error
    if required and refusal is not None:
        raise refusal
    return None


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
