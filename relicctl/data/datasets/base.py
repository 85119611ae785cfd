"""One interface to all data sets: an index gives a name, the file's bytes or the pixels, and perhaps a label."""

from __future__ import annotations

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from relicctl.data.datasets.archives import Container, Member
from relicctl.data.decoding import Decoder

DatasetSplit = Literal["train", "val"]


class ImageDataset(ABC):
    """An indexed set of images. Cheap to fork and to pickle; safe to read from many threads.

    Attributes:
        spec: What the user named.
        namespace: What distinguishes its names from equal names of other images; empty for files.
        classes: Sorted names, ``()`` if unlabelled.
        labels: int64 ``[N]`` that index ``classes``, or None.
        decode: From a file's bytes to pixels.
    """

    spec: str
    namespace: str = ""
    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    decode: Decoder = Decoder()

    @property
    def specs(self) -> tuple[str, ...]:
        """What the user named, one by one where it was several data sets."""
        return (self.spec,)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def get_name(self, index: int) -> str:
        """Return the sample's name: unique, printable, and the same wherever the data are mounted."""

    @abstractmethod
    def read(self, index: int) -> bytes | np.ndarray:
        """Return the image file's bytes, or the pixels as uint8 ``[H, W, 3]``. Raises BadImageError."""

    def size(self, index: int) -> int:
        """Return the bytes that the sample takes in storage; 0 if it is generated when read."""
        return 0

    def load(self, index: int) -> np.ndarray:
        """Return the pixels, uint8 ``[H, W, 3]``. Raises BadImageError."""
        data = self.read(index)
        return self.decode(data) if isinstance(data, bytes) else data

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageDataset:
        """Return the samples at ``indices``, int ``[K]``, in that order, with the same classes."""
        return Subset(self, np.asarray(indices, dtype=np.int64))

    def compute_fingerprint(self) -> str:
        """Return the SHA-256 (hex) over the samples' names, sizes and classes in their order; contents are not read.

        A white point that was set counts too.
        """
        names = ("", *self.classes)
        labels = np.zeros(len(self), dtype=np.int64) if self.labels is None else self.labels + 1
        digest = hashlib.sha256()
        for index, label in enumerate(labels.tolist()):
            digest.update(f"{self.get_name(index)}\0{self.size(index)}\0{names[label]}\n".encode())
        if self.decode.white_point is not None:  # other pixels from the same files
            digest.update(f"white {self.decode.white_point}\n".encode())
        return digest.hexdigest()


class Subset(ImageDataset):
    """The samples of ``dataset`` at ``indices``: int64 ``[K]``."""

    def __init__(self, dataset: ImageDataset, indices: np.ndarray) -> None:
        self.dataset, self.indices = dataset, indices
        self.spec, self.namespace, self.classes = dataset.spec, dataset.namespace, dataset.classes
        self.decode = dataset.decode
        self.labels = None if dataset.labels is None else dataset.labels[indices]

    @property
    def specs(self) -> tuple[str, ...]:
        return self.dataset.specs

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

    Args:
        spec: What the user named.
        containers: Each with the prefix of its samples' names, which makes them unique among several containers.
        names: All samples' names, prefixes included.
        members: int64 ``[N, 6]``, the number of the container and the fields of its Member.
    """

    def __init__(
        self, spec: str, containers: Sequence[tuple[str, Container]], names: PackedNames, members: np.ndarray
    ) -> None:
        self.spec = spec
        self._containers = [container for _, container in containers]
        self._prefix_lengths = [len(PackedNames([prefix]).get_raw_name(0)) for prefix, _ in containers]
        self._names, self._members = names, members

    def __len__(self) -> int:
        return len(self._names)

    def get_name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        name = self._names.get_raw_name(index)
        place, *fields = self._members[index].tolist()
        return self._containers[int(place)].read(name[self._prefix_lengths[place] :], Member(*fields))

    def size(self, index: int) -> int:
        return int(self._members[index, 1 + Member._fields.index("size")])


class ConcatDataset(ImageDataset):
    """The samples of several data sets one after the other.

    Args:
        datasets: At least one.
        splits: Names of the data sets where they are splits of one, whose spec and classes are the first's. A sample's
            name begins with its split, as in ``train/``; else with the data set's place in the order, ``0/``, ``1/``
            and so on: names are unique, and do not depend on where the data are mounted.
        labels: int64 ``[N]``, or None.
    """

    def __init__(
        self, datasets: Sequence[ImageDataset], splits: Sequence[str] = (), labels: np.ndarray | None = None
    ) -> None:
        self.datasets, self._splits, self.labels = tuple(datasets), tuple(splits), labels
        self.spec = datasets[0].spec if splits else ", ".join(dataset.spec for dataset in datasets)
        self.classes = datasets[0].classes if splits else ()
        self.decode = datasets[0].decode
        self._ends = np.cumsum([len(dataset) for dataset in datasets])

    @property
    def specs(self) -> tuple[str, ...]:
        return (self.spec,) if self._splits else tuple(dataset.spec for dataset in self.datasets)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def get_name(self, index: int) -> str:
        place, inner = self._locate(index)
        return f"{self._splits[place] if self._splits else place}/{self.datasets[place].get_name(inner)}"

    def read(self, index: int) -> bytes | np.ndarray:
        place, inner = self._locate(index)
        return self.datasets[place].read(inner)

    def size(self, index: int) -> int:
        place, inner = self._locate(index)
        return self.datasets[place].size(inner)

    def compute_fingerprint(self) -> str:
        """Return the SHA-256 (hex) over the data sets' fingerprints in their order; of splits over their samples."""
        if self._splits:
            return super().compute_fingerprint()
        fingerprints = "\n".join(dataset.compute_fingerprint() for dataset in self.datasets)
        return hashlib.sha256(fingerprints.encode()).hexdigest()

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the place of the data set that holds sample ``index``, and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = int(np.searchsorted(self._ends, index, side="right"))
        return place, index - int(self._ends[place - 1] if place else 0)


def normalize_unicode(name: str) -> str:
    """Return ``name`` with composed letters: macOS writes é as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def find_by_name(known: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Return where each wanted name stands in ``known``, -1 for nowhere.

    Names are alike if only their letters are composed otherwise, or if ``\\`` separates the folders of the wanted one.
    """
    places = {name: place for place, name in enumerate(known)}
    if places.keys() >= set(wanted):
        return [places[name] for name in wanted]
    alike = {normalize_unicode(name): place for name, place in places.items()}
    return [places.get(name, alike.get(normalize_unicode(name.replace("\\", "/")), -1)) for name in wanted]


class PackedNames:
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

    def __getitem__(self, index: int) -> str:
        """Return the name as text that can always be printed."""
        return self.get_raw_name(index).decode("utf-8", "backslashreplace")

    def get_raw_name(self, index: int) -> bytes:
        """Return the name as the file system or archive spells it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._ends[index : index + 2].tolist()
        return self._blob[start:end]
