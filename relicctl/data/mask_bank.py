"""The mask bank: one file with a foreground mask for every sample of a data set, made once, read at random.

All numbers are little-endian; N samples, masks of ``side`` x ``side`` pixels whatever an image's shape:

    0                      magic, version, length and CRC of the header, the header (JSON)
    HEADER                 names   N x 16 bytes    hashes of the samples' names, sorted
                           rows    N x uint32      the row of each of those names
                           areas   N x uint16      foreground pixels of each row; UNWRITTEN until it is there
    a multiple of PAGE     masks   N x side²/8     bits, row by row in the order of the data set

At 128 pixels a sample takes 2070 bytes: 1.3 million of them 2.7 GB.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relicctl.data.datasets.base import ImageDataset
from relicctl.errors import DataError, RunFailed

MASK_SIDE = 128
FILE_NAME = "masks.bank"  # in the folder of the run that made it
OTHER_DATA_FILE_NAME = "masks-{}.bank"  # beside it: of the data whose fingerprint begins so
MAGIC, VERSION = b"relicMSK", 1
HEADER = PAGE = 4096  # a mask of 2048 bytes never lies on two pages
NAME_BYTES = 16
UNWRITTEN = 0xFFFF
FLUSH_EVERY = 256  # masks on the disk before their areas say that they are there
CHUNK_BYTES = 1 << 20
_PREFIX_BYTES = len(MAGIC) + 12


@dataclass(frozen=True)
class _Layout:
    """Where things lie in a bank of ``count`` masks of ``side`` pixels."""

    count: int
    side: int

    @property
    def mask_bytes(self) -> int:
        return self.side * self.side // 8

    @property
    def rows(self) -> int:
        return HEADER + NAME_BYTES * self.count

    @property
    def areas(self) -> int:
        return self.rows + 4 * self.count

    @property
    def masks(self) -> int:
        return -(-(self.areas + 2 * self.count) // PAGE) * PAGE

    @property
    def end(self) -> int:
        return self.masks + self.mask_bytes * self.count


class MaskBank:
    """A finished bank, mapped into memory: processes that open, inherit or unpickle it share its pages."""

    def __init__(self, path: Path, header: dict[str, Any], content: np.ndarray) -> None:
        self.path, self.side, self.count = path, int(header["side"]), int(header["count"])
        self.made_by, self.fingerprint = str(header.get("made_by")), str(header.get("fingerprint"))
        self.identity = str(header["sha256"])  # of everything after the header
        layout = _Layout(self.count, self.side)
        self._names = content[HEADER : layout.rows].view(f"S{NAME_BYTES}")
        self._rows = content[layout.rows : layout.areas].view("<u4")
        self._areas = content[layout.areas : layout.areas + 2 * self.count].view("<u2")
        self._masks = content[layout.masks : layout.end].reshape(self.count, layout.mask_bytes)

    @classmethod
    def create(cls, path: Path, source: ImageDataset, *, made_by: str, side: int = MASK_SIDE) -> MaskBankWriter:
        """A bank for all samples of ``source``, or the unfinished one at ``path`` of the same data and maker."""
        return MaskBankWriter(path, source, made_by, side)

    @classmethod
    def open(cls, path: Path) -> MaskBank:
        """The bank at ``path``, or in the run's folder ``path``.

        Raises DataError when it is missing, unfinished, foreign, of a newer version, truncated or damaged. The
        masks' own bits are not read for that; a run compares ``identity``.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise _make_not_found_error(path)
        try:
            header = _read_bank_header(path)
            content = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
        except OSError as reason:
            raise DataError(f"{path} cannot be read ({reason.strerror}).", "Check the file.") from None
        if "sha256" not in header:
            raise _make_unfinished_error(path)
        layout = _Layout(int(header["count"]), int(header["side"]))
        if len(content) != layout.end:
            raise _make_corrupt_error(path, f"is cut short or too long ({len(content):,} bytes, not {layout.end:,})")
        if zlib.crc32(content[HEADER : layout.masks].data) != header.get("tables_crc"):
            raise _make_corrupt_error(path, "is damaged: the checksum of its tables does not match")
        if layout.side % 8 or content[layout.rows : layout.areas].view("<u4").max() >= layout.count:
            raise _make_corrupt_error(path, "speaks of masks that it cannot have")
        return cls(path, header, content)

    @classmethod
    def open_for(cls, path: Path, source: ImageDataset) -> tuple[MaskBank, np.ndarray]:
        """The bank at ``path`` and the rows of ``source`` in it; of a run's folder also one that was set aside.

        Raises DataError as ``open`` and ``rows`` do.
        """
        path = Path(path)
        bank = cls.open(path)
        try:
            return bank, bank.find_rows(source)
        except DataError:
            for other_path in sorted(path.glob(OTHER_DATA_FILE_NAME.format("*"))) if path.is_dir() else []:
                with suppress(DataError):
                    other = cls.open(other_path)
                    return other, other.find_rows(source)
            raise

    def __reduce__(self) -> Any:
        return _reopen_bank, (self.path, self.identity)

    def find_rows(self, source: ImageDataset) -> np.ndarray:
        """int64 ``[len(source)]``: the row of every sample, found by name. Raises DataError if some have none."""
        if len(source) == self.count and source.compute_fingerprint() == self.fingerprint:
            return np.arange(self.count)
        hashes = _hash_names(source)
        at = np.searchsorted(self._names, hashes).clip(max=self.count - 1)
        missing = np.flatnonzero(self._names[at] != hashes)
        if len(missing):
            raise DataError(
                f"The mask bank {self.path} has no mask for {len(missing):,} of the {len(source):,} images, such as "
                f"{source.get_name(int(missing[0]))}. Names are those below --data, as when the bank was made.",
                f"Name the images as then, or make masks for these: relicctl train-bgmask --resume "
                f"{shlex.quote(str(self.path.parent))} --masks-for {shlex.quote(source.spec)}",
            )
        return self._rows[at].astype(np.int64)

    def load_mask(self, row: int) -> np.ndarray:
        """bool ``[side, side]``: the foreground, squashed to a square."""
        return np.unpackbits(self._masks[row]).view(bool).reshape(self.side, self.side)

    def get_foreground_ratio(self, row: int | np.ndarray) -> Any:
        """The foreground's share of one row's image, or of several, ``[K]``."""
        return self._areas[row] / self.side**2


