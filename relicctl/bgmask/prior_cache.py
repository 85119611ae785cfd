"""The priors of a whole data set in one file: made once by parallel processes, gone on with after a kill.

The file: 8 bytes of magic, the length of the header (uint32), a JSON header; from the next whole page on the state
of every sample (uint8: to do, done, bad image), which of its priors are valid (uint8 ``[N, P]``), and from
the next page on the maps (uint8 ``[N, P, S, S]``). A sample is marked done only when its maps are on the disk.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from relicctl.bgmask.priors.maps import PRIOR_NAMES, compute_prior_maps, quantize_maps
from relicctl.core.atomic_io import write_atomically
from relicctl.core.distributed import SINGLE_PROCESS, World
from relicctl.core.work_sharing import WorkResult, gather_in_order, shard
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImageError
from relicctl.data.workers import load_in_workers
from relicctl.errors import DataError, RunFailed

MAGIC = b"RELICPRI"
VERSION = 1  # raise it when the file's layout or any prior's map changes
PAGE_SIZE = 4096
CHUNK_SIZE = 8  # samples a worker makes at a time, and that a kill may lose per worker
TO_DO, DONE, BAD = 0, 1, 2


class PriorCache:
    """``maps``: uint8 ``[N, P, S, S]``, 0 to 255, zero where not made or not valid; ``valid``: bool ``[N, P]``.

    The first is a read-only view of the file. N is the number of samples, P of priors, S the maps' side.
    """

    def __init__(self, path: Path, count: int, size: int, state_at: int) -> None:
        self.path, self.size, self._count = path, size, count
        self._state_at, self._valid_at = state_at, state_at + count
        self._maps_at = _align_to_page(self._valid_at + count * len(PRIOR_NAMES))
        self._reload()

    def _reload(self) -> None:
        """At the file as it is now."""
        shape = self._count, len(PRIOR_NAMES), self.size, self.size
        self.maps = np.memmap(self.path, np.uint8, "r", self._maps_at, shape)
        self._state = np.fromfile(self.path, np.uint8, self._count, offset=self._state_at)
        valid = np.fromfile(self.path, np.uint8, self._count * len(PRIOR_NAMES), offset=self._valid_at)
        self.valid = valid.reshape(self._count, len(PRIOR_NAMES)).astype(bool)

    @classmethod
    def open(cls, path: Path, source: ImageDataset, size: int, world: World = SINGLE_PROCESS) -> PriorCache:
        """The store at ``path``, made empty if there is none, by the main process.

        Raises DataError when the file is no store, of another version, data set or size, or truncated.
        """
        header = {"version": VERSION, "names": list(PRIOR_NAMES), "size": size, "count": len(source)}
        header["fingerprint"] = source.compute_fingerprint()
        world.broadcast_from_main(lambda: None if path.exists() else _create_cache_file(path, header))
        return cls(path, len(source), size, _read_header(path, header))

    @property
    def done(self) -> np.ndarray:
        """Which samples need no more work, bad images among them: bool ``[N]``."""
        return self._state != TO_DO

    @property
    def bad(self) -> np.ndarray:
        """Which samples' images cannot be decoded: bool ``[N]``."""
        return self._state == BAD

    def count_invalid(self) -> dict[str, int]:
        """Per prior, how many maps of sound images were degenerate and are left out."""
        missing = ~self.valid[self._state == DONE]
        return dict(zip(PRIOR_NAMES, missing.sum(axis=0).tolist(), strict=True))

    def fill(
        self, source: ImageDataset, workers: int, show: Callable[[int, int], None], world: World = SINGLE_PROCESS
    ) -> None:
        """Make the maps of all samples that are not done, in ``workers`` processes (0: in this one).

        Of several processes in ``world`` each makes its share, with ``workers`` of its own, and the main one writes:
        file systems that hosts share promise nothing to two that write to one page.
        ``show(done, total)`` is told the number of samples done, as it grows. What was made before an exception
        or a kill stays. Raises RunFailed when the file cannot be written.
        """
        to_do = np.array(world.broadcast_from_main(lambda: np.flatnonzero(~self.done).tolist()), dtype=np.int64)
        chunks = [to_do[first : first + CHUNK_SIZE] for first in range(0, len(to_do), CHUNK_SIZE)]
        if not chunks:
            return

        def write_chunk(piece: WorkResult) -> None:
            try:
                self._write(*(tensor.numpy() for tensor in piece.tensors))
            except OSError as reason:
                raise RunFailed(
                    f"The priors' file {self.path} cannot be written ({reason.strerror}).",
                    "Make room on the disk and resume: what was made is kept.",
                ) from None
            show(int(self.done.sum()), len(self.done))

        with closing(_iter_prior_maps(source, shard(world, chunks), self.size, workers)) as pieces:
            gather_in_order(world, len(chunks), pieces, write_chunk)
        self._reload()

    def _write(self, indices: np.ndarray, maps: np.ndarray, valid: np.ndarray, bad: np.ndarray) -> None:
        """Maps first and safely, then the marks that say so."""
        with open(self.path, "r+b", buffering=0) as handle:
            file = handle.fileno()
            for index, image_maps, image_valid in zip(indices.tolist(), maps, valid, strict=True):
                _write_at(file, self._maps_at + index * image_maps.nbytes, image_maps.tobytes())
                _write_at(file, self._valid_at + index * len(PRIOR_NAMES), image_valid.astype(np.uint8).tobytes())
            os.fdatasync(file)
            state = np.where(bad, BAD, DONE).astype(np.uint8)
            for index, image_state in zip(indices.tolist(), state, strict=True):
                _write_at(file, self._state_at + index, image_state.tobytes())
        self.valid[indices], self._state[indices] = valid, state


