"""The mask bank: one memory-mapped file with a foreground mask for every sample of a data set, read at random.

N samples, masks of ``side`` x ``side`` pixels whatever an image's shape; the file (see memmap_table.py) is

    0                      magic, version, length and CRC of the header, the header (JSON)
    HEADER_BYTES           names   N x 16 bytes    hashes of the samples' names, sorted
                           rows    N x uint32      the row of each of those names
                           areas   N x uint16      foreground pixels of each row; UNWRITTEN until its mask is there
    a whole page           masks   N x side²/8     bits, row by row in the order of the data set

At 128 pixels a sample takes 2070 bytes: 1.3 million of them 2.7 GB.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from relicctl.core.atomic_io import sync_folder
from relicctl.data.datasets.archives import convert_os_errors
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.memmap_table import PAGE_SIZE, Column, TableFormat, TableLayout, TableWriter, write_at
from relicctl.errors import DataError, RunFailed

MASK_SIDE = 128
FILE_NAME = "masks.bank"  # in the folder of the run that made it
OTHER_DATA_FILE_NAME = "masks-{}.bank"  # beside it: of the data whose fingerprint begins so
HEADER_BYTES = PAGE_SIZE
NAME_BYTES = 16
UNWRITTEN = 0xFFFF
FLUSH_EVERY = 256  # masks on the disk before their areas say that they are there
CHUNK_BYTES = 1 << 20
FORMAT = TableFormat(
    "mask bank",
    b"relicMSK",
    "Give a run of train-bgmask, or the masks.bank that it made.",
    "Create it again with relicctl train-bgmask, or copy it again.",
    version=1,
)


def make_layout(count: int, side: int) -> TableLayout:
    """Return where things lie in a bank of ``count`` masks of ``side`` pixels, a multiple of 8."""
    columns = (
        Column("names", f"S{NAME_BYTES}"),
        Column("rows", "<u4"),
        Column("areas", "<u2"),
        Column("masks", "u1", (side * side // 8,), aligned=True),  # a mask of 2048 bytes never lies on two pages
    )
    return TableLayout(HEADER_BYTES, count, columns)


class MaskBank:
    """A finished bank, mapped into memory: processes that open, inherit or unpickle it share its pages."""

    def __init__(self, path: Path, header: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
        self.path, self.side, self.count = path, int(header["side"]), int(header["count"])
        self.made_by, self.fingerprint = str(header.get("made_by")), str(header.get("fingerprint"))
        self.identity = str(header["sha256"])  # of everything after the header
        self._names, self._rows, self._areas, self._masks = (columns[n] for n in ("names", "rows", "areas", "masks"))

    @classmethod
    def open(cls, path: Path) -> MaskBank:
        """Open the bank at ``path``, or in the run's folder ``path``.

        Raises DataError when it is missing, unfinished, another file, of a newer version, cut short or damaged. The
        masks' bits are not read for that; a run compares ``identity``.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        unfinished = f"The mask bank {path} is not finished.", "Finish it with relicctl train-bgmask --resume RUN."
        if not path.is_file():
            if path.with_name(path.name + ".part").is_file():
                raise DataError(*unfinished)
            if path.parent.is_dir() and path.name == FILE_NAME:
                raise DataError(f"{path.parent} holds no {FILE_NAME}.", FORMAT.foreign_fix)
            raise DataError(f"There is no mask bank {path}.", FORMAT.foreign_fix)
        with convert_os_errors(str(path)):
            header, layout = _read_bank_header(path)
            if "sha256" not in header:
                raise DataError(*unfinished)
            columns = FORMAT.map_columns(path, layout)
            with open(path, "rb") as file:
                file.seek(HEADER_BYTES)
                crc = zlib.crc32(file.read(layout.offsets["masks"] - HEADER_BYTES))
        if crc != header.get("tables_crc"):
            raise FORMAT.make_corrupt_error(path, "is damaged: the checksum of its tables does not match")
        if header["side"] % 8 or columns["rows"].max() >= layout.count:
            raise FORMAT.make_corrupt_error(path, "is damaged: it names masks that it cannot have")
        return cls(path, header, columns)

    @classmethod
    def open_for(cls, path: Path, source: ImageDataset) -> tuple[MaskBank, np.ndarray]:
        """Open the bank at ``path`` and find the rows of ``source`` in it; in a run's folder also among older banks.

        Raises DataError as ``open`` and ``find_rows`` do.
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
        """Find every sample's row by name: int64 ``[len(source)]``. Raises DataError if some have none."""
        if len(source) == self.count and source.compute_fingerprint() == self.fingerprint:
            return np.arange(self.count)
        hashes = _hash_names(source)
        at = np.searchsorted(self._names, hashes).clip(max=self.count - 1)
        missing = np.flatnonzero(self._names[at] != hashes)
        if len(missing):
            raise DataError(
                f"The mask bank {self.path} has no mask for {len(missing):,} of the {len(source):,} images, such as "
                f"{source.get_name(int(missing[0]))}. Names are those below --data, as when the bank was created.",
                "Use the same names as when the masks were created, or create masks for these images: relicctl "
                f"train-bgmask --resume {shlex.quote(str(self.path.parent))} "
                f"{' '.join(f'--masks-for {shlex.quote(spec)}' for spec in source.specs)}",
            )
        return np.asarray(self._rows[at], dtype=np.int64)

    def load_mask(self, row: int) -> np.ndarray:
        """Load the foreground, resized to a square: bool ``[side, side]``."""
        return np.unpackbits(self._masks[row]).view(bool).reshape(self.side, self.side)

    def get_foreground_ratio(self, row: int | np.ndarray) -> Any:
        """Return the fraction of foreground in one row's image, or in several, ``[K]``."""
        return self._areas[row] / self.side**2


