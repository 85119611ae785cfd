"""Labelled data: images of matching classes, hold-out splits, and labelled subsets by fraction, number or list."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from relicctl.config.base import list_specs
from relicctl.config.linear_eval import LinearEvalConfig
from relicctl.console import Console
from relicctl.core.counter_rng import Stream, permutation
from relicctl.data.datasets.base import ImageDataset, find_by_name, normalize_unicode
from relicctl.data.datasets.joined import list_unlabelled_specs, open_joined_dataset
from relicctl.data.datasets.open import decode_text
from relicctl.data.value_range import warn_unused_range
from relicctl.errors import DataError, UsageError

PER_CLASS = re.compile(r"([1-9]\d*)-per-class")
MAX_NAMES_SHOWN = 5  # class names in a message
MAX_HOLDOUT = 5000  # images; enough to measure half a point of accuracy


def check_label_subset(text: str) -> None:
    """Raises UsageError unless ``text`` is all, a fraction, N-per-class, or the path of a file."""
    if text == "all" or PER_CLASS.fullmatch(text) or _parse_fraction(text) is not None or Path(text).is_file():
        return
    what = f"--labels {text} is neither a fraction nor a file that exists."
    fix = "Give all, a fraction such as 0.01, a number such as 20-per-class, or a file with one image name per line."
    raise UsageError(what, fix)


def select_labelled_rows(source: ImageDataset, labels: np.ndarray, text: str, seed: int) -> np.ndarray:
    """Return the rows of the subset ``text``, ascending; ``labels`` int64 ``[N]``, or int8 ``[N, C]`` (multi-label).

    A fraction is of each class, with at least one image; of multi-label images it is of all. Raises DataError when
    there are too few images or a listed name is unknown, UsageError for N-per-class of multi-label images.
    """
    if text == "all":
        return np.arange(len(labels))
    if PER_CLASS.fullmatch(text) and labels.ndim == 2:
        what = f"--labels {text} cannot be used with {source.spec}, whose images are multi-label."
        raise UsageError(what, "Give a fraction such as 0.1, or a file of names.")
    labels = _get_strata(labels)
    if (number := PER_CLASS.fullmatch(text)) is not None:
        wanted = np.full(labels.max() + 1, int(number[1]))
        counts = np.bincount(labels)
        if (counts < wanted).any():
            name = source.classes[int(counts.argmin())]
            what = f"{source.spec} has only {counts.min()} images of {name}, not {number[1]}."
            raise DataError(what, "Ask for fewer labels.")
        return sample_per_class(labels, wanted, seed, Stream.SUBSET)
    if (fraction := _parse_fraction(text)) is not None:
        return sample_per_class(labels, np.maximum(1, np.rint(fraction * np.bincount(labels))), seed, Stream.SUBSET)
    return _read_listed_rows(source, Path(text))


def split_stratified(
    labels: np.ndarray, fraction: float, seed: int, stream: Stream = Stream.HOLDOUT
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows to train on, and rows to choose on: ``fraction`` of each class, or of all multi-label images.

    It is at least one image of each class, unless that is the only one.
    """
    labels = _get_strata(labels)
    counts = np.bincount(labels)
    wanted = np.minimum(np.maximum(1, np.rint(fraction * counts)), counts - 1)
    held_out = sample_per_class(labels, wanted, seed, stream)
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def sample_per_class(labels: np.ndarray, wanted: np.ndarray, seed: int, stream: Stream) -> np.ndarray:
    """Return, ascending, the first ``wanted[c]`` rows of each class c in an order given by (seed, stream) alone."""
    order = permutation(len(labels), seed, stream)
    by_class = order[np.argsort(labels[order], kind="stable")]
    sorted_labels = labels[by_class]
    place = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)  # within the class
    return np.sort(by_class[place < wanted[sorted_labels]])


def _get_strata(labels: np.ndarray) -> np.ndarray:
    """Return the strata to sample from, int64 ``[N]``: classes; all multi-label images are one stratum."""
    return labels if labels.ndim == 1 else np.zeros(len(labels), dtype=np.int64)


