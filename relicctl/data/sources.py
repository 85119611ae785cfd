"""Data sets behind one face: an index gives a name, the file's bytes or pixels, and perhaps a label.

``open_source`` understands

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

from relicctl.data.archives import Container, Folder, Member, open_container, refusing
from relicctl.data.images import EXTENSIONS, decode_rgb
from relicctl.data.source_names import PackedNames, classes_of, expand_braces
from relicctl.errors import DataError

Split = Literal["train", "val"]


class Source(ABC):
    """An indexed set of images. Cheap to fork and to pickle; safe to read from many threads.

    ``spec``: what the user named. ``classes``: sorted names, ``()`` if unlabelled. ``labels``: int64 ``[N]``
    that index ``classes``, or None. ``realm``: what tells its names from equal names of other pictures; none for
    files, whose names are their own.
    """

    spec: str
    realm: str = ""
    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
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

    def select(self, indices: Sequence[int] | np.ndarray) -> Source:
        """The samples at ``indices``, int ``[K]``, in that order, with the same classes."""
        return Selection(self, np.asarray(indices, dtype=np.int64))

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the samples' names, sizes and classes in their order; contents are not read."""
        names = ("", *self.classes)
        labels = np.zeros(len(self), dtype=np.int64) if self.labels is None else self.labels + 1
        digest = hashlib.sha256()
        for index, label in enumerate(labels.tolist()):
            digest.update(f"{self.key(index)}\0{self.size(index)}\0{names[label]}\n".encode())
        return digest.hexdigest()


class Selection(Source):
    """Some samples of ``source``, those at ``rows``: int64 ``[K]``."""

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        self.source, self.rows = source, rows
        self.spec, self.realm, self.classes = source.spec, source.realm, source.classes
        self.labels = None if source.labels is None else source.labels[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return self.source.key(int(self.rows[index]))

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(int(self.rows[index]))

    def size(self, index: int) -> int:
        return self.source.size(int(self.rows[index]))

    def select(self, indices: Sequence[int] | np.ndarray) -> Source:
        return Selection(self.source, self.rows[np.asarray(indices, dtype=np.int64)])


class FileSource(Source):
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
        self._own_name = [len(PackedNames([prefix]).raw(0)) for prefix in prefixes]

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        name = self._names.raw(index)
        place, *fields = self._members[index].tolist()
        return self._containers[place].read(name[self._own_name[place] :], Member(*fields))

    def size(self, index: int) -> int:
        return int(self._members[index, 1 + Member._fields.index("size")])


def open_source(spec: str, *, split: Split = "train", download: bool = False) -> Source:
    """Open what ``spec`` names (see the module). ``split`` speaks to torchvision and the demo data.

    Raises DataError, with what to do about it, for anything that cannot be used.
    """
    kind, _, _ = spec.partition(":")
    if kind == "shapes":
        from relicctl.data.shapes import ShapesSource  # it is a Source itself

        return ShapesSource.from_spec(spec, split)
    if kind == "torchvision":
        from relicctl.data.source_torchvision import open_torchvision  # imports torch

        return open_torchvision(spec, split, download)
    return _open_files(spec)


def _open_files(spec: str) -> FileSource:
    texts = [spec] if os.path.lexists(spec) else expand_braces(spec)
    places = list(dict.fromkeys(map(_path_and_folder, texts)))
    prefixes = _prefixes(places)
    containers: list[Container] = []
    found: dict[str, tuple[str, int, Member]] = {}  # by key; of two members with one name the later counts
    for number, (path, folder) in enumerate(places):
        container, entries = _index(path, folder)
        containers.append(container)
        found.update((prefixes[number] + name, (name, number, member)) for name, member in entries)
    keys = sorted(found)  # the same order for the same files, however they are packed
    classes, labels = classes_of([found[key][0] for key in keys], spec)
    members = np.array([(found[key][1], *found[key][2]) for key in keys], dtype=np.int64)
    return FileSource(spec, containers, prefixes, PackedNames(keys), members, classes, labels)


def _path_and_folder(text: str) -> tuple[str, str]:
    path, folder = text, ""
    if "#" in text and not os.path.lexists(text):
        path, _, folder = text.rpartition("#")
    return os.path.expanduser(path), folder.strip("/")


def _prefixes(places: list[tuple[str, str]]) -> list[str]:
    """What tells several places apart, without the path that they share; nothing for a single one."""
    if len(places) == 1:
        return [""]
    full = [os.path.abspath(os.path.join(path, folder)) for path, folder in places]
    shared = os.path.commonpath([os.path.dirname(path) for path in full])
    return [os.path.relpath(path, shared).replace(os.sep, "/") + "/" for path in full]


def _index(path: str, folder: str) -> tuple[Container, list[tuple[str, Member]]]:
    """The images at ``path``, or those in its ``folder``, named from there. Raises DataError if none is."""
    if not os.path.exists(path):
        raise _missing(path)
    container = open_container(path)
    if folder and isinstance(container, Folder):
        inner = os.path.join(path, folder)
        if not os.path.isdir(inner):
            raise _no_folder(path, folder, _folders_in(path))
        container = Folder(inner)
    entries = list(container.index())
    if folder and not isinstance(container, Folder):
        start = folder + "/"
        inside = [(name[len(start) :], member) for name, member in entries if name.startswith(start)]
        if entries and not inside:
            folders = {str(parent) for name, _ in entries for parent in PurePosixPath(name).parents}
            raise _no_folder(path, folder, sorted(folders - {"."}))
        entries = inside
    if not entries:
        empty = isinstance(container, Folder) and not os.listdir(container.path)
        raise DataError(
            f"{path}{'#' * bool(folder)}{folder} {'is empty' if empty else 'holds no images'}.",
            f"Give a folder, .zip or .tar with files that end in {', '.join(EXTENSIONS)}.",
        )
    return container, entries


def _folders_in(path: str) -> list[str]:
    with refusing(path), os.scandir(path) as listing:
        return sorted(entry.name for entry in listing if os.path.isdir(entry.path))


def _missing(path: str) -> DataError:
    folder, name = os.path.split(path.rstrip("/"))
    try:
        near = difflib.get_close_matches(name, os.listdir(folder or "."))
    except OSError:
        near = []
    return DataError(
        f"There is no folder or archive '{path}'.",
        "Check the path" + (f"; near it are {', '.join(near)}." if near else "."),
    )


def _no_folder(path: str, folder: str, folders: list[str]) -> DataError:
    near = difflib.get_close_matches(folder, folders) or folders[:5]
    return DataError(
        f"{path} has no folder {folder}.",
        f"Name one that holds images, such as {', '.join(near)}." if near else f"Give {path} alone.",
    )