def _align_to_page(length: int) -> int:
    return -(-length // PAGE_SIZE) * PAGE_SIZE


def _write_at(file: int, offset: int, data: bytes) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _create_cache_file(path: Path, header: dict) -> None:
    text = json.dumps(header).encode()
    start = MAGIC + struct.pack("<I", len(text)) + text

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(start)
            file.truncate(_compute_file_size(len(start), header))

    write_atomically(path, write)


def _compute_file_size(start: int, header: dict) -> int:
    """Bytes of the whole file, whose magic and header take ``start`` bytes."""
    marks = header["count"] * (1 + len(header["names"]))
    return _align_to_page(_align_to_page(start) + marks) + header["count"] * len(header["names"]) * header["size"] ** 2


def _read_header(path: Path, expected: dict) -> int:
    """Where the marks begin. Raises DataError when the file is not what ``expected``, a header, describes."""
    fix = "Remove the file to have the priors made anew, or use another output folder."
    with open(path, "rb") as file:
        start = file.read(len(MAGIC) + 4)
        if len(start) < len(MAGIC) + 4 or not start.startswith(MAGIC):
            raise DataError(f"{path} is no file of priors.", fix)
        text = file.read(struct.unpack("<I", start[-4:])[0])
    try:
        header = dict(json.loads(text))
    except (ValueError, TypeError):
        raise DataError(f"The file of priors {path} is damaged: its header cannot be read.", fix) from None
    if any(header.get(key) != expected[key] for key in ("fingerprint", "count")):
        raise DataError(f"The priors in {path} were made of another data set.", fix)
    if header != expected:
        raise DataError(f"The priors in {path} were made by another version or at another size.", fix)
    if path.stat().st_size != _compute_file_size(len(start) + len(text), header):
        raise DataError(f"The file of priors {path} is truncated.", fix)
    return _align_to_page(len(start) + len(text))


def _iter_prior_maps(
    source: ImageDataset, chunks: Sequence[np.ndarray], size: int, workers: int
) -> Generator[WorkResult, None, None]:
    """Compute, for each chunk of K samples: their indices, int64 ``[K]``, maps, valid flags and bad-image flags."""
    # Sums depend on the number of threads in their last bits.
    with threadpool_limits(1), load_in_workers(partial(_compute_chunk, source, size), chunks, workers) as results:
        yield from results


def _compute_chunk(source: ImageDataset, size: int, indices: np.ndarray) -> WorkResult:
    maps = np.zeros((len(indices), len(PRIOR_NAMES), size, size), dtype=np.uint8)
    valid, bad = np.zeros(maps.shape[:2], dtype=bool), np.zeros(len(indices), dtype=bool)
    for row, index in enumerate(indices.tolist()):
        try:
            image_maps = compute_prior_maps(source.load(index), size)
        except BadImageError:
            bad[row] = True
            continue
        maps[row], valid[row] = quantize_maps(image_maps)
    return WorkResult(tuple(torch.from_numpy(array) for array in (indices, maps, valid, bad)))
