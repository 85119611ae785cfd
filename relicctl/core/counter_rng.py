"""Counter-based random numbers: every draw is a pure function of its coordinates, not of earlier draws.

A crop has the coordinates (seed, epoch, sample, view), a batch's colours (seed, step, row). Hashing them gives the
same numbers in any worker, on any rank and after any resume; a sequential generator would not.
The hash chains SplitMix64's finaliser (Steele, Lea and Flood 2014) over the coordinates, in numpy's uint64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_WORD_MASK = (1 << 64) - 1


class Stream(IntEnum):
    """The purpose of a draw. Two streams of one seed are independent; the numbers must never be reassigned."""

    ORDER = 0
    GEOMETRY = 1
    PHOTOMETRY = 2
    NEGATIVES = 3
    MASK = 4
    SUBSET = 5
    HOLDOUT = 6
    INIT = 7
    EVAL = 8
    SHAPES = 9


def draw_uniform(seed: int, stream: int, *coords: Any, n: int) -> np.ndarray:
    """Return ``n`` float64 uniforms in [0, 1) for every coordinate: shape ``[*broadcast(coords), n]``.

    ``coords`` are integers or integer arrays that broadcast together. Draw ``k`` does not depend on ``n``.
    """
    words = _mix_word(_hash(seed, stream, *coords)[..., None], np.arange(n, dtype=np.uint64))
    return (words >> np.uint64(11)) * 2.0**-53


def derive_seed(seed: int, stream: int, *coords: int) -> int:
    """Return a seed in [0, 2**63) for a sequential generator (torch.Generator, numpy.random)."""
    return int(_hash(seed, stream, *coords)) >> 1


def _hash(*parts: Any) -> np.ndarray:
    """Return the uint64 hash of the parts in their order, broadcast together."""
    state = np.zeros((), dtype=np.uint64)
    for part in parts:
        state = _mix_word(state, _to_word(part))
    return np.asarray(state)


def _mix_word(state: np.ndarray, word: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is intended
        z: np.ndarray = state + _GOLDEN * (word + np.uint64(1))
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
        z = z ^ (z >> np.uint64(31))
    return z


def _to_word(part: Any) -> np.ndarray:
    if isinstance(part, int):  # Python integers of any size and sign
        return np.asarray(part & _WORD_MASK, dtype=np.uint64)
    array = np.asarray(part)
    if array.dtype.kind not in "iu":
        raise TypeError(f"coordinates are integers, not {array.dtype}")
    return array.astype(np.uint64)


@contextmanager
def fork_seeded_rng(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator within the block, and restore its state after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def permutation(count: int, seed: int, stream: Stream, *coords: int) -> np.ndarray:
    """Return int64 ``[count]``, a permutation that depends on (seed, stream, coords) alone.

    Sorting counter-based keys permutes alike on every numpy version and platform.
    """
    return np.argsort(draw_uniform(seed, stream, *coords, np.arange(count), n=1)[:, 0], kind="stable")