def _parse_fraction(text: str) -> float | None:
    try:
        fraction = float(text)
    except ValueError:
        return None
    return fraction if 0 < fraction < 1 else None


def _read_listed_rows(source: ImageDataset, path: Path) -> np.ndarray:
    """Read names as the data have them, or bare file names, as in SimCLR's lists of ImageNet."""
    try:
        text = decode_text(path.read_bytes())
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text in UTF-8.", "Save it as UTF-8, one image name per line.") from None
    wanted = [line.strip() for line in text.splitlines() if line.strip()]
    names = [source.get_name(row) for row in range(len(source))]
    bare = [posixpath.basename(name) for name in names]
    rows = dict(zip(bare, range(len(bare)), strict=True)) | dict(zip(names, range(len(names)), strict=True))
    shared = {name for name, times in Counter(bare).items() if times > 1} - set(names)
    known = list(rows)
    found = [known[place] if place >= 0 else None for place in find_by_name(known, wanted)]
    if ambiguous := [name for name in found if name in shared]:
        what = f"{path} names {ambiguous[0]}, and {source.spec} has several images of that name."
        raise DataError(what, f"Write names as the data have them, such as {names[bare.index(ambiguous[0])]}.")
    unknown = [name for name, match in zip(wanted, found, strict=True) if match is None]
    if unknown or not wanted:
        what = f"{len(unknown)} names that are not in {source.spec}, such as {unknown[0]}" if wanted else "no names"
        raise DataError(f"{path} has {what}.", "Give a list of this data's file names, one per line.")
    return np.array(sorted({rows[name] for name in found if name is not None}), dtype=np.int64)


@dataclass(frozen=True)
class LabelledDataset:
    """Images and their labels, int64 ``[N]`` (indices into ``classes``), or int8 ``[N, C]`` of multi-label images.

    ``missing_classes``: without an image here. ``unknown_classes``: classes of the data that are not in ``classes``.
    """

    source: ImageDataset
    labels: np.ndarray
    classes: tuple[str, ...]
    missing_classes: tuple[str, ...] = ()
    unknown_classes: tuple[str, ...] = ()


def open_train_test(
    config: LinearEvalConfig, download: bool, console: Console
) -> tuple[LabelledDataset, LabelledDataset]:
    """Open the images to train on and those to test on.

    Raises DataError when labels are missing, classes differ or one has no image; UsageError when no data are given.
    """
    data, val_fraction = config.data, config.eval.val_fraction
    if data.train is None:
        raise UsageError("Missing --data: the encoder belongs to no run that has data.", "Give --data and --val.")
    open_split = partial(open_joined_dataset, download=download, decoding=data.decoding, warn=console.warn)
    train = open_split(list_specs(data.train), split="train")
    _check_labelled(train)
    if data.val is not None:
        test = open_split(list_specs(data.val), split="val")
        _check_labelled(test)
        if set(map(normalize_unicode, test.classes)) != set(map(normalize_unicode, train.classes)):
            difference = _format_class_difference(train.classes, test.classes)
            what = f"{train.spec} and {test.spec} have different classes: {difference}."
            raise DataError(what, "Give folders of the same names, or test on other images with --test NAME=DATA.")
    elif val_fraction:
        train, test = _hold_out_test(train, val_fraction, config.seed)
        console.info(f"{len(test)} images of {train.spec} are held out for testing (eval.val_fraction).")
    else:
        what = f"There are no images to test on besides {train.spec}."
        fix = "Give --val, or hold out a fraction of the training images with --set eval.val_fraction=0.1."
        raise UsageError(what, fix)
    if data.subset is not None:
        if data.subset > len(train):
            what = f"data.subset is {data.subset}, but there are only {len(train)} images."
            raise UsageError(what, "Lower data.subset.")
        train = train.select(permutation(len(train), config.seed, Stream.SUBSET)[: data.subset])
    matched_train, matched_test = match_classes(train, train.classes), match_classes(test, train.classes)
    for part, name in ((matched_train, "train"), (matched_test, "test")):
        if part.missing_classes:
            what = f"{_format_class_names(part.missing_classes)} of {part.source.spec} has no image to {name} on."
            raise DataError(what, "Add images, remove the class everywhere, or use more of the data.")
    warn_unused_range(matched_train.source, console.warn)
    return matched_train, matched_test


