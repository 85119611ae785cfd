"""The data sets of torchvision: ``torchvision:NAME[:ROOT][#SPLIT]``.

torchvision finds, downloads and lists; the images are then read by our decoder, from the files or arrays
that the data set holds.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from torchvision import datasets

from relicctl.data.datasets.archives import Folder, Member
from relicctl.data.datasets.base import DatasetSplit, FileDataset, ImageDataset, PackedNames
from relicctl.errors import DataError

DEFAULT_ROOT = "~/.cache/relicctl/torchvision"
EXCLUDED_DATASETS = ("DatasetFolder", "ImageFolder", "VisionDataset", "EMNIST")  # EMNIST calls its alphabets splits
SPLIT_ALIASES = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid", "test")}
SAMPLE_PAIRS = ("samples", "_samples", "imgs")  # attributes that hold (path, label)


class ArrayDataset(ImageDataset):
    """Images of one size in memory: uint8 ``[N, H, W, 3]``, or ``[N, H, W]`` for grey ones.

    They have no names, so they are numbered within ``title``.
    """

    def __init__(self, spec: str, title: str, images: np.ndarray) -> None:
        self.spec, self._title, self._images = spec, title, images

    def __len__(self) -> int:
        return len(self._images)

    def get_name(self, index: int) -> str:
        return f"{self._title}/{index:07d}"

    def read(self, index: int) -> np.ndarray:
        image = self._images[index]
        return np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else np.array(image, order="C")

    def size(self, index: int) -> int:
        return int(self._images[index].nbytes)


def open_torchvision(spec: str, split: DatasetSplit, download: bool) -> ImageDataset:
    """Open a data set by the name of its class.

    ``#SPLIT`` names one of its splits, else ``split`` chooses: train or trainval for "train"; val, or
    test where there is no val, for "val". Raises DataError, also for ``#val`` of a data set that has none: it would
    be the test images, on which nothing may be chosen.
    """
    place, _, named_split = spec.partition("#")
    _, name, root = [*place.split(":", 2), ""][:3]
    root = os.path.abspath(os.path.expanduser(root or DEFAULT_ROOT))
    dataset = _build_dataset(name, root, split, named_split, download)
    labels, paths = _get_labels(dataset), _get_paths(dataset)
    class_names = _get_attribute(dataset, "classes", "categories") or ()
    classes = tuple(known if isinstance(known, str) else known[0] for known in class_names)  # of several the first
    if name == "SUN397" and labels is not None:  # its order is that in which the file system lists them
        order = sorted(range(len(paths)), key=paths.__getitem__)
        paths, labels = [paths[row] for row in order], labels[order]
    if labels is None:
        classes = ()
    elif not classes:
        classes = tuple(str(number) for number in range(int(labels.max()) + 1))
    images = _get_attribute(dataset, "data")
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim in (3, 4):
        if images.ndim == 4 and images.shape[1] == 3:  # some keep the channels first
            images = images.transpose(0, 2, 3, 1)
        opened: ImageDataset = ArrayDataset(spec, f"{name}-{named_split or split}", images)
    elif not isinstance(paths, list) or not paths or not isinstance(paths[0], str | os.PathLike):
        raise _make_unsupported_error(name, root)
    else:
        names = [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]
        sizes = [os.path.getsize(path) if os.path.exists(path) else 0 for path in paths]
        members = np.array([(0, *Member(0, size, size)) for size in sizes], dtype=np.int64)
        opened = FileDataset(spec, [("", Folder(root))], PackedNames(names), members)
    opened.classes, opened.labels = classes, labels
    return opened


def has_splits(spec: str) -> bool:
    """Return whether the data set brings splits; also for one that there is not, whose opening says so."""
    parameters = _get_parameters(spec.partition("#")[0].split(":")[1])
    return not parameters or not {"train", "split"}.isdisjoint(parameters)


def _build_dataset(name: str, root: str, split: DatasetSplit, named_split: str, download: bool) -> Any:
    included = [known for known in datasets.__all__ if known not in EXCLUDED_DATASETS]
    usable = [known for known in included if "root" in _get_parameters(known)]
    if name not in usable:
        lower = {known.lower(): known for known in usable}
        near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower)]
        what = f"torchvision has no image data set {name!r}."
        raise DataError(what, f"Write its class's name, such as {', '.join(near or ['CIFAR10', 'STL10', 'DTD'])}.")
    parameters = _get_parameters(name)
    fixed = {"root": root} | ({"download": download} if "download" in parameters else {})
    refusal = ""
    for choice in _list_split_kwargs(name, parameters, split, named_split):
        try:
            with redirect_stdout(sys.stderr):  # torchvision prints, and stdout is for results
                return getattr(datasets, name)(**fixed, **choice)
        except ValueError as error:
            if "download" in str(error):  # its place on the network no longer exists
                raise make_unavailable_error(name, root, False, download, error) from error
            refusal = str(error)  # no such split: perhaps the next name for it
        except ImportError as error:
            what = f"torchvision needs another package for {name}: {error}."
            raise DataError(what, "Install that package.") from error
        except TypeError as error:
            raise _make_unsupported_error(name, root) from error
        except (RuntimeError, OSError) as error:
            raise make_unavailable_error(name, root, "download" in parameters, download, error) from error
    raise DataError(f"torchvision's {name} does not have that split: {refusal.rstrip('.')}.", "Name another.")


def _get_parameters(name: str) -> dict[str, inspect.Parameter]:
    found = getattr(datasets, name, None)
    return dict(inspect.signature(found).parameters) if inspect.isclass(found) else {}


def _list_split_kwargs(
    name: str, parameters: dict[str, Any], split: DatasetSplit, named_split: str
) -> list[dict[str, Any]]:
    """Return the constructor's arguments to try, one after the other."""
    if "train" in parameters and named_split in ("", "train", "test"):
        return [{"train": (named_split or split) == "train"}]
    if "split" in parameters:
        return [{"split": choice} for choice in ([named_split] if named_split else SPLIT_ALIASES[split])]
    if named_split or split == "val":
        hold_out = "Use it as training data, and hold out a part of it with eval.val_fraction."
        fix = f"Leave out #{named_split}." if named_split else hold_out
        raise DataError(f"torchvision's {name} does not have the split {named_split or split}.", fix)
    return [{}]


