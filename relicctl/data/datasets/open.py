"""``open_dataset``: from the data set specs that users write to data sets.

photos/                         a folder tree; a .zip or a plain .tar
shards/{000..012}.tar           several of them as one: a range or a comma list in braces
photos.zip#train                only what lies in a folder of it
torchvision:DTD[:ROOT][#SPLIT]  a data set of torchvision by its class's name
shapes[:key=value,...]          the embedded demo data
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
import posixpath
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import PurePosixPath

import numpy as np

from relicctl.config.base import DecodingConfig
from relicctl.data.datasets.archives import Container, Folder, Member, convert_os_errors, open_container, split_spec
from relicctl.data.datasets.base import DatasetSplit, FileDataset, ImageDataset, PackedNames
from relicctl.data.decoding import IMAGE_EXTENSIONS, Decoder
from relicctl.errors import DataError

MAX_SHARDS = 100_000  # a mistyped range must not fill the memory
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "unlabeled", "unlabelled"}
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def infer_classes(names: Sequence[str], spec: str) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Return the sorted class names and the label of every name, int64 ``[N]``; ``(), None`` if unlabelled.

    The class is the first folder level. Folders that enclose everything are removed first: ``photos/cat/1.jpg``
    and ``photos/dog/2.jpg`` are a cat and a dog, and a single folder of images is no class. As soon as one
    image lies beside the class folders, the data count as unlabelled.
    Raises DataError if the folders are splits such as train and test: together they would leak.
    """
    enclosing = posixpath.commonpath({name.rpartition("/")[0] for name in names})
    start = len(enclosing) + 1 if enclosing else 0
    folders = [name[start : name.find("/", start)] if "/" in name[start:] else "" for name in names]
    classes = sorted(set(folders))
    if classes[0] == "":
        return (), None
    if SPLIT_NAMES.issuperset(map(str.lower, classes)):
        first = min(classes, key=lambda name: not name.lower().startswith("train"))
        inner = f"{enclosing}/{first}" if enclosing else first
        what = f"The folders of {spec} are splits, not classes: {', '.join(classes)}."
        raise DataError(what, f"Name one of them, for example {spec}#{inner}.")
    number = {name: label for label, name in enumerate(classes)}
    return tuple(classes), np.array([number[folder] for folder in folders], dtype=np.int64)


