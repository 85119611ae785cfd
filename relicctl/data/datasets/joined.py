"""Several data sets as one: what ``--data`` means where it is given more than once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from relicctl.config.base import DecodingConfig
from relicctl.data.datasets.base import ConcatDataset, DatasetSplit, ImageDataset, normalize_unicode
from relicctl.data.datasets.open import open_dataset
from relicctl.errors import UsageError


def open_joined_dataset(
    specs: Iterable[str],
    *,
    split: DatasetSplit = "train",
    download: bool = False,
    decoding: DecodingConfig = DecodingConfig(),  # noqa: B008 (immutable)
    warn: Callable[[str], None] = lambda text: None,
) -> ImageDataset:
    """Open the data sets that ``specs`` name, in their order, as one; a single one as ``open_dataset`` does.

    Classes are matched by their names. The images count as unlabelled as soon as one of the data sets has no labels.
    Raises DataError as ``open_dataset`` does, UsageError for one that is named twice.
    """
    first, *others = specs = list(specs)
    open_one = partial(open_dataset, split=split, download=download, decoding=decoding, warn=warn)
    if not others:
        return open_one(first)
    if len(set(specs)) < len(specs):
        twice = next(spec for spec in specs if specs.count(spec) > 1)
        raise UsageError(f"The data set {twice} is given twice.", "Give every data set once.")
    datasets = [open_one(spec) for spec in specs]
    joined = ConcatDataset(datasets)
    joined.namespace = "\0".join(dataset.namespace for dataset in datasets).strip("\0")
    labels = [dataset.labels for dataset in datasets if dataset.labels is not None]
    if len(labels) == len(datasets):
        classes = {normalize_unicode(name): name for dataset in reversed(datasets) for name in dataset.classes}
        joined.classes = tuple(sorted(classes.values()))
        number = {normalize_unicode(name): label for label, name in enumerate(joined.classes)}
        numbers = [np.array([number[normalize_unicode(name)] for name in dataset.classes]) for dataset in datasets]
        joined.labels = np.concatenate([new[old] for new, old in zip(numbers, labels, strict=True)]).astype(np.int64)
    return joined


def list_unlabelled_specs(dataset: ImageDataset) -> list[str]:
    """Return which of the data sets that were joined to ``dataset`` have no labels; itself if it is one alone."""
    parts = dataset.datasets if isinstance(dataset, ConcatDataset) else (dataset,)
    return [part.spec for part in parts if part.labels is None]
