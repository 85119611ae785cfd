"""The prior maps of a data set in one memory-mapped file, computed by parallel processes and resumed after a kill.

The file (see memmap_table.py): 8 bytes of magic, the length of the header (uint32), a JSON header; from the next whole
page on the state of every sample (uint8: to do, done, bad image) and which of its priors are valid (uint8 ``[N, P]``);
from the next page on the maps (uint8 ``[N, P, S, S]``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from relicctl.bgmask.priors.maps import PRIOR_NAMES, compute_prior_maps, quantize_maps
from relicctl.core.distributed import SINGLE_PROCESS, World
from relicctl.core.work_sharing import WorkResult, gather_in_order, shard
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImageError
from relicctl.data.memmap_table import Column, TableFormat, TableLayout, TableWriter
from relicctl.data.workers import load_in_workers
from relicctl.errors import DataError, RunFailed

VERSION = 1  # raise it when the file's layout or any prior's map changes
CHUNK_SIZE = 8  # samples that a worker computes at a time, and that a kill may lose per worker
TO_DO, DONE, BAD = 0, 1, 2
_FIX = "Remove the file to have the priors computed again, or use another output folder."
FORMAT = TableFormat("file of priors", b"RELICPRI", _FIX, _FIX)


class PriorCache:
    """The prior maps of N samples, P priors each, with sides of S pixels.

    Attributes:
        maps: uint8 ``[N, P, S, S]``, 0 to 255, zero where not computed or not valid; a read-only view of the file.
        valid: bool ``[N, P]``.
        states: uint8 ``[N]``: TO_DO, DONE, or BAD where the image cannot be decoded.
    """

    def __init__(self, path: Path, layout: TableLayout) -> None:
        self.path, self._layout = path, layout
        self._reload()
        self.size = self.maps.shape[-1]

    def _reload(self) -> None:
        """Read the file as it is now."""
        columns = FORMAT.map_columns(self.path, self._layout)
        self.maps, self.valid = columns["maps"], columns["valid"].astype(bool)
        self.states = columns["states"].copy()

    @classmethod
    def open(cls, path: Path, source: ImageDataset, size: int, world: World = SINGLE_PROCESS) -> PriorCache:
        """Open the cache at ``path``; where there is none, the main process creates it empty.

        Raises DataError when the file is something else, of another version, data set or size, or cut short.
        """
        header = {"version": VERSION, "names": list(PRIOR_NAMES), "size": size, "count": len(source)}
        header["fingerprint"] = source.compute_fingerprint()

        def create() -> None:
            if not path.exists():
                layout = _make_layout(len(FORMAT.encode_header(header)), len(source), size)
                FORMAT.create(path, header, layout, {})

        world.broadcast_from_main(create)
        stored, start = FORMAT.read_header(path)
        if any(stored.get(key) != header[key] for key in ("fingerprint", "count")):
            raise DataError(f"The priors in {path} are of another data set.", _FIX)
        if stored != header:
            raise DataError(f"The priors in {path} were computed by another version or at another size.", _FIX)
        return cls(path, _make_layout(start, len(source), size))

    @property
    def done(self) -> np.ndarray:
        """Which samples need no more work, bad images among them: bool ``[N]``."""
        return np.asarray(self.states != TO_DO)

    def load_floats(self, indices: np.ndarray | slice) -> np.ndarray:
        """Return the maps of some samples, float32 ``[B, P, S, S]`` from 0 to 1, NaN where a prior is not valid."""
        valid = self.valid[indices][:, :, None, None]
        return np.where(valid, self.maps[indices].astype(np.float32) / 255, np.float32(np.nan))

    def count_invalid(self) -> dict[str, int]:
        """Count, per prior, the maps of decodable images that were degenerate and are left out."""
        missing = ~self.valid[self.states == DONE]
        return dict(zip(PRIOR_NAMES, missing.sum(axis=0).tolist(), strict=True))

    def fill(
        self, source: ImageDataset, workers: int, show: Callable[[int], None], world: World = SINGLE_PROCESS
    ) -> None:
        """Compute the maps of all samples that are not done, in ``workers`` processes (0: in this one).

        Each rank of ``world`` computes a part, with ``workers`` of its own, and the main one writes: file systems that
        hosts share promise nothing to two that write to one page. ``show`` gets the number of samples done,
        as it grows. What was written before an exception or a kill stays. Raises RunFailed when the file cannot
        be written.
        """
        to_do = np.array(world.broadcast_from_main(lambda: np.flatnonzero(~self.done).tolist()), dtype=np.int64)
        chunks = [to_do[first : first + CHUNK_SIZE] for first in range(0, len(to_do), CHUNK_SIZE)]
        if not chunks:
            return

        def write_chunk(result: WorkResult) -> None:
            try:
                self._write(*(tensor.numpy() for tensor in result.tensors))
            except OSError as reason:
                what = f"The file of priors {self.path} cannot be written ({reason.strerror})."
                raise RunFailed(what, "Free disk space and use --resume: what was computed is saved.") from None
            show(int(self.done.sum()))

        with closing(_iter_chunks(source, shard(world, chunks), self.size, workers)) as results:
            gather_in_order(world, len(chunks), results, write_chunk)
        self._reload()

    def _write(self, indices: np.ndarray, maps: np.ndarray, valid: np.ndarray, bad: np.ndarray) -> None:
        with open(self.path, "r+b", buffering=0) as file:
            table = TableWriter(file.fileno(), self._layout, "states", self.states.copy())
            for index, image_maps, image_valid in zip(indices.tolist(), maps, valid, strict=True):
                table.write("maps", index, image_maps)
                table.write("valid", index, image_valid)
            table.states[indices] = np.where(bad, BAD, DONE)
            table.flush()
        self.valid[indices], self.states = valid, table.states


def _make_layout(start: int, count: int, size: int) -> TableLayout:
    columns = (
        Column("states", "u1", aligned=True),
        Column("valid", "u1", (len(PRIOR_NAMES),)),
        Column("maps", "u1", (len(PRIOR_NAMES), size, size), aligned=True),
    )
    return TableLayout(start, count, columns)


def _iter_chunks(
    source: ImageDataset, chunks: Sequence[np.ndarray], size: int, workers: int
) -> Generator[WorkResult, None, None]:
    """Yield ``_compute_chunk`` of each; workers start with the first, where a failure is reported to other ranks."""
    # Sums depend on the number of threads in their last bits.
    with threadpool_limits(1), load_in_workers(partial(_compute_chunk, source, size), chunks, workers) as results:
        yield from results


def _compute_chunk(source: ImageDataset, size: int, indices: np.ndarray) -> WorkResult:
    """Compute K samples: their ``indices``, int64 ``[K]``, maps, valid flags and bad-image flags."""
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
