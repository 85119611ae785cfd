"""Several data sets as one, for trainings that ask for images alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from relicctl.data.sources import ImageDataset


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
