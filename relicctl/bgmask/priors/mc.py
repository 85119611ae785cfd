"""Saliency by an absorbing Markov chain (MC).

After B. Jiang, L. Zhang, H. Lu, C. Yang, M.-H. Yang, "Saliency Detection via Absorbing Markov Chain", ICCV 2013.
"""

from __future__ import annotations

import numpy as np

from relicctl.bgmask.priors.superpixels import Superpixels, normalize_min_max


def compute_mc(superpixels: Superpixels) -> np.ndarray:
    """Return saliency, float64 ``[n]`` from 0 to 1: how long a random walk from there takes to leave the image."""
    return normalize_min_max(compute_absorption_time(*compute_transitions(superpixels)))


def compute_transitions(superpixels: Superpixels) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities of a step to superpixels, ``[n, n]``, and to the absorbing state, ``[n]``; sums are 1.

    Every border superpixel has an absorbing copy of its colour, linked with it and with all its neighbours.
    The copies are one state here, since only the time until any of them is reached counts.
    """
    moves = superpixels.affinity + np.eye(len(superpixels))
    leaves = np.where(superpixels.adjacency, moves, 0.0) @ superpixels.border + superpixels.border
    total = moves.sum(axis=1) + leaves
    return moves / total[:, None], leaves / total


def compute_absorption_time(moves: np.ndarray, leaves: np.ndarray) -> np.ndarray:
    """Return the expected steps until absorption, (I - Q)^-1 1, from each state, ``[n]``; inf where never."""
    try:
        return np.linalg.solve(np.eye(len(moves)) - moves, np.ones(len(moves)))
    except np.linalg.LinAlgError:
        return np.full(len(moves), np.inf)