def expand_braces(text: str) -> list[str]:
    """Expand ``a{0..2}`` -> a0 a1 a2, ``{08..10}`` -> 08 09 10, ``{x,y}`` -> x y: every combination, as in a shell.

    Braces without a range or a comma stand for themselves; braces within braces are not expanded.
    Raises DataError beyond MAX_SHARDS names.
    """
    pieces = _BRACES.split(text)  # literal, inside, literal, inside, ..., literal
    choices = [_expand_brace(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise DataError(f"{text} stands for more than {MAX_SHARDS} names.", "Check the numbers in the braces.")
    return ["".join(choice) for choice in itertools.product(*choices)]


def _expand_brace(inside: str) -> Sequence[str]:
    if bounds := _RANGE.fullmatch(inside):
        first, last = int(bounds[1]), int(bounds[2])
        padded = any(len(bound) > 1 and bound.startswith("0") for bound in bounds.groups())
        width = max(map(len, bounds.groups())) if padded else 0
        step = 1 if last >= first else -1
        # One more than allowed is enough for the error; the whole range might not fit in memory.
        numbers = itertools.islice(range(first, last + step, step), MAX_SHARDS + 1)
        return [f"{number:0{width}d}" for number in numbers]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]


def open_dataset(
    spec: str,
    *,
    split: DatasetSplit = "train",
    download: bool = False,
    decoding: DecodingConfig = DecodingConfig(),  # noqa: B008 (immutable)
) -> ImageDataset:
    """Open the data set that ``spec`` names; the module's docstring lists the forms of specs.

    Args:
        spec: A folder, an archive, a data set of torchvision or the demo data.
        split: Which part of torchvision's data sets and of the demo data; other specs name it themselves.
        download: Whether torchvision may download what is missing.
        decoding: How image files are read.

    Returns:
        The data set. Its images are not read yet.

    Raises:
        DataError: For anything that cannot be used, with what to do about it.
    """
    dataset = _open_spec(spec, split, download)
    dataset.decode = Decoder(**decoding.model_dump())
    return dataset


def _open_spec(spec: str, split: DatasetSplit, download: bool) -> ImageDataset:
    kind, _, _ = spec.partition(":")
    if kind == "shapes":
        from relicctl.data.datasets.shapes import ShapesDataset

        return ShapesDataset.from_spec(spec, split)
    if kind == "torchvision":
        from relicctl.data.datasets.torchvision import open_torchvision  # imports torch

        return open_torchvision(spec, split, download)
    return _open_files(spec)


def _open_files(spec: str) -> FileDataset:
    texts = [spec] if os.path.lexists(spec) else expand_braces(spec)
    places = list(dict.fromkeys(map(split_spec, texts)))
    prefixes = _make_prefixes(places)
    containers: list[tuple[str, Container]] = []
    images: dict[str, tuple[str, int, Member]] = {}  # by name; of two members with one name the later counts
    for number, (path, folder) in enumerate(places):
        container, entries = _index_container(path, folder)
        containers.append((prefixes[number], container))
        images.update((prefixes[number] + name, (name, number, member)) for name, member in entries)
    names = sorted(images)  # the same order for the same files, however they are packed
    members = np.array([(images[name][1], *images[name][2]) for name in names], dtype=np.int64)
    dataset = FileDataset(spec, containers, PackedNames(names), members)
    dataset.classes, dataset.labels = infer_classes([images[name][0] for name in names], spec)
    return dataset


def _make_prefixes(places: list[tuple[str, str]]) -> list[str]:
    """Return what distinguishes several places, without the path that they share; empty for a single one."""
    if len(places) == 1:
        return [""]
    full = [os.path.abspath(os.path.join(path, folder)) for path, folder in places]
    shared = os.path.commonpath([os.path.dirname(path) for path in full])
    return [os.path.relpath(path, shared).replace(os.sep, "/") + "/" for path in full]


def _index_container(path: str, folder: str) -> tuple[Container, list[tuple[str, Member]]]:
    """List the images at ``path``, or those in its ``folder``, named from there. Raises DataError if there are none."""
    if not os.path.exists(path):
        parent, name = os.path.split(path.rstrip("/"))
        siblings: list[str] = []
        with suppress(OSError):
            siblings = os.listdir(parent or ".")
        near = ", ".join(difflib.get_close_matches(name, siblings))
        fix = f"Check the path; near it are {near}." if near else "Check the path."
        raise DataError(f"There is no folder or archive '{path}'.", fix)
    container = open_container(path)
    if folder and isinstance(container, Folder):
        inner = os.path.join(path, folder)
        if not os.path.isdir(inner):
            with convert_os_errors(path), os.scandir(path) as listing:
                folders = sorted(entry.name for entry in listing if os.path.isdir(entry.path))
            raise _make_missing_folder_error(path, folder, folders)
        container = Folder(inner)
    entries = list(container.iter_images())
    if folder and not isinstance(container, Folder):
        start = folder + "/"
        inside = [(name[len(start) :], member) for name, member in entries if name.startswith(start)]
        if entries and not inside:
            parents = {str(parent) for name, _ in entries for parent in PurePosixPath(name).parents}
            raise _make_missing_folder_error(path, folder, sorted(parents - {"."}))
        entries = inside
    if not entries:
        empty = isinstance(container, Folder) and not os.listdir(container.path)
        what = f"{path}{'#' * bool(folder)}{folder} {'is empty' if empty else 'holds no images'}."
        raise DataError(what, f"Give a folder, .zip or .tar with files that end in {', '.join(IMAGE_EXTENSIONS)}.")
    return container, entries


def _make_missing_folder_error(path: str, folder: str, folders: list[str]) -> DataError:
    near = difflib.get_close_matches(folder, folders) or folders[:5]
    fix = f"Name one that holds images, such as {', '.join(near)}." if near else f"Give {path} alone."
    return DataError(f"{path} has no folder {folder}.", fix)


def join_spec(spec: str, folder: str) -> str:
    """Return the spec of ``folder`` within the data that ``spec`` names."""
    return f"{spec}{'/' if '#' in spec else '#'}{folder}" if folder else spec


def parse_first_words(content: bytes) -> list[str]:
    """Return the first word of every line that has one."""
    return [line.split()[0] for line in content.decode("utf-8", "replace").splitlines() if line.strip()]


def summarize_names(names: list[str]) -> str:
    """Return their number and the first."""
    return f"{len(names)} ({names[0]} among them)" if len(names) > 1 else names[0]