class MaskBankWriter:
    """Fills a bank in any order. A kill loses at most the last FLUSH_EVERY masks; ``missing`` tells which.

    The file bears its name only when it is complete. Raises RunFailed where it cannot be written.
    """

    def __init__(self, path: Path, source: ImageDataset, made_by: str, side: int) -> None:
        if side % 8:
            raise ValueError(f"masks of {side} pixels are no whole bytes")
        self._path, self._partial_path = path, path.with_name(path.name + ".part")
        self._layout = _Layout(len(source), side)
        self._header = {
            "side": side, "count": len(source), "fingerprint": source.compute_fingerprint(), "made_by": made_by[:1000],
        }  # fmt: skip
        self._areas = np.full(len(source), UNWRITTEN, dtype="<u2")
        self._flushed = self._areas.copy()
        self._pending = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._partial_path, os.O_RDWR | os.O_CREAT, 0o666)
            if not self._resume():
                self._create_file(source)
        except OSError as reason:
            raise self._make_write_error(reason) from None

    def __enter__(self) -> MaskBankWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_mask(self, index: int, mask: np.ndarray) -> None:
        """Write the mask of sample ``index``: bool ``[side, side]``."""
        side = self._layout.side
        if mask.shape != (side, side) or mask.dtype != bool:
            raise ValueError(f"a mask is bool [{side}, {side}], not {mask.dtype} {list(mask.shape)}")
        try:
            self._write(np.packbits(mask).tobytes(), self._layout.masks + index * self._layout.mask_bytes)
            self._areas[index] = np.count_nonzero(mask)
            self._pending += 1
            if self._pending >= FLUSH_EVERY:
                self._flush()
        except OSError as reason:
            raise self._make_write_error(reason) from None

    def find_missing(self) -> np.ndarray:
        """int64 ``[K]``: the samples that have no mask yet."""
        return np.flatnonzero(self._areas == UNWRITTEN)

    def close(self) -> None:
        """Give the bank its name if it is complete; else leave it to be taken up later."""
        if self._file < 0:
            return
        try:
            self._flush()
            if len(self.find_missing()) == 0:
                self._finish()
        except OSError as reason:
            raise self._make_write_error(reason) from None
        finally:
            os.close(self._file)
            self._file = -1

    def _resume(self) -> bool:
        """Go on with what an earlier process wrote of the same bank, if it did."""
        try:
            header = _read_bank_header(self._partial_path)
        except DataError:
            return False
        if any(header.get(name) != value for name, value in self._header.items()):
            return False
        areas = os.pread(self._file, 2 * self._layout.count, self._layout.areas)
        if len(areas) != 2 * self._layout.count:
            return False
        self._areas = np.frombuffer(areas, "<u2").copy()
        self._flushed = self._areas.copy()
        return True

    def _create_file(self, source: ImageDataset) -> None:
        """An empty bank of full length; the header comes last, so that a file with one has all its tables."""
        names = _hash_names(source)
        rows = np.argsort(names, kind="stable")
        os.ftruncate(self._file, 0)
        os.ftruncate(self._file, self._layout.end)
        self._write(names[rows].tobytes(), HEADER)
        self._write(rows.astype("<u4").tobytes(), self._layout.rows)
        self._write(self._areas.tobytes(), self._layout.areas)
        os.fsync(self._file)
        self._write(_encode_header(self._header), 0)

    def _flush(self) -> None:
        """The masks first, so that no area speaks of a mask that a power cut took."""
        fresh = np.flatnonzero(self._areas != self._flushed)
        if len(fresh):
            os.fsync(self._file)
            first, last = int(fresh[0]), int(fresh[-1]) + 1
            self._write(self._areas[first:last].tobytes(), self._layout.areas + 2 * first)
            self._flushed[first:last] = self._areas[first:last]
        self._pending = 0

    def _finish(self) -> None:
        crc, sha, at = 0, hashlib.sha256(), HEADER
        while at < self._layout.end:
            border = self._layout.masks if at < self._layout.masks else self._layout.end
            content = os.pread(self._file, min(CHUNK_BYTES, border - at), at)
            sha.update(content)
            if at < self._layout.masks:
                crc = zlib.crc32(content, crc)
            at += len(content)
        self._write(_encode_header({**self._header, "tables_crc": crc, "sha256": sha.hexdigest()}), 0)
        os.fsync(self._file)
        os.replace(self._partial_path, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _write(self, content: bytes, at: int) -> None:
        while content:
            written = os.pwrite(self._file, content, at)
            content, at = content[written:], at + written

    def _make_write_error(self, reason: OSError) -> RunFailed:
        return RunFailed(
            f"The mask bank {self._path} could not be written ({reason.strerror or reason}).",
            "Make room or choose another place, then go on with --resume: masks written before are kept.",
        )


def _hash_names(source: ImageDataset) -> np.ndarray:
    """bytes ``[N]`` of 16: of every sample's name, in the source's own order."""
    realm = source.namespace.encode() + b"\0"
    digests = (
        hashlib.blake2b(realm + source.get_name(index).encode(), digest_size=NAME_BYTES).digest()
        for index in range(len(source))
    )
    return np.frombuffer(b"".join(digests), f"S{NAME_BYTES}")


def _encode_header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    numbers = np.array([VERSION, len(text), zlib.crc32(text)], "<u4")
    return (MAGIC + numbers.tobytes() + text).ljust(HEADER, b"\0")


def _read_bank_header(path: Path) -> dict[str, Any]:
    with open(path, "rb") as handle:
        start = handle.read(HEADER)
    if not start.startswith(MAGIC):
        raise DataError(f"{path} is no mask bank.", "Give a run of train-bgmask, or the masks.bank that it made.")
    if len(start) < HEADER:
        raise _make_corrupt_error(path, f"is cut short ({len(start)} bytes)")
    version, length, crc = np.frombuffer(start[len(MAGIC) : _PREFIX_BYTES], "<u4").tolist()
    if version > VERSION:
        raise DataError(f"{path} was written by a newer relicctl (version {version}).", "Update relicctl to read it.")
    text = start[_PREFIX_BYTES : _PREFIX_BYTES + length]
    if version < 1 or zlib.crc32(text) != crc:
        raise _make_corrupt_error(path, "is damaged: the checksum of its header does not match")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or not all(type(header.get(n)) is int and header[n] > 0 for n in ("count", "side")):
        raise _make_corrupt_error(path, "has a header without the number and size of its masks")
    return header


def _reopen_bank(path: Path, identity: str) -> MaskBank:
    bank = MaskBank.open(path)
    if bank.identity != identity:
        raise DataError(f"The mask bank {path} was replaced while it was in use.", "Start again.")
    return bank


def _make_not_found_error(path: Path) -> DataError:
    if path.with_name(path.name + ".part").is_file():
        return _make_unfinished_error(path)
    if path.parent.is_dir() and path.name == FILE_NAME:
        return DataError(f"{path.parent} holds no {FILE_NAME}.", "Give a run of train-bgmask, or its masks.bank.")
    return DataError(f"There is no mask bank {path}.", "Give a run of train-bgmask, or the masks.bank that it made.")


def _make_unfinished_error(path: Path) -> DataError:
    return DataError(f"The mask bank {path} is not finished.", "Let relicctl train-bgmask --resume RUN finish it.")


def _make_corrupt_error(path: Path, how: str) -> DataError:
    return DataError(f"The mask bank {path} {how}.", "Make it again with relicctl train-bgmask, or copy it again.")
