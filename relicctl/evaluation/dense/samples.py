"""Images with what is known of each, a mask or boxes; and where their files lie."""

from __future__ import annotations

import os
import posixpath
import tarfile
import zipfile
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal

import numpy as np

from relicctl.data.archives import Folder, Tar, convert_os_errors, open_container
from relicctl.data.images import BadImageError
from relicctl.data.sources import ImageDataset
from relicctl.errors import DataError

SplitName = Literal["train", "val"]
SPLIT_FOLDERS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "trainval"),
    "val": ("val", "valid", "validation"),
}
MAX_TEXT_BYTES = 2 << 30  # bytes; COCO's largest list has half a billion


class DenseDataset(ABC):
    """``classes``: names of what ``target``'s numbers mean. Cheap to fork; safe to read from many threads."""

    source: ImageDataset
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def get_name(self, index: int) -> str:
        return self.source.get_name(index)

    def load(self, index: int) -> np.ndarray:
        """The image, uint8 ``[H, W, 3]``. Raises BadImage."""
        return self.source.load(index)

    @abstractmethod
    def load_target(self, index: int) -> Any:
        """What is known of an image that ``load`` gives. Raises DataError."""

    @abstractmethod
    def compute_fingerprint(self) -> str:
        """SHA-256 (hex) over the samples' names and sizes, and those of what is known of them."""


class CachedDenseDataset(DenseDataset):
    """``samples``, decoded once and kept in memory, which forked workers share."""

    def __init__(self, samples: DenseDataset) -> None:
        self.source, self.classes, self._samples = samples.source, samples.classes, samples

        def load_sample(index: int) -> tuple[np.ndarray | BadImageError, Any]:
            try:
                return samples.load(index), samples.load_target(index)
            except BadImageError as bad:
                return bad, None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self._cached = list(pool.map(load_sample, range(len(samples))))

    def load(self, index: int) -> np.ndarray:
        image = self._cached[index][0]
        if isinstance(image, BadImageError):
            raise image
        return image

    def load_target(self, index: int) -> Any:
        return self._cached[index][1]

    def compute_fingerprint(self) -> str:
        return self._samples.compute_fingerprint()


class FileReader:
    """Files of any kind in the folder or archive that ``spec`` names, as in data sources: PATH or PATH#FOLDER."""

    def __init__(self, spec: str) -> None:
        path, folder = spec, ""
        if "#" in spec and not os.path.lexists(spec):
            path, _, folder = spec.rpartition("#")
        self._path, self._folder = os.path.expanduser(path), folder.strip("/")
        if not os.path.exists(self._path):
            raise DataError(f"There is no folder or archive '{self._path}'.", "Check the path.")
        self._container = open_container(self._path)

    def read(self, name: str) -> bytes | None:
        """The content of the file; None if there is none. Raises DataError for what cannot be read."""
        whole = posixpath.join(self._folder, name)
        with convert_os_errors(self._path):
            if isinstance(self._container, Folder):
                file = os.path.join(self._path, whole)
                if not os.path.isfile(file):
                    return None
                with open(file, "rb") as handle:
                    return handle.read(MAX_TEXT_BYTES)
            try:
                return self._read_from_archive(whole)
            except (zipfile.BadZipFile, tarfile.TarError, NotImplementedError, RuntimeError, EOFError) as reason:
                raise DataError(f"{name} in {self._path} cannot be read ({reason}).", "Pack it again.") from None

    def _read_from_archive(self, name: str) -> bytes | None:
        archive = self._archive
        if isinstance(archive, tarfile.TarFile):
            member = self._members.get(name)
            handle = archive.extractfile(member) if member is not None and member.isreg() else None
            return None if handle is None else handle.read(MAX_TEXT_BYTES)
        try:
            with archive.open(name) as handle:
                return handle.read(MAX_TEXT_BYTES)
        except KeyError:
            return None

    @cached_property
    def _archive(self) -> zipfile.ZipFile | tarfile.TarFile:
        return tarfile.open(self._path, "r:") if isinstance(self._container, Tar) else zipfile.ZipFile(self._path)

    @cached_property
    def _members(self) -> dict[str, tarfile.TarInfo]:
        assert isinstance(self._archive, tarfile.TarFile)
        return {posixpath.normpath(member.name): member for member in self._archive.getmembers()}


def join_spec(spec: str, folder: str) -> str:
    """What names ``folder`` within the data that ``spec`` names."""
    if not folder:
        return spec
    return f"{spec}{'/' if '#' in spec else '#'}{folder}"


def parse_first_words(content: bytes) -> list[str]:
    """The first word of every line that has one."""
    return [line.split()[0] for line in content.decode("utf-8", "replace").splitlines() if line.strip()]


def make_missing_split_error(name: str, spec: str, part: SplitName, layouts: str) -> DataError:
    return DataError(f"{name} has no {part} split in {spec}.", f"Give {layouts}.")


def summarize_names(names: list[str]) -> str:
    """How many, and the first."""
    return f"{len(names)} ({names[0]} among them)" if len(names) > 1 else names[0]