def match_classes(source: ImageDataset, classes: tuple[str, ...]) -> LabelledDataset:
    """Return the images of ``source`` whose class is one of ``classes``. Raises DataError when there is none."""
    _check_labelled(source)
    assert source.labels is not None
    number = {normalize_unicode(name): i for i, name in enumerate(classes)}
    label = np.array([number.get(normalize_unicode(name), -1) for name in source.classes], dtype=np.int64)
    labels = label[source.labels]
    unknown = tuple(name for name, known in zip(source.classes, label, strict=True) if known < 0)
    if (labels < 0).all():
        difference = _format_class_difference(classes, source.classes)
        what = f"No class of {source.spec} is known to the classifier: {difference}."
        raise DataError(what, "Name its folders as those of the training data.")
    if unknown:
        rows = np.flatnonzero(labels >= 0)
        source, labels = source.select(rows), labels[rows]
    counts = np.bincount(labels, minlength=len(classes))
    missing = tuple(name for name, count in zip(classes, counts, strict=True) if not count)
    return LabelledDataset(source, labels, classes, missing, unknown)


def _check_labelled(source: ImageDataset) -> None:
    if source.labels is None or len(source.classes) < 2:
        problem = "no labels" if source.labels is None else f"only the class {source.classes[0]!r}"
        spec = ", ".join(list_unlabelled_specs(source)) or source.spec
        what = f"{spec} has {problem}, but a classifier needs two classes."
        raise DataError(what, "Give one folder per class.")


def _format_class_difference(ours: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    here, there = ({normalize_unicode(name): name for name in names} for names in (ours, theirs))
    sides = (
        ("missing there", {name for key, name in here.items() if key not in there}),
        ("only there", {name for key, name in there.items() if key not in here}),
    )
    return "; ".join(f"{where} {_format_class_names(tuple(sorted(names)))}" for where, names in sides if names)


def _format_class_names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:MAX_NAMES_SHOWN])) + more


def split_holdout(source: ImageDataset, fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Return the images to train on, and the held-out ones: ``fraction`` of all, at most ``MAX_HOLDOUT``."""
    order = permutation(len(source), seed, Stream.HOLDOUT)
    count = min(max(1, round(fraction * len(source))), MAX_HOLDOUT)
    return source.select(np.sort(order[count:])), source.select(np.sort(order[:count]))


def _hold_out_test(source: ImageDataset, fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Return the images to train on, and those to test on: of each class where a draw of all misses a class."""
    parts = split_holdout(source, fraction, seed)
    if all(len(np.unique(part.labels)) == len(source.classes) for part in parts if part.labels is not None):
        return parts
    assert source.labels is not None
    train, test = split_stratified(source.labels, min(fraction, MAX_HOLDOUT / len(source)), seed)
    return source.select(train), source.select(test)


def align_labels(train: ImageDataset, held_out: ImageDataset) -> np.ndarray:
    """Return ``held_out``'s labels as indices of ``train``'s classes, by name. Raises DataError for unknown classes."""
    if held_out.labels is None:
        what = f"{held_out.spec} has no labels, so there is nothing to evaluate on it."
        raise DataError(what, "Give --val one folder per class, or leave it out.")
    number = {normalize_unicode(name): i for i, name in enumerate(train.classes)}
    classes = [normalize_unicode(name) for name in held_out.classes]
    missing = [name for name, known in zip(held_out.classes, classes, strict=True) if known not in number]
    if missing:
        what = f"{held_out.spec} has {len(missing)} classes that are not in {train.spec}, such as {missing[0]!r}."
        fix = "Give --val images of the same classes, in folders of the same names; or --set data.val=null."
        raise DataError(what, fix)
    return np.asarray(np.array([number[name] for name in classes], dtype=np.int64)[held_out.labels])
