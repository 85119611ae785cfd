"""A data set of the transfer suite: what is learned from, what choices are made on, and what is tested once.

``photos.zip`` or a folder holds ``train``, ``val`` (or ``valid``, ``validation``) and ``test``; where ``{split}``
stands in a name, as in ``cifar10-{split}.zip``, it becomes those words. torchvision's sets bring their own splits.
The demo data are tested on what they call val. Data without splits are divided by a counted draw, which is our own
and no published list. Images may have any number of classes each (see tagged.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from relicctl.core.counted import Stream
from relicctl.data.source_voc import voc_folder
from relicctl.data.sources import Source, open_source
from relicctl.errors import DataError, RelicError
from relicctl.evaluation.dense.samples import inside
from relicctl.evaluation.labelled import Labelled, match
from relicctl.evaluation.subsets import first_of_each, hold_out_of_each, labelled_rows
from relicctl.evaluation.tagged import Tagged, match_tagged, open_tagged

TRAIN, VAL = ("train", "trainval"), ("val", "valid", "validation")


@dataclass(frozen=True)
class DataSet:
    """All images outside the test split are ``known``: the first ``trained`` of them are train, the others val."""

    name: str
    known: Labelled
    trained: int
    test: Labelled


@dataclass(frozen=True)
class Division:
    """Rows of the known images: ``fit`` are learned from, ``chosen_on`` decide; in the end both are learned from.

    ``validation`` says in words where the latter come from.
    """

    fit: np.ndarray
    chosen_on: np.ndarray
    validation: str


class Joined(Source):
    """One source after the other; they share their classes."""

    def __init__(self, first: Source, second: Source, labels: np.ndarray | None) -> None:
        self._sources, self._first = (first, second), len(first)
        self.spec, self.classes, self.labels = first.spec, first.classes, labels

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def _at(self, index: int) -> tuple[Source, int]:
        return (self._sources[0], index) if index < self._first else (self._sources[1], index - self._first)

    def key(self, index: int) -> str:
        source, row = self._at(index)
        return f"{'train' if index < self._first else 'val'}/{source.key(row)}"

    def read(self, index: int) -> bytes | np.ndarray:
        source, row = self._at(index)
        return source.read(row)

    def size(self, index: int) -> int:
        source, row = self._at(index)
        return source.size(row)


def open_data_set(
    name: str, spec: str, *, download: bool, warn: Callable[[str], None], test: str = "test",
    draw: tuple[int, ...] = (), seed: int = 0,
) -> DataSet:  # fmt: skip
    """``test``: the split to test on. ``draw``: how many images of each class to take where there are no splits.

    Raises DataError when there is no train or test split, or they cannot make a classification.
    """
    found: dict[str, Source | None] = {}
    if draw:
        found["train"], found["test"] = drawn(name, open_source(spec, download=download), draw, seed)
    elif spec.partition(":")[0] == "shapes":
        found = {"train": open_source(spec, split="train"), "test": open_source(spec, split="val")}
    else:
        spec = voc_folder(spec, download) or spec
        train = found["train"] = _split(spec, TRAIN, (), download, required=True)
        known_classes = train.classes if train is not None else ()
        for part, words in (("val", tuple(word for word in VAL if word != test)), ("test", (test,))):
            found[part] = _split(spec, words, known_classes, download, required=False)
    train, val, tested = (found.get(part) for part in ("train", "val", "test"))
    assert train is not None
    if tested is None:
        raise DataError(
            f"{name} has no {test} split in {spec}.",
            "Give a folder or archive with train and test in it, a name with {split} where the two words go, or set "
            f"data.test_split={{{name}: val}} to test on another, or data.draw={{{name}: [30]}} to learn from 30 "
            "images of each class.",
        )
    known = _labelled(name, "train", train, train.classes, warn)
    if not isinstance(train, Tagged) and len(known.labels) < len(known.classes):
        raise DataError(
            f"{name} has {len(known.labels)} images to learn from, fewer than its {len(known.classes)} classes.",
            "Give at least one image of every class.",
        )
    asked = _labelled(name, "test", tested, known.classes, warn)
    if val is None:
        return DataSet(name, known, len(known.labels), asked)
    return DataSet(name, _joined(known, _labelled(name, "val", val, known.classes, warn)), len(known.labels), asked)


def drawn(name: str, source: Source, draw: tuple[int, ...], seed: int) -> tuple[Source, Source]:
    """Images to learn from, the first number of each class, and to test on: the second number, or all others.

    Our counted draw: it depends on the seed and the order of the images alone.
    """
    labels = match(source, source.classes).labels
    counts = np.bincount(labels, minlength=len(source.classes))
    if counts.min() < max(sum(draw), draw[0] + 1):
        few = int(counts.argmin())
        raise DataError(
            f"{name} has only {counts[few]} images of {source.classes[few]}, too few for data.draw {list(draw)}.",
            "Draw fewer.",
        )
    train, taken = (first_of_each(labels, np.full(len(counts), n), seed, Stream.EVAL) for n in (draw[0], sum(draw)))
    candidates = taken if len(draw) > 1 else np.arange(len(labels))
    return source.select(train), source.select(np.setdiff1d(candidates, train))


def divide(data: DataSet, labels: str, share: float, seed: int) -> Division:
    """Which labels are known and which decide. With fewer labels than all, val's are not read either."""
    if labels == "all" and data.trained < len(data.known.labels):
        rows = np.arange(len(data.known.labels))
        return Division(rows[: data.trained], rows[data.trained :], "val")
    train = data.known.source.select(np.arange(data.trained))
    truth = data.known.labels[: data.trained]
    rows = labelled_rows(train, truth, labels, seed)
    fit, chosen_on = hold_out_of_each(truth[rows], share, seed)
    if not _tells(truth[rows], fit, chosen_on):
        raise DataError(
            f"{data.name} with --labels {labels} has too few labels to choose on some of them.",
            "Keep at least two images of some class, and two classes.",
        )
    of = "of each class of train" if truth.ndim == 1 else "of train"
    return Division(rows[fit], rows[chosen_on], f"{share:.0%} {of}, cut by seed {seed}")


