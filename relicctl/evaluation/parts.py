"""A data set of the transfer suite: what is learned from, what choices are made on, and what is tested once.

``photos.zip`` or a folder holds ``train``, ``val`` (or ``valid``, ``validation``) and ``test``; where ``{split}``
stands in a name, as in ``cifar10-{split}.zip``, it becomes those words. torchvision's sets bring their own splits.
The demo data are tested on what they call val.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from relicctl.data.sources import Source, open_source
from relicctl.errors import DataError, RelicError
from relicctl.evaluation.labelled import Labelled, match
from relicctl.evaluation.subsets import hold_out_of_each, labelled_rows

NAMES = {"train": ("train", "trainval"), "val": ("val", "valid", "validation"), "test": ("test",)}


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

    def __init__(self, first: Source, second: Source, labels: np.ndarray) -> None:
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


def open_data_set(name: str, spec: str, *, download: bool, warn: Callable[[str], None]) -> DataSet:
    """Raises DataError when there is no train or test split, or they cannot make a classification."""
    train: Source | None
    test: Source | None
    if spec.partition(":")[0] == "shapes":
        val, train, test = None, open_source(spec, split="train"), open_source(spec, split="val")
    else:
        train = _split(spec, "train", download, required=True)
        val, test = (_split(spec, part, download, required=False) for part in ("val", "test"))
    assert train is not None
    if test is None:
        raise DataError(
            f"{name} has no test split in {spec}.",
            "Give a folder or archive with train and test in it, or a name with {split} where the two words go.",
        )
    known = match(train, train.classes)
    if len(known.labels) < len(known.classes):
        raise DataError(
            f"{name} has {len(known.labels)} images to learn from, fewer than its {len(known.classes)} classes.",
            "Give at least one image of every class.",
        )
    tested = _matched(name, "test", test, known.classes, warn)
    if val is not None:
        chosen_on = _matched(name, "val", val, known.classes, warn)
        labels = np.concatenate([known.labels, chosen_on.labels])
        joined = Joined(known.source, chosen_on.source, labels)
        return DataSet(name, Labelled(joined, labels, known.classes), len(known.labels), tested)
    return DataSet(name, known, len(known.labels), tested)


def divide(data: DataSet, labels: str, share: float, seed: int) -> Division:
    """Which labels are known and which decide. With fewer labels than all, val's are not read either."""
    if labels == "all" and data.trained < len(data.known.labels):
        rows = np.arange(len(data.known.labels))
        return Division(rows[: data.trained], rows[data.trained :], "val")
    train = data.known.source.select(np.arange(data.trained))
    truth = data.known.labels[: data.trained]
    rows = labelled_rows(train, truth, labels, seed)
    fit, chosen_on = hold_out_of_each(truth[rows], share, seed)
    if not len(chosen_on) or len(np.unique(truth[rows])) < 2:
        raise DataError(
            f"{data.name} with --labels {labels} has too few labels to choose on some of them.",
            "Keep at least two images of some class, and two classes.",
        )
    return Division(rows[fit], rows[chosen_on], f"{share:.0%} of each class of train, cut by seed {seed}")


def _matched(name: str, part: str, source: Source, classes: tuple[str, ...], warn: Callable[[str], None]) -> Labelled:
    images = match(source, classes)
    if images.foreign:
        raise DataError(
            f"{name} has classes in {part} that are not in train, {images.foreign[0]!r} among them.",
            "Name its folders as those of train.",
        )
    if images.missing:
        warn(f"{name}: {len(images.missing)} classes have no image in {part}, {images.missing[0]!r} among them")
    return images


def _split(spec: str, part: str, download: bool, *, required: bool) -> Source | None:
    """The first of a split's names that is there; None, or the last refusal, if none is."""
    refusal: RelicError | None = None
    for name in NAMES[part]:
        place = spec.replace("{split}", name) if "{split}" in spec else f"{spec}{'/' if '#' in spec else '#'}{name}"
        try:
            return open_source(place, split="train" if part == "train" else "val", download=download)
        except DataError as error:
            refusal = refusal or error
    if required and refusal is not None:
        raise refusal
    return None
