"""Which images keep their labels: a share or a number of each class, drawn from a seed, or a published list."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from pathlib import Path

import numpy as np

from relicctl.core.counted import Stream
from relicctl.data.sources import ImageDataset
from relicctl.errors import DataError, UsageError
from relicctl.evaluation.during import permutation

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
