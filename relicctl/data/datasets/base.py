"""Data sets behind one face: an index gives a name, the file's bytes or pixels, and perhaps a label.

``open_dataset`` understands

    photos/                         a folder tree; a .zip or a plain .tar
    shards/{000..012}.tar           several of them as one: a range or a comma list in braces
    photos.zip#train                only what lies in a folder of it
    torchvision:DTD[:ROOT][#SPLIT]  a data set of torchvision by its class's name
    shapes[:key=value,...]          the embedded demo data
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from relicctl.data.datasets.archives import Container, Member
from relicctl.data.decoding import decode_rgb

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


class ConcatDataset(ImageDataset):
    """The samples of ``sources`` one after the other, without labels.

    A sample's name begins with its source's place in the order, ``0/``, ``1/`` and so on: names stay unique, and do
    not depend on where the data are mounted.
    """

    def __init__(self, datasets: Sequence[ImageDataset]) -> None:
        self.datasets = tuple(datasets)
        self.spec = ", ".join(source.spec for source in datasets)
        self._ends = np.cumsum([len(source) for source in datasets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def get_name(self, index: int) -> str:
        place, inner = self._locate(index)
        return f"{place}/{self.datasets[place].get_name(inner)}"

    def read(self, index: int) -> bytes | np.ndarray:
        place, inner = self._locate(index)
        return self.datasets[place].read(inner)

    def size(self, index: int) -> int:
        place, inner = self._locate(index)
        return self.datasets[place].size(inner)

    def compute_fingerprint(self) -> str:
        """SHA-256 (hex) over the fingerprints of the sources in their order."""
        return hashlib.sha256("\n".join(source.compute_fingerprint() for source in self.datasets).encode()).hexdigest()

    def _locate(self, index: int) -> tuple[int, int]:
        """The source that holds sample ``index``, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = int(np.searchsorted(self._ends, index, side="right"))
        return place, index - int(self._ends[place - 1] if place else 0)


class TrainValDataset(ImageDataset):
    """One source after the other; they share their classes."""

    def __init__(self, first: ImageDataset, second: ImageDataset, labels: np.ndarray | None) -> None:
        self._sources, self._first = (first, second), len(first)
        self.spec, self.classes, self.labels = first.spec, first.classes, labels

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def _locate(self, index: int) -> tuple[ImageDataset, int]:
        return (self._sources[0], index) if index < self._first else (self._sources[1], index - self._first)

    def get_name(self, index: int) -> str:
        source, row = self._locate(index)
        return f"{'train' if index < self._first else 'val'}/{source.get_name(row)}"

    def read(self, index: int) -> bytes | np.ndarray:
        source, row = self._locate(index)
        return source.read(row)

    def size(self, index: int) -> int:
        source, row = self._locate(index)
        return source.size(row)


class PackedNames(Sequence[str]):
    """Names in one bytes object with offsets.

    A list of a million strings costs every forked worker a copy of them all, since counting a reference
    writes to each string's page.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._blob = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def get_raw_name(self, index: int) -> bytes:
        """The name as the file system or archive spells it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._blob[self._ends[index] : self._ends[index + 1]]

    def __getitem__(self, index):
        """The name as text that can always be printed."""
        return self.get_raw_name(index).decode("utf-8", "backslashreplace")