class MaskBankWriter:
    """Fills a bank for all samples of ``source`` in any order: a kill loses at most the last FLUSH_EVERY masks.

    Resumes the unfinished one of the same data and maker. The file gets its name only when it is complete.
    Raises RunFailed where it cannot be written.
    """

    def __init__(self, path: Path, source: ImageDataset, *, made_by: str) -> None:
        self._path, self._partial_path = path, path.with_name(path.name + ".part")
        self._layout = make_layout(len(source), MASK_SIDE)
        self._header: dict[str, Any] = {"side": MASK_SIDE, "count": len(source)}
        self._header |= {"fingerprint": source.compute_fingerprint(), "made_by": made_by[:1000]}
        self._pending = 0
        try:
            areas = self._read_unfinished()
            areas = self._create_file(source) if areas is None else areas
            self._file = os.open(self._partial_path, os.O_RDWR)
        except OSError as reason:
            raise self._make_write_error(reason) from None
        self._table = TableWriter(self._file, self._layout, "areas", areas)

    def __enter__(self) -> MaskBankWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_mask(self, index: int, mask: np.ndarray) -> None:
        """Write the mask of sample ``index``: bool ``[MASK_SIDE, MASK_SIDE]``."""
        if mask.shape != (MASK_SIDE, MASK_SIDE) or mask.dtype != bool:
            raise ValueError(f"a mask is bool [{MASK_SIDE}, {MASK_SIDE}], not {mask.dtype} {list(mask.shape)}")
        try:
            self._table.write("masks", index, np.packbits(mask))
            self._table.states[index] = np.count_nonzero(mask)
            self._pending += 1
            if self._pending >= FLUSH_EVERY:
                self._table.flush()
                self._pending = 0
        except OSError as reason:
            raise self._make_write_error(reason) from None

    def find_missing(self) -> np.ndarray:
        """Return the samples that have no mask yet: int64 ``[K]``."""
        return np.flatnonzero(self._table.states == UNWRITTEN)

    def close(self) -> None:
        """Give the bank its name if it is complete; else leave it to be resumed later."""
        if self._file < 0:
            return
        try:
            self._table.flush()
            if len(self.find_missing()) == 0:
                self._finish()
        except OSError as reason:
            raise self._make_write_error(reason) from None
        finally:
            os.close(self._file)
            self._file = -1

    def _read_unfinished(self) -> np.ndarray | None:
        """Return the areas that an earlier process wrote of the same bank; None if there are none."""
        with suppress(DataError, FileNotFoundError):
            header, layout = _read_bank_header(self._partial_path)
            if all(header.get(name) == value for name, value in self._header.items()):
                return FORMAT.map_columns(self._partial_path, layout)["areas"].copy()
        return None

    def _create_file(self, source: ImageDataset) -> np.ndarray:
        names, areas = _hash_names(source), np.full(len(source), UNWRITTEN, dtype="<u2")
        rows = np.argsort(names, kind="stable")
        columns = {"names": names[rows], "rows": rows.astype("<u4"), "areas": areas}
        FORMAT.create(self._partial_path, self._header, self._layout, columns)
        return areas

    def _finish(self) -> None:
        tables_end = self._layout.offsets["masks"]
        tables = os.pread(self._file, tables_end - HEADER_BYTES, HEADER_BYTES)
        sha = hashlib.sha256(tables)
        for start in range(tables_end, self._layout.end, CHUNK_BYTES):
            sha.update(os.pread(self._file, CHUNK_BYTES, start))
        header = {**self._header, "tables_crc": zlib.crc32(tables), "sha256": sha.hexdigest()}
        write_at(self._file, 0, FORMAT.encode_header(header))
        os.fsync(self._file)
        os.replace(self._partial_path, self._path)
        sync_folder(self._path.parent)

    def _make_write_error(self, reason: OSError) -> RunFailed:
        what = f"The mask bank {self._path} could not be written ({reason.strerror or reason})."
        fix = "Free disk space or choose another folder, then use --resume: masks written so far are saved."
        return RunFailed(what, fix)


def _hash_names(source: ImageDataset) -> np.ndarray:
    """Return a hash of every sample's name, in the order of ``source``: bytes ``[N]`` of 16."""
    namespace = source.namespace.encode() + b"\0"
    names = (namespace + source.get_name(index).encode() for index in range(len(source)))
    digests = (hashlib.blake2b(name, digest_size=NAME_BYTES).digest() for name in names)
    return np.frombuffer(b"".join(digests), f"S{NAME_BYTES}")


def _read_bank_header(path: Path) -> tuple[dict[str, Any], TableLayout]:
    header, _ = FORMAT.read_header(path)
    if not all(type(header.get(name)) is int and header[name] > 0 for name in ("count", "side")):
        raise FORMAT.make_corrupt_error(path, "has a header without the number and size of its masks")
    return header, make_layout(header["count"], header["side"])


def _reopen_bank(path: Path, identity: str) -> MaskBank:
    bank = MaskBank.open(path)
    if bank.identity != identity:
        raise DataError(f"The mask bank {path} was replaced while it was in use.", "Start again.")
    return bank