def _tells(labels: np.ndarray, fit: np.ndarray, chosen_on: np.ndarray) -> bool:
    """Whether a classifier can be learned from some of ``labels`` and judged by others."""
    if labels.ndim == 1:
        return len(chosen_on) > 0 and len(np.unique(labels)) > 1
    learned = (labels[fit] > 0).any(0) & (labels[fit] < 0).any(0)
    return bool((learned & (labels[chosen_on] > 0).any(0)).any())


def _joined(known: Labelled, val: Labelled) -> Labelled:
    labels = np.concatenate([known.labels, val.labels])
    if isinstance(known.source, Tagged) and isinstance(val.source, Tagged):
        images = Joined(known.source.images, val.source.images, None)
        return Labelled(Tagged(images, known.classes, labels), labels, known.classes)
    return Labelled(Joined(known.source, val.source, labels), labels, known.classes)


def _labelled(name: str, part: str, source: Source, classes: tuple[str, ...], warn: Callable[[str], None]) -> Labelled:
    images = match_tagged(source, classes) if isinstance(source, Tagged) else match(source, classes)
    if images.foreign:
        raise DataError(
            f"{name} has classes in {part} that are not in train, {images.foreign[0]!r} among them.",
            "Name its classes as those of train.",
        )
    if images.missing:
        warn(f"{name}: {len(images.missing)} classes have no image in {part}, {images.missing[0]!r} among them")
    return images


def _of_one_class(source: Source, classes: tuple[str, ...]) -> Source:
    """``source``; where it is a single folder that is one of the known ``classes``, with these and their labels."""
    if source.labels is None and classes:
        folders = {source.key(row).partition("/")[0] for row in range(len(source))}
        if len(folders) == 1 and folders <= set(classes):
            number = classes.index(folders.pop())
            source.classes, source.labels = classes, np.full(len(source), number, dtype=np.int64)
    return source


def _split(
    spec: str, words: tuple[str, ...], classes: tuple[str, ...], download: bool, *, required: bool
) -> Source | None:
    """The first of a split's names that is there; None, or the last refusal, if none is."""
    refusal: RelicError | None = None
    for word in words:
        place = spec.replace("{split}", word) if "{split}" in spec else inside(spec, word)
        tagged = open_tagged(spec, place, word, classes)
        if tagged is not None:
            return tagged
        try:
            return _of_one_class(
                open_source(place, split="train" if word in TRAIN else "val", download=download), classes
            )
        except DataError as error:
            refusal = refusal or error
    if required and refusal is not None:
        raise refusal
    return None
