"""A table in one file: written row by row, resumed after a kill, read memory-mapped.

The file begins with a magic number and a JSON header; columns follow one after the other, some from a whole page on.
One of them is the state of each row: it is written only after the row's data are on the disk, so what it says of them
is true whenever the process is killed. Numbers are little-endian.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relicctl.core.atomic_io import write_atomically
from relicctl.errors import DataError

PAGE_SIZE = 4096
MAX_HEADER_BYTES = 1 << 20  # a damaged length must not fill the memory


@dataclass(frozen=True)
class Column:
    """``shape``: of one row; ``aligned``: the column begins at a whole page."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    aligned: bool = False

    @property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


class TableLayout:
    """Where the columns of ``count`` rows lie, in bytes, when the first may begin at ``start``."""

    def __init__(self, start: int, count: int, columns: Sequence[Column]) -> None:
        self.count, self.columns = count, {column.name: column for column in columns}
        self.offsets: dict[str, int] = {}
        for column in columns:
            if column.aligned:
                start = -(-start // PAGE_SIZE) * PAGE_SIZE
            self.offsets[column.name] = start
            start += count * column.row_bytes
        self.end = start


@dataclass(frozen=True)
class TableFormat:
    """What the files of one ``kind`` begin with, and how errors name them.

    After ``magic`` come uint32 numbers and the header, a JSON object: the header's length, or the ``version`` of the
    format, the header's length and its CRC. Without ``version`` the header itself is to hold one.
    """

    kind: str
    magic: bytes
    foreign_fix: str
    corrupt_fix: str
    version: int | None = None

    def encode_header(self, header: dict[str, Any]) -> bytes:
        text = json.dumps(header).encode()
        numbers = [len(text)] if self.version is None else [self.version, len(text), zlib.crc32(text)]
        return self.magic + np.array(numbers, "<u4").tobytes() + text

    def read_header(self, path: Path) -> tuple[dict[str, Any], int]:
        """Return the header and where it ends. Raises DataError for another file, a newer version or damage."""
        prefix_bytes = len(self.magic) + (4 if self.version is None else 12)
        with open(path, "rb") as file:
            prefix = file.read(prefix_bytes)
            if len(prefix) < prefix_bytes or not prefix.startswith(self.magic):
                raise DataError(f"{path} is no {self.kind}.", self.foreign_fix)
            numbers = np.frombuffer(prefix, "<u4", offset=len(self.magic)).tolist()
            version, length, crc = numbers if len(numbers) == 3 else (None, *numbers, None)
            text = file.read(min(length, MAX_HEADER_BYTES))
        if version is not None and self.version is not None and version > self.version:
            what = f"{path} was written by a newer relicctl (version {version})."
            raise DataError(what, "Update relicctl to read it.")
        try:
            if len(text) != length or crc not in (None, zlib.crc32(text)) or version == 0:
                raise ValueError
            header = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError):
            raise self.make_corrupt_error(path, "is damaged or cut short: its header cannot be read") from None
        return header, prefix_bytes + length

    def create(self, path: Path, header: dict[str, Any], layout: TableLayout, columns: dict[str, np.ndarray]) -> None:
        """Write the file at ``path`` in one piece, zeros where ``columns`` holds no data."""

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                file.truncate(layout.end)
                write_at(file.fileno(), 0, self.encode_header(header))
                for name, values in columns.items():
                    write_at(file.fileno(), layout.offsets[name], values.tobytes())

        write_atomically(path, write)

    def map_columns(self, path: Path, layout: TableLayout) -> dict[str, np.ndarray]:
        """Map the columns, ``[count, *shape]`` each, read-only. Raises DataError if the file is not of that size."""
        if (size := path.stat().st_size) != layout.end:
            raise self.make_corrupt_error(path, f"is cut short or too long ({size:,} bytes, not {layout.end:,})")
        return {
            name: np.asarray(np.memmap(path, column.dtype, "r", layout.offsets[name], (layout.count, *column.shape)))
            for name, column in layout.columns.items()
        }

    def make_corrupt_error(self, path: Path, problem: str) -> DataError:
        return DataError(f"The {self.kind} {path} {problem}.", self.corrupt_fix)


class TableWriter:
    """Writes rows into an open ``file`` of ``layout``.

    ``states``: the column ``state`` as it is in the file. Change it in place once a row's data are written; ``flush``
    writes what has changed, after the data are on the disk.
    """

    def __init__(self, file: int, layout: TableLayout, state: str, states: np.ndarray) -> None:
        self._file, self._layout, self._state, self.states = file, layout, state, states
        self._flushed = states.copy()

    def write(self, name: str, first: int, values: np.ndarray) -> None:
        """Write ``values`` into the column ``name`` from row ``first`` on."""
        column = self._layout.columns[name]
        content = values.astype(column.dtype, copy=False).tobytes()
        write_at(self._file, self._layout.offsets[name] + first * column.row_bytes, content)

    def flush(self) -> None:
        changed = np.flatnonzero(self.states != self._flushed)
        if len(changed):
            os.fdatasync(self._file)
            first, last = int(changed[0]), int(changed[-1]) + 1
            self.write(self._state, first, self.states[first:last])
            self._flushed[first:last] = self.states[first:last]


def write_at(file: int, offset: int, content: bytes) -> None:
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written
