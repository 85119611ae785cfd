"""Containers of image files: a folder, a .zip or a .tar. Nothing is ever unpacked to disk.

Files are indexed once; after that a sample is read by ``pread``, which needs no file position and so is safe
for any number of threads and processes. Nothing in an archive is trusted: names are checked, links and
devices skipped, sizes limited before anything is read.
"""

from __future__ import annotations

import bz2
import os
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from io import FileIO
from typing import IO, NamedTuple, Protocol

from relicctl.data.decoding import BadImageError
from relicctl.errors import DataError

MAX_FILE_BYTES = 256 << 20  # no photo's file is larger; a member that claims more is never read
MAX_TEXT_BYTES = 2 << 30  # of annotations; COCO's largest list has half a billion
NO_CRC = -1
_COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_OTHER_MAGIC = {
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive", b"Rar!\x1a\x07": "a RAR archive", b"PAR1": "a Parquet table",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file", b"\x93NUMPY": "a NumPy array", b"\xff\xd8\xff": "a single image",
    b"\x89PNG\r\n\x1a\n": "a single image",
}  # fmt: skip
_STORED, _DEFLATED, _BZIP2, _ENCRYPTED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, -1
READABLE_METHODS = (_STORED, _DEFLATED, _BZIP2)
_METHOD_NAMES = {9: "Deflate64", 14: "LZMA", 20: "zstd", 93: "zstd", 95: "XZ", 98: "PPMd"}
_MADE_ON_WINDOWS = (0, 10, 11, 14)  # FAT, NTFS and VFAT, as zips say where they were made
# Files of a system in these folders are no images of the user: thumbnails, deleted files, what macOS adds to a zip.
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "@__thumb", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information"}
_ARCHIVE_ERRORS = (zipfile.BadZipFile, tarfile.TarError, NotImplementedError, ValueError, OverflowError, struct.error)
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: ends with the lengths of its name and extra field
_MAX_OPEN_FILES = 64  # archives held open at once: a thousand shards must not use up the descriptors


class Member(NamedTuple):
    """Where a file lies: offset and length as stored, length unpacked, zip's method, CRC-32 or NO_CRC."""

    offset: int
    compressed_size: int
    size: int
    method: int = _STORED
    crc: int = NO_CRC


class Container(Protocol):
    """A place that holds image files, and perhaps others."""

    def iter_files(self) -> Iterator[tuple[str, Member]]:
        """Yield every file by its safe name, relative and with ``/``. Raises DataError."""

    def read(self, name: bytes, member: Member) -> bytes:
        """Return the file's bytes. Raises BadImageError, and DataError if the container itself is gone."""


@dataclass(frozen=True)
class Folder:
    """A folder tree. Links are followed, except into a folder that encloses them."""

    path: str

    def iter_files(self) -> Iterator[tuple[str, Member]]:
        yield from self._walk("", frozenset())

    def _walk(self, below: str, enclosing: frozenset[tuple[int, int]]) -> Iterator[tuple[str, Member]]:
        folder = os.path.join(self.path, below)
        with convert_os_errors(folder):
            here = os.stat(folder)
            identity = here.st_dev, here.st_ino
            if identity in enclosing:
                return
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
                continue
            mode, size = stat.S_IFREG, 0
            with suppress(OSError):  # a link to nowhere or in a circle: reading it says so
                mode, size = entry.stat().st_mode, entry.stat().st_size
            if stat.S_ISDIR(mode):
                yield from self._walk(name, enclosing | {identity})
            elif stat.S_ISREG(mode) and (usable := normalize_file_name(name)):  # a pipe would wait for ever
                yield usable, Member(0, size, size)

    def read(self, name: bytes, member: Member) -> bytes:
        _check_size(member)
        try:
            with open(os.path.join(os.fsencode(self.path), name), "rb") as file:
                return file.read()
        except OSError as error:
            with convert_os_errors(self.path):  # a disk that was unplugged or unmounted is no bad image
                if not any(os.scandir(self.path)):
                    raise DataError(f"{self.path} has become empty.", "Check the path and the disk.") from None
            raise BadImageError(f"cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Archive:
    """A file that holds files. ``version`` is its length and time of change when it was indexed."""

    path: str
    version: tuple[int, int]

    def read(self, name: bytes, member: Member) -> bytes:
        _check_size(member)
        data = self._read_bytes(self._find_start(member), member.compressed_size)
        if member.method in (_DEFLATED, _BZIP2):
            data = _decompress(data, member.size, member.method)
        elif member.method != _STORED:
            raise BadImageError(describe_method(member.method))
        if len(data) != member.size:
            raise BadImageError(f"the archive ends after {len(data)} of {member.size} bytes")
        if member.crc not in (NO_CRC, zlib.crc32(data)):
            raise BadImageError("its checksum differs: the archive is damaged")
        return data

    def _find_start(self, member: Member) -> int:
        """Return where the member's data begin."""
        return member.offset

    def _read_bytes(self, offset: int, length: int) -> bytes:
        file = _open_file(self.path, self.version, os.getpid())  # held until the read is done
        try:
            return os.pread(file.fileno(), length, offset)
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror}") from error


