"""Which images keep their labels: a share or a number of each class, drawn from a seed, or a published list."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from relicctl.config.linear_eval import LinearEvalConfig
from relicctl.console import Console
from relicctl.core.counter_rng import Stream, permutation
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.datasets.open import open_dataset
from relicctl.errors import DataError, UsageError

PER_CLASS = re.compile(r"([1-9]\d*)-per-class")


def check_label_subset(text: str) -> None:
    """Raises UsageError unless ``text`` says all, a share, N-per-class, or names a file."""
    if text == "all" or PER_CLASS.fullmatch(text) or _parse_fraction(text) is not None or Path(text).is_file():
        return
    raise UsageError(
        f"--labels {text} is neither a share nor a file that exists.",
        "Give all, a share such as 0.01, a number such as 20-per-class, or a file with one image's name a line.",
    )


def select_labelled_rows(source: ImageDataset, labels: np.ndarray, text: str, seed: int) -> np.ndarray:
    """The rows, ascending, that keep their ``labels`` int64 ``[N]``; the same for every encoder.

    A share keeps at least one image of every class. Of images with any number of classes, ``[N, C]``, it is a share
    of all. Raises DataError when there are too few images, or a name in the list is none of the data's; UsageError
    for a number of each class where an image has any number of them.
    """
    if text == "all":
        return np.arange(len(labels))
    if PER_CLASS.fullmatch(text) and labels.ndim == 2:
        raise UsageError(
            f"--labels {text} means nothing to {source.spec}, whose images have any number of classes.",
            "Give a share such as 0.1, or a file of names.",
        )
    labels = _get_strata(labels)
    if (number := PER_CLASS.fullmatch(text)) is not None:
        wanted = np.full(labels.max() + 1, int(number[1]))
        counts = np.bincount(labels)
        if (counts < wanted).any():
            name = source.classes[int(counts.argmin())]
            raise DataError(
                f"{source.spec} has only {counts.min()} images of {name}, not {number[1]}.", "Ask for fewer labels."
            )
        return sample_per_class(labels, wanted, seed, Stream.SUBSET)
    if (share := _parse_fraction(text)) is not None:
        return sample_per_class(labels, np.maximum(1, np.rint(share * np.bincount(labels))), seed, Stream.SUBSET)
    return _read_listed_rows(source, Path(text))


def split_stratified(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, and ``share`` of each class to choose on: at least one, unless it is the class's only image.

    Of images with any number of classes, ``[N, C]``, it is a share of all.
    """
    labels = _get_strata(labels)
    counts = np.bincount(labels)
    wanted = np.minimum(np.maximum(1, np.rint(share * counts)), counts - 1)
    held = sample_per_class(labels, wanted, seed, Stream.HOLDOUT)
    return np.setdiff1d(np.arange(len(labels)), held), held


def sample_per_class(labels: np.ndarray, wanted: np.ndarray, seed: int, stream: Stream) -> np.ndarray:
    """Ascending rows: of each class c the first ``wanted[c]`` in an order that depends on (seed, stream) alone."""
    order = permutation(len(labels), seed, stream)
    by_class = order[np.argsort(labels[order], kind="stable")]
    sorted_labels = labels[by_class]
    place = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)  # within the class
    return np.sort(by_class[place < wanted[sorted_labels]])


def _get_strata(labels: np.ndarray) -> np.ndarray:
    """int64 ``[N]``: what is drawn from apart from the rest, each class where an image has but one."""
    return labels if labels.ndim == 1 else np.zeros(len(labels), dtype=np.int64)


def _parse_fraction(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 < share < 1 else None


def _read_listed_rows(source: ImageDataset, path: Path) -> np.ndarray:
    """Names as the data have them, or the files' own names alone, as in SimCLR's lists of ImageNet."""
    wanted = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    keys = [source.get_name(row) for row in range(len(source))]
    bare = [posixpath.basename(key) for key in keys]
    rows = dict(zip(bare, range(len(bare)), strict=True)) | dict(zip(keys, range(len(keys)), strict=True))
    shared = {name for name, times in Counter(bare).items() if times > 1} - set(keys)
    if ambiguous := [name for name in wanted if name in shared]:
        raise DataError(
            f"{path} names {ambiguous[0]}, and {source.spec} has several images of that name.",
            f"Write names as the data have them, such as {keys[bare.index(ambiguous[0])]}.",
        )
    unknown = [name for name in wanted if name not in rows]
    if unknown or not wanted:
        what = f"{len(unknown)} names that {source.spec} has not, {unknown[0]} among them" if wanted else "no names"
        raise DataError(f"{path} has {what}.", "Give a list of this data's own file names, one a line.")
    return np.array(sorted({rows[name] for name in wanted}), dtype=np.int64)


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
    data, val_fraction = config.data, config.eval.val_fraction
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
    elif val_fraction:
        train, test = split_holdout(train, val_fraction, config.seed)
        console.info(f"{len(test)} images of {train.spec} are held out for testing (eval.val_fraction).")
    else:
        raise UsageError(
            f"There are no images to test on beside {train.spec}.",
            "Give --val, or hold out a share of the training images with --set eval.val_fraction=0.1.",
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


MAX_HOLDOUT = 5000  # images; enough to tell half a point of accuracy


def split_holdout(source: ImageDataset, share: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """What is left to train on, and the held-out part: ``share`` of the images, at most ``MAX_HOLDOUT``."""
    order = permutation(len(source), seed, Stream.HOLDOUT)
    count = min(max(1, round(share * len(source))), MAX_HOLDOUT)
    return source.select(np.sort(order[count:])), source.select(np.sort(order[:count]))


def align_labels(train: ImageDataset, held_out: ImageDataset) -> np.ndarray:
    """``held_out``'s labels in the numbering of ``train``'s classes, by name. Raises DataError when they differ."""
    if held_out.labels is None:
        raise DataError(
            f"{held_out.spec} has no labels, so nothing can be measured on it.",
            "Give --val one folder per class, or leave it out.",
        )
    number = {name: i for i, name in enumerate(train.classes)}
    missing = [name for name in held_out.classes if name not in number]
    if missing:
        raise DataError(
            f"{held_out.spec} has {len(missing)} classes that {train.spec} has not, {missing[0]!r} among them.",
            "Give --val images of the same classes, in folders of the same names; or --set data.val=null.",
        )
    return np.array([number[name] for name in held_out.classes], dtype=np.int64)[held_out.labels]