def _get_attribute(dataset: Any, *names: str) -> Any:
    """Return the first of these attributes that the data set has: a sequence, tensors as arrays; or None."""
    for name in names:
        value = getattr(dataset, name, None)
        if value is not None and not callable(value):
            return value.numpy() if hasattr(value, "numpy") else value
    return None


def _get_labels(dataset: Any) -> np.ndarray | None:
    """Return int64 ``[N]``, or None if some sample has no class."""
    pairs = _get_attribute(dataset, *SAMPLE_PAIRS)
    raw = [label for _, label in pairs] if pairs else _get_attribute(dataset, "targets", "labels", "_labels", "y")
    labels = np.asarray([] if raw is None else raw)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0 or labels.min() < 0:
        return None
    return labels.astype(np.int64)


def _get_paths(dataset: Any) -> Any:
    if isinstance(dataset, datasets.Caltech101):  # it numbers the files of each class
        folders = [os.path.join(dataset.root, "101_ObjectCategories", name) for name in dataset.categories]
        numbered = zip(dataset.y, dataset.index, strict=True)
        return [os.path.join(folders[label], f"image_{number:04d}.jpg") for label, number in numbered]
    pairs = _get_attribute(dataset, *SAMPLE_PAIRS)
    return [path for path, _ in pairs] if pairs else _get_attribute(dataset, "_image_files", "_images", "data")


def _make_unsupported_error(name: str, root: str) -> DataError:
    what = f"torchvision's {name} is not a list of images with one class each."
    return DataError(what, f"If it lies unpacked under {root}, name the folder of its images instead.")


def make_unavailable_error(name: str, root: str, downloadable: bool, attempted: bool, error: Exception) -> DataError:
    """Make a DataError of torchvision's ``error`` for missing data; ``attempted``: to download them."""
    if not downloadable:
        fix = f"torchvision cannot download it: fetch it by hand into {root}."
    elif attempted:
        fix = f"Check the network, or fetch it elsewhere and copy it to {root}."
    else:
        fix = f"Run again with --download, or say where it is: torchvision:{name}:FOLDER."
    what = str(error).split(". ")[0].rstrip(".") if attempted else f"it is not complete in {root}"
    return DataError(f"torchvision's {name} cannot be used: {what}.", fix)
