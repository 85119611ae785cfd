"""Which samples form the global batch of a step, and the key of all that is drawn for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from relicctl.core.counter_rng import Stream, permutation
from relicctl.errors import UsageError


@dataclass(frozen=True)
class DrawKey:
    """What random draws for ``samples``, int64 ``[B]``, depend on: the seed, the epoch and each sample's index."""

    seed: int
    epoch: int
    samples: np.ndarray

    def __getitem__(self, rows: Any) -> DrawKey:
        return DrawKey(self.seed, self.epoch, self.samples[rows])


class Sampler:
    """Samples of every step's global batch: a pure function of (seed, step).

    Every epoch is a new permutation of ``size`` samples, cut into batches; an incomplete last batch is dropped.
    Raises UsageError if the data cannot fill one batch of ``batch_size``.
    """

    def __init__(self, seed: int, size: int, batch_size: int) -> None:
        if batch_size < 1:
            what = f"The batch size is {batch_size}, but a batch holds at least one image."
            raise UsageError(what, "Set optim.batch_size to a positive number.")
        if batch_size > size:
            what = f"The batch of {batch_size} images is larger than the data set of {size}."
            fix = f"Set optim.batch_size to at most {size}, or give more images." if size > 1 else "Give more images."
            raise UsageError(what, fix)
        self.seed, self.size, self.batch_size = seed, size, batch_size
        self.steps_per_epoch = size // batch_size
        self._cached_permutation: tuple[int, np.ndarray] | None = None

    def get_epoch(self, step: int) -> int:
        """Return the epoch, counted from 0, of ``step``, counted from 0."""
        return step // self.steps_per_epoch

    def get_batch_indices(self, step: int) -> np.ndarray:
        """Return the samples of the global batch of ``step``: int64 ``[batch_size]``."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        if self._cached_permutation is None or self._cached_permutation[0] != epoch:
            self._cached_permutation = epoch, permutation(self.size, self.seed, Stream.ORDER, epoch)
        return self._cached_permutation[1][start : start + self.batch_size]