class Tar(Archive):
    """An uncompressed .tar."""

    def iter_files(self) -> Iterator[tuple[str, Member]]:
        names: list[str] = []
        members: list[Member] = []
        with _convert_archive_errors(self.path), tarfile.open(self.path, "r:") as tar:
            before = -1
            while (found := tar.next()) and tar.offset > before:
                before = tar.offset  # a header whose size leads backwards would be read for ever
                tar.members.clear()  # type: ignore[attr-defined]  # or they pile up
                if found.isreg() and not found.issparse():
                    names.append(found.name)
                    members.append(_make_member(found.offset_data, found.size, found.size))
            # tarfile takes a damaged header for the end; there the file ends or zeros begin
            if not 0 <= tar.offset <= self.version[0] or any(self._read_bytes(tar.offset, tarfile.BLOCKSIZE)):
                raise tarfile.ReadError
        for name, member in zip(_replace_backslashes(names), members, strict=True):
            if usable := normalize_file_name(name):
                yield usable, member


class Zip(Archive):
    """A .zip whose members are stored, deflated or packed with bzip2."""

    def iter_files(self) -> Iterator[tuple[str, Member]]:
        with _convert_archive_errors(self.path), zipfile.ZipFile(self.path) as archive:
            members = archive.infolist()
        for path, found in zip(_get_zip_names(members), members, strict=True):
            name = normalize_file_name(path)
            if name and not path.endswith("/") and stat.S_IFMT(found.external_attr >> 16) in (0, stat.S_IFREG):
                method = _ENCRYPTED if found.flag_bits & 1 else found.compress_type
                place = found.header_offset, found.compress_size, found.file_size
                yield name, _make_member(*place, method, found.CRC)

    def _find_start(self, member: Member) -> int:
        header = self._read_bytes(member.offset, _LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
            raise BadImageError("its entry in the archive is damaged")
        name_length, extra_length = _LOCAL_HEADER.unpack(header)
        return int(member.offset + len(header) + name_length + extra_length)


def open_container(path: str) -> Container:
    """Open the folder or archive at ``path``, recognised by content. Raises DataError for anything else."""
    if os.path.isdir(path):
        return Folder(path)
    with convert_os_errors(path):
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path} is neither a folder nor a file.", "Give a folder, a .zip or a .tar.")
        with open(path, "rb") as file:
            head = file.read(tarfile.BLOCKSIZE)
    for magic, name in _COMPRESSION_MAGIC.items():
        if head.startswith(magic):
            what = f"{path} is compressed with {name}, so the images in it cannot be read in place."
            raise DataError(what, "Decompress it and give the plain .tar; compression does not make JPEG smaller.")
    for magic, name in _OTHER_MAGIC.items():
        if head.startswith(magic):
            what = f"{path} is {name}, no zip or tar archive."
            raise DataError(what, "Give the folder of the images, a .zip or an uncompressed .tar.")
    is_tar = head[257:262] == b"ustar" or path.lower().endswith(".tar")
    return (Tar if is_tar else Zip)(path, (found.st_size, found.st_mtime_ns))


@contextmanager
def convert_os_errors(path: str) -> Iterator[None]:
    """Convert an OSError from reading ``path`` into a DataError."""
    try:
        yield
    except PermissionError as error:
        fix = "Change its permissions, for example chmod -R u+rX."
        raise DataError(f"{path} cannot be read: permission denied.", fix) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", "Check the path and the disk.") from error


@contextmanager
def _convert_archive_errors(path: str) -> Iterator[None]:
    """Convert what Python raises for a damaged archive, or an OSError, into a DataError."""
    try:
        with convert_os_errors(path):
            yield
    except _ARCHIVE_ERRORS as error:
        fix = "Give a folder, a .zip or an uncompressed .tar; if it was copied or downloaded, do that again."
        raise DataError(f"{path} is no zip or tar archive, or a damaged one.", fix) from error


class _OpenFile(FileIO):
    """Closes when the last thread using it lets go."""

    def __del__(self) -> None:
        self.close()


@lru_cache(maxsize=_MAX_OPEN_FILES)
def _open_file(path: str, version: tuple[int, int], process: int) -> _OpenFile:
    """One descriptor per process: a forked or spawned worker opens its own. Raises DataError."""
    with convert_os_errors(path):
        file = _OpenFile(path)
        found = os.fstat(file.fileno())
    if (found.st_size, found.st_mtime_ns) != version:
        raise DataError(f"{path} has changed since it was indexed.", "Start again when it is complete.")
    return file


