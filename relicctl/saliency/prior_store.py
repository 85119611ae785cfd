"""The priors of a whole data set in one file: made once by parallel processes, gone on with after a kill.

The file: 8 bytes of magic, the length of the header (uint32), a JSON header; from the next whole page on the state
of every sample (uint8: to do, done, bad image), which of its priors are valid (uint8 ``[N, P]``), and from
the next page on the maps (uint8 ``[N, P, S, S]``). A sample is marked done only when its maps are on the disk.
"""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, Dataset

from relicctl.core.checkpoint import atomically
from relicctl.core.distributed import World
from relicctl.core.turns import Piece, in_turn, own
from relicctl.data.images import BadImage
from relicctl.data.sources import Source
from relicctl.data.workers import working
from relicctl.errors import DataError, RelicError, RunFailed
from relicctl.saliency.hints import quantised
from relicctl.saliency.priors import NAMES, prior_maps

MAGIC = b"RELICPRI"
VERSION = 1  # raise it when the file's layout or any prior's map changes
PAGE = 4096
UNIT = 8  # samples a worker makes at a time, and that a kill may lose per worker
TO_DO, DONE, BAD = 0, 1, 2


class PriorStore:
    """``maps``: uint8 ``[N, P, S, S]``, 0 to 255, zero where not made or not valid; ``valid``: bool ``[N, P]``.

    The first is a read-only view of the file. N is the number of samples, P of priors, S the maps' side.
    """

    def __init__(self, path: Path, count: int, size: int, state_at: int) -> None:
        self.path, self.size, self._count = path, size, count
        self._state_at, self._valid_at = state_at, state_at + count
        self._maps_at = _whole_pages(self._valid_at + count * len(NAMES))
        self._look()

    def _look(self) -> None:
        """At the file as it is now."""
        shape = self._count, len(NAMES), self.size, self.size
        self.maps = np.memmap(self.path, np.uint8, "r", self._maps_at, shape)
        self._state = np.fromfile(self.path, np.uint8, self._count, offset=self._state_at)
        valid = np.fromfile(self.path, np.uint8, self._count * len(NAMES), offset=self._valid_at)
        self.valid = valid.reshape(self._count, len(NAMES)).astype(bool)

    @classmethod
    def open(cls, path: Path, source: Source, size: int, world: World | None = None) -> PriorStore:
        """The store at ``path``, made empty if there is none, by the main process.

        Raises DataError when the file is no store, of another version, data set or size, or truncated.
        """
        header = {"version": VERSION, "names": list(NAMES), "size": size, "count": len(source)}
        header["fingerprint"] = source.fingerprint()
        (world or World()).lead(lambda: None if path.exists() else _create(path, header))
        return cls(path, len(source), size, _read_header(path, header))

    @property
    def done(self) -> np.ndarray:
        """Which samples need no more work, bad images among them: bool ``[N]``."""
        return self._state != TO_DO

    @property
    def bad(self) -> np.ndarray:
        """Which samples' images cannot be decoded: bool ``[N]``."""
        return self._state == BAD

    def left_out(self) -> dict[str, int]:
        """Per prior, how many maps of sound images were degenerate and are left out."""
        missing = ~self.valid[self._state == DONE]
        return dict(zip(NAMES, missing.sum(axis=0).tolist(), strict=True))

    def fill(self, source: Source, workers: int, show: Callable[[int, int], None], world: World | None = None) -> None:
        """Make the maps of all samples that are not done, in ``workers`` processes (0: in this one).

        Of several processes in ``world`` each makes its share, with ``workers`` of its own, and the main one writes:
        file systems that hosts share promise nothing to two that write to one page.
        ``show(done, total)`` is told the number of samples done, as it grows. What was made before an exception
        or a kill stays. Raises RunFailed when the file cannot be written.
        """
        world = world or World()
        to_do = np.array(world.lead(lambda: np.flatnonzero(~self.done).tolist()), dtype=np.int64)
        units = [to_do[first : first + UNIT] for first in range(0, len(to_do), UNIT)]
        if not units:
            return

        def take(piece: Piece) -> None:
            try:
                self._write(*(tensor.numpy() for tensor in piece.tensors))
            except OSError as reason:
                raise RunFailed(
                    f"The priors' file {self.path} cannot be written ({reason.strerror}).",
                    "Make room on the disk and resume: what was made is kept.",
                ) from None
            show(int(self.done.sum()), len(self.done))

        with closing(_made(source, own(world, units), self.size, workers)) as made:
            in_turn(world, len(units), made, take)
        self._look()

    def _write(self, unit: np.ndarray, maps: np.ndarray, valid: np.ndarray, bad: np.ndarray) -> None:
        """Maps first and safely, then the marks that say so."""
        with open(self.path, "r+b", buffering=0) as handle:
            file = handle.fileno()
            for index, made, fine in zip(unit.tolist(), maps, valid, strict=True):
                _write_at(file, self._maps_at + index * made.nbytes, made.tobytes())
                _write_at(file, self._valid_at + index * len(NAMES), fine.astype(np.uint8).tobytes())
            os.fdatasync(file)
            state = np.where(bad, BAD, DONE).astype(np.uint8)
            for index, mark in zip(unit.tolist(), state, strict=True):
                _write_at(file, self._state_at + index, mark.tobytes())
        self.valid[unit], self._state[unit] = valid, state


