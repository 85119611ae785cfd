"""Data sets behind one face: an index gives a name, the file's bytes or pixels, and perhaps a label.

``open_dataset`` understands

    photos/                         a folder tree; a .zip or a plain .tar
    shards/{000..012}.tar           several of them as one: a range or a comma list in braces
    photos.zip#train                only what lies in a folder of it
    torchvision:DTD[:ROOT][#SPLIT]  a data set of torchvision by its class's name
    shapes[:key=value,...]          the embedded demo data
"""

from __future__ import annotations

import difflib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal

import numpy as np

from relicctl.data.archives import Container, Folder, Member, convert_os_errors, open_container
from relicctl.data.images import IMAGE_EXTENSIONS, decode_rgb
from relicctl.data.source_names import PackedNames, expand_braces, infer_classes
from relicctl.errors import DataError

DatasetSplit = Literal["train", "val"]


class ImageDataset(ABC):
    """An indexed set of images. Cheap to fork and to pickle; safe to read from many threads.

    ``spec``: what the user named. ``classes``: sorted names, ``()`` if unlabelled. ``labels``: int64 ``[N]``
    that index ``classes``, or None. ``namespace``: what tells its names from equal names of other pictures; none for
    files, whose names are their own.
    """

    spec: str
    namespace: str = ""
    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def get_name(self, index: int) -> str:
        """The sample's name: unique, printable, and the same wherever the data are mounted."""

    @abstractmethod
    def read(self, index: int) -> bytes | np.ndarray:
        """The image file's bytes, or its pixels as uint8 ``[H, W, 3]``. Raises BadImage."""

    def size(self, index: int) -> int:
        """Bytes of the sample as it is kept; 0 if it is made when read."""
        return 0

    def load(self, index: int) -> np.ndarray:
        """The pixels, uint8 ``[H, W, 3]``. Raises BadImage."""
        data = self.read(index)
        return decode_rgb(data) if isinstance(data, bytes) else data

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageDataset:
        """The samples at ``indices``, int ``[K]``, in that order, with the same classes."""
        return Subset(self, np.asarray(indices, dtype=np.int64))

    def compute_fingerprint(self) -> str:
        """SHA-256 (hex) over the samples' names, sizes and classes in their order; contents are not read."""
        names = ("", *self.classes)
        labels = np.zeros(len(self), dtype=np.int64) if self.labels is None else self.labels + 1
        digest = hashlib.sha256()
        for index, label in enumerate(labels.tolist()):
            digest.update(f"{self.get_name(index)}\0{self.size(index)}\0{names[label]}\n".encode())
        return digest.hexdigest()


class Subset(ImageDataset):
    """Some samples of ``source``, those at ``rows``: int64 ``[K]``."""

    def __init__(self, source: ImageDataset, rows: np.ndarray) -> None:
        self.dataset, self.indices = source, rows
        self.spec, self.namespace, self.classes = source.spec, source.namespace, source.classes
        self.labels = None if source.labels is None else source.labels[rows]

    def __len__(self) -> int:
        return len(self.indices)

    def get_name(self, index: int) -> str:
        return self.dataset.get_name(int(self.indices[index]))

    def read(self, index: int) -> bytes | np.ndarray:
        return self.dataset.read(int(self.indices[index]))

    def size(self, index: int) -> int:
        return self.dataset.size(int(self.indices[index]))

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageDataset:
        return Subset(self.dataset, self.indices[np.asarray(indices, dtype=np.int64)])


class FileDataset(ImageDataset):
    """Image files in folders and archives.

    ``members``: int64 ``[N, 6]``, the number of the container and the Member's fields. ``prefixes``: what
    each container's samples have before their own names, so that names are unique among several containers.
    """

    def __init__(
        self,
        spec: str,
        containers: Sequence[Container],
        prefixes: Sequence[str],
        names: PackedNames,
        members: np.ndarray,
        classes: tuple[str, ...],
        labels: np.ndarray | None,
    ) -> None:
        self.spec, self.classes, self.labels = spec, classes, labels
        self._containers, self._names, self._members = containers, names, members
        self._prefix_lengths = [len(PackedNames([prefix]).get_raw_name(0)) for prefix in prefixes]

    def __len__(self) -> int:
        return len(self._names)

    def get_name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        name = self._names.get_raw_name(index)
        place, *fields = self._members[index].tolist()
        return self._containers[place].read(name[self._prefix_lengths[place] :], Member(*fields))

    def size(self, index: int) -> int:
        return int(self._members[index, 1 + Member._fields.index("size")])


