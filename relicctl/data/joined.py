"""Several data sets as one, for trainings that ask for images alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from relicctl.data.sources import Source


class Joined(Source):
    """The samples of ``sources`` one after the other, without labels.

    A sample's name begins with its source's place in the order, ``0/``, ``1/`` and so on: names stay unique, and do
    not depend on where the data are mounted.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.spec = ", ".join(source.spec for source in sources)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        place, inner = self._find(index)
        return f"{place}/{self.sources[place].key(inner)}"

    def read(self, index: int) -> bytes | np.ndarray:
        place, inner = self._find(index)
        return self.sources[place].read(inner)

    def size(self, index: int) -> int:
        place, inner = self._find(index)
        return self.sources[place].size(inner)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the fingerprints of the sources in their order."""
        return hashlib.sha256("\n".join(source.fingerprint() for source in self.sources).encode()).hexdigest()

    def _find(self, index: int) -> tuple[int, int]:
        """The source that holds sample ``index``, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = int(np.searchsorted(self._ends, index, side="right"))
        return place, index - int(self._ends[place - 1] if place else 0)