def _whole_pages(length: int) -> int:
    return -(-length // PAGE) * PAGE


def _write_at(file: int, place: int, data: bytes) -> None:
    while data:
        written = os.pwrite(file, data, place)
        data, place = data[written:], place + written


def _create(path: Path, header: dict) -> None:
    text = json.dumps(header).encode()
    start = MAGIC + struct.pack("<I", len(text)) + text

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(start)
            file.truncate(_length(len(start), header))

    atomically(path, write)


def _length(start: int, header: dict) -> int:
    """Bytes of the whole file, whose magic and header take ``start`` bytes."""
    marks = header["count"] * (1 + len(header["names"]))
    return _whole_pages(_whole_pages(start) + marks) + header["count"] * len(header["names"]) * header["size"] ** 2


def _read_header(path: Path, wanted: dict) -> int:
    """Where the marks begin. Raises DataError when the file is not what ``wanted``, a header, describes."""
    again = "Remove the file to have the priors made anew, or use another output folder."
    with open(path, "rb") as file:
        start = file.read(len(MAGIC) + 4)
        if len(start) < len(MAGIC) + 4 or not start.startswith(MAGIC):
            raise DataError(f"{path} is no file of priors.", again)
        text = file.read(struct.unpack("<I", start[-4:])[0])
    try:
        header = dict(json.loads(text))
    except (ValueError, TypeError):
        raise DataError(f"The file of priors {path} is damaged: its header cannot be read.", again) from None
    if any(header.get(key) != wanted[key] for key in ("fingerprint", "count")):
        raise DataError(f"The priors in {path} were made of another data set.", again)
    if header != wanted:
        raise DataError(f"The priors in {path} were made by another version or at another size.", again)
    if path.stat().st_size != _length(len(start) + len(text), header):
        raise DataError(f"The file of priors {path} is truncated.", again)
    return _whole_pages(len(start) + len(text))


# Making maps in parallel


def _made(source: Source, units: Sequence[np.ndarray], size: int, workers: int) -> Generator[Piece, None, None]:
    """Of every unit, int64 ``[K]``: its samples, their maps, which of these are valid, which images are bad."""
    dataset = _Units(source, size, units)
    # Sums depend on the number of threads in their last bits, and processes by cores need no threads.
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=_quiet_worker)
    with threadpool_limits(1), working(loader) as items:
        for _ in units:
            made = next(items)
            if isinstance(made, RelicError):
                raise made
            yield Piece(tuple(made))


class _Units(Dataset):
    """Item k: the maps of the k-th unit of samples."""

    def __init__(self, source: Source, size: int, units: Sequence[np.ndarray]) -> None:
        self._source, self._size, self._units = source, size, units

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, ...] | RelicError:
        try:
            return self._make(self._units[number])
        except RelicError as error:
            return error  # raised in the parent: torch would wrap it up on the way

    def _make(self, unit: np.ndarray) -> tuple[torch.Tensor, ...]:
        maps = np.zeros((len(unit), len(NAMES), self._size, self._size), dtype=np.uint8)
        valid, bad = np.zeros(maps.shape[:2], dtype=bool), np.zeros(len(unit), dtype=bool)
        for row, index in enumerate(unit.tolist()):
            try:
                made = prior_maps(self._source.load(index), self._size)
            except BadImage:
                bad[row] = True
                continue
            maps[row], valid[row] = quantised(made)
        return tuple(torch.from_numpy(array) for array in (unit, maps, valid, bad))


def _quiet_worker(_: int) -> None:
    """Signals are the parent's business; one thread each, in OpenBLAS as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    threadpool_limits(1)