def _make_member(offset: int, stored: int, size: int, method: int = _STORED, crc: int = NO_CRC) -> Member:
    """Make a Member whose numbers fit 64 bits whatever the archive claims; reading rejects what is too large."""
    offset, stored, size = (min(max(value, -1), 1 << 62) for value in (offset, stored, size))
    return Member(offset, stored, size, method, crc)


def _check_size(member: Member) -> None:
    claimed = max(member.compressed_size, member.size)
    if not 0 <= claimed <= MAX_FILE_BYTES:
        raise BadImageError(f"claims {claimed} bytes, more than the {MAX_FILE_BYTES} allowed")


def describe_method(method: int) -> str:
    """Say in words how a zip's member is packed."""
    return "encrypted" if method == _ENCRYPTED else f"packed with {_METHOD_NAMES.get(method, f'method {method}')}"


def _decompress(data: bytes, size: int, method: int) -> bytes:
    """Decompress ``data`` to ``size`` bytes, at most one more. Raises BadImageError if they are not so many."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS) if method == _DEFLATED else bz2.BZ2Decompressor()
    try:
        unpacked = stream.decompress(data, size + 1)
    except (zlib.error, OSError) as error:
        raise BadImageError(f"cannot be unpacked: {error}") from error
    if len(unpacked) != size or not stream.eof:
        raise BadImageError(f"does not unpack to the {size} bytes it claims")
    return unpacked


def split_spec(spec: str) -> tuple[str, str]:
    """Split PATH or PATH#FOLDER into the path and the folder, "" for all."""
    path, _, folder = (spec, "", "") if "#" not in spec or os.path.lexists(spec) else spec.rpartition("#")
    return os.path.expanduser(path), folder.strip("/")


class FileReader:
    """Files of any kind in the folder or archive that ``spec`` names, as in data sources: PATH or PATH#FOLDER."""

    def __init__(self, spec: str) -> None:
        self._path, self._folder = split_spec(spec)
        if not os.path.exists(self._path):
            raise DataError(f"There is no folder or archive '{self._path}'.", "Check the path.")
        self._container = open_container(self._path)

    def read(self, name: str) -> bytes | None:
        """Return the content of the file; None if there is none. Raises DataError for what cannot be read."""
        whole = posixpath.join(self._folder, name)
        with convert_os_errors(self._path):
            try:
                handle = self._open(whole)
                if handle is None:
                    return None
                with handle:
                    return handle.read(MAX_TEXT_BYTES)
            except (zipfile.BadZipFile, tarfile.TarError, NotImplementedError, RuntimeError, EOFError) as reason:
                raise DataError(f"{name} in {self._path} cannot be read ({reason}).", "Pack it again.") from None

    def _open(self, name: str) -> IO[bytes] | None:
        if isinstance(self._container, Folder):
            file = os.path.join(self._path, name)
            return open(file, "rb") if os.path.isfile(file) else None
        open_member = self._archive_openers.get(name)
        return None if open_member is None else open_member()

    @cached_property
    def _archive_openers(self) -> dict[str, Callable[[], IO[bytes] | None]]:
        if isinstance(self._container, Tar):
            tar = tarfile.TarFile(self._path)
            files = [member for member in tar.getmembers() if member.isreg()]
            names = map(posixpath.normpath, _replace_backslashes([member.name for member in files]))
            return {name: partial(tar.extractfile, member) for name, member in zip(names, files, strict=True)}
        archive = zipfile.ZipFile(self._path)
        members = archive.infolist()
        return {
            name: partial(archive.open, member) for name, member in zip(_get_zip_names(members), members, strict=True)
        }


def _get_zip_names(members: Sequence[zipfile.ZipInfo]) -> list[str]:
    """Return the members' names with ``/``, whatever the program that wrote them separates folders by."""
    names = _replace_backslashes([member.filename for member in members])
    return [
        name.replace("\\", "/") if "/" not in name and member.create_system in _MADE_ON_WINDOWS else name
        for name, member in zip(names, members, strict=True)
    ]


def _replace_backslashes(names: Sequence[str]) -> Sequence[str]:
    """Return ``names`` with ``/`` for ``\\`` if not one has a ``/``: some programs on Windows separate folders so."""
    return names if any("/" in name for name in names) else [name.replace("\\", "/") for name in names]


def normalize_file_name(name: str) -> str | None:
    """Return the normalised relative name of a file in an archive or folder; None for what is not used.

    Names that lead out of their root (absolute, drive letter, ``..``), hidden files, and files in SYSTEM_FOLDERS are
    not used.
    """
    if name.startswith("/") or name[1:3] in (":/", ":\\"):
        return None
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if any(part.startswith(".") or part in SYSTEM_FOLDERS for part in parts):  # ".." among them
        return None
    return "/".join(parts)