def open_dataset(spec: str, *, split: DatasetSplit = "train", download: bool = False) -> ImageDataset:
    """Open what ``spec`` names (see the module). ``split`` speaks to torchvision and the demo data.

    Raises DataError, with what to do about it, for anything that cannot be used.
    """
    kind, _, _ = spec.partition(":")
    if kind == "shapes":
        from relicctl.data.shapes import ShapesDataset  # it is a Source itself

        return ShapesDataset.from_spec(spec, split)
    if kind == "torchvision":
        from relicctl.data.source_torchvision import open_torchvision  # imports torch

        return open_torchvision(spec, split, download)
    return _open_files(spec)


def _open_files(spec: str) -> FileDataset:
    texts = [spec] if os.path.lexists(spec) else expand_braces(spec)
    places = list(dict.fromkeys(map(_parse_path, texts)))
    prefixes = _make_prefixes(places)
    containers: list[Container] = []
    found: dict[str, tuple[str, int, Member]] = {}  # by key; of two members with one name the later counts
    for number, (path, folder) in enumerate(places):
        container, entries = _index_container(path, folder)
        containers.append(container)
        found.update((prefixes[number] + name, (name, number, member)) for name, member in entries)
    keys = sorted(found)  # the same order for the same files, however they are packed
    classes, labels = infer_classes([found[key][0] for key in keys], spec)
    members = np.array([(found[key][1], *found[key][2]) for key in keys], dtype=np.int64)
    return FileDataset(spec, containers, prefixes, PackedNames(keys), members, classes, labels)


def _parse_path(text: str) -> tuple[str, str]:
    path, folder = text, ""
    if "#" in text and not os.path.lexists(text):
        path, _, folder = text.rpartition("#")
    return os.path.expanduser(path), folder.strip("/")


def _make_prefixes(places: list[tuple[str, str]]) -> list[str]:
    """What tells several places apart, without the path that they share; nothing for a single one."""
    if len(places) == 1:
        return [""]
    full = [os.path.abspath(os.path.join(path, folder)) for path, folder in places]
    shared = os.path.commonpath([os.path.dirname(path) for path in full])
    return [os.path.relpath(path, shared).replace(os.sep, "/") + "/" for path in full]


def _index_container(path: str, folder: str) -> tuple[Container, list[tuple[str, Member]]]:
    """The images at ``path``, or those in its ``folder``, named from there. Raises DataError if none is."""
    if not os.path.exists(path):
        raise _make_missing_path_error(path)
    container = open_container(path)
    if folder and isinstance(container, Folder):
        inner = os.path.join(path, folder)
        if not os.path.isdir(inner):
            raise _make_missing_folder_error(path, folder, _list_folders(path))
        container = Folder(inner)
    entries = list(container.iter_images())
    if folder and not isinstance(container, Folder):
        start = folder + "/"
        inside = [(name[len(start) :], member) for name, member in entries if name.startswith(start)]
        if entries and not inside:
            folders = {str(parent) for name, _ in entries for parent in PurePosixPath(name).parents}
            raise _make_missing_folder_error(path, folder, sorted(folders - {"."}))
        entries = inside
    if not entries:
        empty = isinstance(container, Folder) and not os.listdir(container.path)
        raise DataError(
            f"{path}{'#' * bool(folder)}{folder} {'is empty' if empty else 'holds no images'}.",
            f"Give a folder, .zip or .tar with files that end in {', '.join(IMAGE_EXTENSIONS)}.",
        )
    return container, entries


def _list_folders(path: str) -> list[str]:
    with convert_os_errors(path), os.scandir(path) as listing:
        return sorted(entry.name for entry in listing if os.path.isdir(entry.path))


def _make_missing_path_error(path: str) -> DataError:
    folder, name = os.path.split(path.rstrip("/"))
    try:
        near = difflib.get_close_matches(name, os.listdir(folder or "."))
    except OSError:
        near = []
    return DataError(
        f"There is no folder or archive '{path}'.",
        "Check the path" + (f"; near it are {', '.join(near)}." if near else "."),
    )


def _make_missing_folder_error(path: str, folder: str, folders: list[str]) -> DataError:
    near = difflib.get_close_matches(folder, folders) or folders[:5]
    return DataError(
        f"{path} has no folder {folder}.",
        f"Name one that holds images, such as {', '.join(near)}." if near else f"Give {path} alone.",
    )
