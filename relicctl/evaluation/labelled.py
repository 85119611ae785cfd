"""Labelled images for classification: to train on, to test on, and further test sets mapped by class name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from relicctl.config.linear import LinearEvalConfig
from relicctl.console import Console
from relicctl.core.counted import Stream
from relicctl.data.sources import ImageDataset, open_dataset
from relicctl.errors import DataError, UsageError
from relicctl.evaluation.during import permutation, split_holdout

MAX_NAMES_SHOWN = 5  # class names in a message


@dataclass(frozen=True)
class LabelledDataset:
    """Images and their labels, int64 ``[N]``, in the numbering of ``classes``; int8 ``[N, C]`` as Tagged has them.

    ``missing``: classes without an image here. ``foreign``: the data's own classes that are none of ``classes``.
    """

    source: ImageDataset
    labels: np.ndarray
    classes: tuple[str, ...]
    missing_classes: tuple[str, ...] = ()
    unknown_classes: tuple[str, ...] = ()


def open_train_test(
    config: LinearEvalConfig, download: bool, console: Console
) -> tuple[LabelledDataset, LabelledDataset]:
    """The images to train on and those to test on.

    Raises DataError when labels are missing, classes differ or one has no image; UsageError when nothing is named.
    """
    data, holdout = config.data, config.eval.holdout
    if data.train is None:
        raise UsageError("No data is given, and no run that says which.", "Give --data and --val.")
    train = open_dataset(data.train, split="train", download=download)
    _check_labelled(train)
    if data.val is not None:
        test = open_dataset(data.val, split="val", download=download)
        _check_labelled(test)
        if set(test.classes) != set(train.classes):
            raise DataError(
                f"{train.spec} and {test.spec} have different classes: "
                f"{_format_class_difference(train.classes, test.classes)}.",
                "Give folders of the same names, or score other images with --test NAME=DATA.",
            )
    elif holdout:
        train, test = split_holdout(train, holdout, config.seed)
        console.info(f"{len(test)} images of {train.spec} are held out for testing (eval.holdout).")
    else:
        raise UsageError(
            f"There are no images to test on beside {train.spec}.",
            "Give --val, or hold out a share of the training images with --set eval.holdout=0.1.",
        )
    if data.subset is not None:
        if data.subset > len(train):
            raise UsageError(
                f"data.subset is {data.subset}, but there are only {len(train)} images.", "Lower data.subset."
            )
        train = train.select(permutation(len(train), config.seed, Stream.SUBSET)[: data.subset])
    trained, tested = match_classes(train, train.classes), match_classes(test, train.classes)
    for part, name in ((trained, "train"), (tested, "test")):
        if part.missing_classes:
            raise DataError(
                f"{_format_class_names(part.missing_classes)} of {part.source.spec} has no image to {name} on.",
                "Add images, remove the class everywhere, or take more of the data.",
            )
    return trained, tested


def match_classes(source: ImageDataset, classes: tuple[str, ...]) -> LabelledDataset:
    """The images of ``source`` whose class is one of ``classes``. Raises DataError when there is none."""
    _check_labelled(source)
    assert source.labels is not None
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number.get(name, -1) for name in source.classes], dtype=np.int64)[source.labels]
    foreign = tuple(name for name in source.classes if name not in number)
    if (labels < 0).all():
        raise DataError(
            f"No class of {source.spec} is one of the classifier's: "
            f"{_format_class_difference(classes, source.classes)}.",
            "Name its folders as those of the training data.",
        )
    if foreign:
        rows = np.flatnonzero(labels >= 0)
        source, labels = source.select(rows), labels[rows]
    counts = np.bincount(labels, minlength=len(classes))
    missing = tuple(name for name, count in zip(classes, counts, strict=True) if not count)
    return LabelledDataset(source, labels, classes, missing, foreign)


def _check_labelled(source: ImageDataset) -> None:
    if source.labels is None or len(source.classes) < 2:
        found = "no labels" if source.labels is None else f"only the class {source.classes[0]!r}"
        raise DataError(f"{source.spec} has {found}, but a classifier needs two classes.", "Give one folder per class.")


def _format_class_difference(ours: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    sides = (("missing there", set(ours) - set(theirs)), ("only there", set(theirs) - set(ours)))
    return "; ".join(f"{where} {_format_class_names(tuple(sorted(names)))}" for where, names in sides if names)


def _format_class_names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:MAX_NAMES_SHOWN])) + more
