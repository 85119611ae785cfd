"""A data set of a comparison: images to train on, to choose on, and to test on once; single-label or multi-label.

A folder or ``photos.zip`` holds ``train``, ``val`` and ``test``, or what else SPLIT_FOLDERS calls them; ``{split}`` in
a name, as in ``cifar10-{split}.zip``, is replaced by these words. torchvision's data sets bring their splits, the demo
data are tested on their val split. Data without splits are split by seed, which is our choice and no published list.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from relicctl.config.transfer import TransferConfig
from relicctl.core.counter_rng import Stream
from relicctl.data.datasets.archives import split_spec
from relicctl.data.datasets.base import ConcatDataset, DatasetSplit, ImageDataset
from relicctl.data.datasets.open import list_folders, open_dataset
from relicctl.data.datasets.specs import join_spec
from relicctl.data.datasets.splits import SPLIT_FOLDERS, get_split, spell_split
from relicctl.data.datasets.torchvision import has_splits
from relicctl.data.datasets.voc import find_voc_folder
from relicctl.errors import DataError
from relicctl.evaluation.labelled_data import (
    LabelledDataset,
    match_classes,
    sample_per_class,
    select_labelled_rows,
    split_stratified,
)
from relicctl.evaluation.multilabel_data import (
    MultiLabelDataset,
    convert_to_single_label,
    has_one_class_each,
    match_multilabel_classes,
    open_multilabel,
)

NO_CLASSES = {"JPEGImages", "images", "masks", "annotations"}  # folders of other tasks' data


@dataclass(frozen=True)
class TransferDataset:
    """``trainval``: all images outside the test split; the first ``num_train`` are train, the others val.

    ``draw`` says in words how the test images of data without splits were drawn, unless the config says how.
    """

    name: str
    trainval: LabelledDataset
    num_train: int
    test: LabelledDataset
    draw: str = ""


@dataclass(frozen=True)
class Split:
    """Rows of trainval: to train on, and to choose hyperparameters on; the final training is on both.

    ``val_source`` says in words where the validation images come from.
    """

    train: np.ndarray
    val: np.ndarray
    val_source: str


def open_transfer_dataset(
    name: str, config: TransferConfig, *, download: bool, warn: Callable[[str], None]
) -> TransferDataset:
    """Open data set ``name`` of the config.

    Raises DataError when it has no train or test split, or they cannot make a classification.
    """
    train, val, test, draw = _open_splits(name, config, download, cache(warn))  # of several splits once
    if test is None:
        raise _make_missing_split_error(name, config, config.data.test_split.get(name, "test"))
    trainval = _match_split_classes(name, "train", train, train.classes, warn)
    if not isinstance(train, MultiLabelDataset) and len(trainval.labels) < len(trainval.classes):
        what = f"{name} has {len(trainval.labels)} images to train on, fewer than its {len(trainval.classes)} classes."
        raise DataError(what, "Give at least one image of every class.")
    num_train = len(trainval.labels)
    test_images = _match_split_classes(name, "test", test, trainval.classes, warn)
    if val is not None:
        trainval = _concat_labelled(trainval, _match_split_classes(name, "val", val, trainval.classes, warn))
    return TransferDataset(name, trainval, num_train, test_images, draw)


def _make_missing_split_error(name: str, config: TransferConfig, split: str) -> DataError:
    return DataError(
        f"{name} has no {split} split in {config.data.datasets[name]}.",
        "Give a folder or archive with train and test in it, a name with {split} where the two words go, or set "
        f"data.test_split={{{name}: val}} to test on another, or data.samples_per_class={{{name}: [30]}} to train "
        "on 30 images of each class.",
    )


def _open_splits(
    name: str, config: TransferConfig, download: bool, warn: Callable[[str], None]
) -> tuple[ImageDataset, ImageDataset | None, ImageDataset | None, str]:
    """Return train, val and test, None for what is not there; and how test was drawn, if the config does not say."""
    spec, test_split = config.data.datasets[name], config.data.test_split.get(name, "test")
    open_images = partial(open_dataset, download=download, decoding=config.data.decoding, warn=warn)
    if samples_per_class := config.data.samples_per_class.get(name, ()):
        source = open_images(spec)
        drawn_train, drawn_test = draw_train_test(name, source, samples_per_class, config.seed)
        return drawn_train, None, drawn_test, ""
    if spec.partition(":")[0] == "shapes":
        return open_images(spec, split="train"), None, open_images(spec, split="val"), ""
    spec = find_voc_folder(spec, download) or spec
    if spec.startswith("torchvision:") and not has_splits(spec):
        return _draw_test(name, open_images(spec), config, warn)
    folders = [] if "{split}" in spec else list_folders(spec)
    open_split = partial(_open_image_split, spec, folders, open_images)
    _, train = open_split(SPLIT_FOLDERS["train"], ())
    if name not in config.data.test_split and _is_without_splits(folders, train):
        return _draw_test(name, open_images(spec), config, warn)
    if isinstance(train, DataError):
        named = {get_split(posixpath.basename(folder)) for folder in folders}
        raise _make_missing_split_error(name, config, "train") if folders and "train" not in named else train
    test_names = (test_split, *SPLIT_FOLDERS.get(get_split(test_split) or "", ()))
    tested, test = open_split(test_names, train.classes)
    _, val = open_split([word for word in SPLIT_FOLDERS["val"] if word != tested], train.classes)
    others = [None if isinstance(other, DataError) else other for other in (val, test)]
    parts = [train, *(other for other in others if other is not None)]
    as_single_label = len(train.classes) > 1 and config.data.metrics.get(name) != "map11"
    if as_single_label and all(map(has_one_class_each, parts)):
        train = convert_to_single_label(train)
        others = [None if other is None else convert_to_single_label(other) for other in others]
    return train, others[0], others[1], ""


def _is_without_splits(folders: Sequence[str], train: ImageDataset | DataError) -> bool:
    """Return whether ``folders`` are those of classes, where ``train`` is what was found in a folder of this name."""
    names = {posixpath.basename(folder) for folder in folders}
    splits = set(map(get_split, names)) - {None}
    if len(names) < 2 or names & NO_CLASSES:
        return False
    if isinstance(train, DataError):
        return not splits
    is_flat = all("/" not in train.get_name(row) for row in range(len(train)))
    return splits == {"train"} and train.labels is None and is_flat  # trains, the vehicles


def _draw_test(
    name: str, source: ImageDataset, config: TransferConfig, warn: Callable[[str], None]
) -> tuple[ImageDataset, None, ImageDataset, str]:
    """Draw the test images of class folders without splits: a part of each class that the seed chooses."""
    if source.labels is None or len(source.classes) < 2:
        what = f"{name} has neither splits such as train and test nor class folders in {source.spec}."
        raise DataError(what, "Give a folder or archive with train and test in it, one folder per class in each.")
    rows = split_stratified(source.labels, config.data.val_fraction, config.seed, Stream.EVAL)
    train, test = map(source.select, rows)
    draw = f"{config.data.val_fraction:.0%} of each class to test on, drawn by seed {config.seed}"
    warn(f"{name}: {source.spec} has no splits; {len(test)} of its {len(source)} images, {draw} (data.val_fraction)")
    return train, None, test, draw


def draw_train_test(
    name: str, source: ImageDataset, draw: tuple[int, ...], seed: int
) -> tuple[ImageDataset, ImageDataset]:
    """Return images to train on, ``draw[0]`` of each class, and to test on: ``draw[1]`` of each, or all others.

    A deterministic split: it depends on the seed and the order of the images alone.
    """
    labels = match_classes(source, source.classes).labels
    counts = np.bincount(labels, minlength=len(source.classes))
    if counts.min() < max(sum(draw), draw[0] + 1):
        what = f"{name} has only {counts.min()} images of {source.classes[int(counts.argmin())]}"
        raise DataError(f"{what}, too few for data.samples_per_class {list(draw)}.", "Draw fewer.")
    train, taken = (sample_per_class(labels, np.full(len(counts), n), seed, Stream.EVAL) for n in (draw[0], sum(draw)))
    candidates = taken if len(draw) > 1 else np.arange(len(labels))
    return source.select(train), source.select(np.setdiff1d(candidates, train))


def split_trainval(data: TransferDataset, labels: str, val_fraction: float, seed: int) -> Split:
    """Split the labelled images into those to train on and those to choose on.

    With a labelled subset, the labels of val are not used at all.
    """
    if labels == "all" and data.num_train < len(data.trainval.labels):
        rows = np.arange(len(data.trainval.labels))
        return Split(rows[: data.num_train], rows[data.num_train :], "val")
    train = data.trainval.source.select(np.arange(data.num_train))
    truth = data.trainval.labels[: data.num_train]
    rows = select_labelled_rows(train, truth, labels, seed)
    train_rows, val_rows = split_stratified(truth[rows], val_fraction, seed)
    if not _is_usable_split(truth[rows], train_rows, val_rows):
        what = f"{data.name} with --labels {labels} has too few labels for a validation split."
        raise DataError(what, "Label at least two images of some class, and two classes.")
    of = "of each class of train" if truth.ndim == 1 else "of train"
    return Split(rows[train_rows], rows[val_rows], f"{val_fraction:.0%} {of}, cut by seed {seed}")


def _is_usable_split(labels: np.ndarray, train: np.ndarray, val: np.ndarray) -> bool:
    """Return whether a classifier can be trained on rows ``train`` of ``labels`` and evaluated on rows ``val``."""
    if labels.ndim == 1:
        return len(val) > 0 and len(np.unique(labels)) > 1
    learnable = (labels[train] > 0).any(0) & (labels[train] < 0).any(0)
    return bool((learnable & (labels[val] > 0).any(0)).any())


def _concat_labelled(train: LabelledDataset, val: LabelledDataset) -> LabelledDataset:
    labels = np.concatenate([train.labels, val.labels])
    if isinstance(train.source, MultiLabelDataset) and isinstance(val.source, MultiLabelDataset):
        images = ConcatDataset([train.source.images, val.source.images], ("train", "val"))
        return LabelledDataset(MultiLabelDataset(images, train.classes, labels), labels, train.classes)
    return LabelledDataset(ConcatDataset([train.source, val.source], ("train", "val"), labels), labels, train.classes)


def _match_split_classes(
    name: str, part: str, source: ImageDataset, classes: tuple[str, ...], warn: Callable[[str], None]
) -> LabelledDataset:
    if isinstance(source, MultiLabelDataset):
        images = match_multilabel_classes(source, classes)
    else:
        images = match_classes(source, classes)
    if images.unknown_classes:
        what = f"{name} has classes in {part} that are not in train, {images.unknown_classes[0]!r} among them."
        raise DataError(what, "Name its classes as those of train.")
    if images.missing_classes:
        number, first = len(images.missing_classes), images.missing_classes[0]
        warn(f"{name}: {number} classes have no image in {part}, {first!r} among them")
    return images


def _assign_folder_class(source: ImageDataset, classes: tuple[str, ...]) -> ImageDataset:
    """Return ``source``; if it is a single folder named as one of ``classes``, with these classes and their labels."""
    if source.labels is None and classes:
        folders = {source.get_name(row).partition("/")[0] for row in range(len(source))}
        if len(folders) == 1 and folders <= set(classes):
            number = classes.index(folders.pop())
            source.classes, source.labels = classes, np.full(len(source), number, dtype=np.int64)
    return source


def _open_image_split(
    spec: str, folders: Sequence[str], open_images: Callable[..., ImageDataset],
    words: Sequence[str], classes: tuple[str, ...],
) -> tuple[str, ImageDataset | DataError]:  # fmt: skip
    """Open the first of a split's names that is there; return this name, or the first error if none is.

    ``folders`` are those that ``spec`` has, and ``classes`` those of train, where this is another split.
    """
    errors: list[DataError] = []
    for word in dict.fromkeys(words):
        place = _locate_split(spec, word, folders)
        multilabel = open_multilabel(spec, place, word, classes, open_images)
        if multilabel is not None:
            return word, multilabel
        try:
            split: DatasetSplit = "train" if get_split(word) == "train" else "val"
            return word, _assign_folder_class(open_images(place, split=split), classes)
        except DataError as error:
            errors.append(error)
    return "", errors[0]


def _locate_split(spec: str, word: str, folders: Sequence[str]) -> str:
    """Return the spec of the split ``word`` in ``spec``, in the letter case in which it is there."""
    if "{split}" in spec:
        places = [spec.replace("{split}", spelling) for spelling in spell_split(word)]
        return next((place for place in places if os.path.exists(split_spec(place)[0])), places[0])
    names = {posixpath.basename(folder): folder for folder in folders}
    same = [folder for name, folder in names.items() if name.lower() == word.lower()]
    return join_spec(spec, names.get(word, same[0] if same else word))
