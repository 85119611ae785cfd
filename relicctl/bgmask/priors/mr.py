"""Saliency by graph-based manifold ranking (MR).

After C. Yang, L. Zhang, H. Lu, X. Ruan, M.-H. Yang, "Saliency Detection via Graph-Based Manifold Ranking", CVPR 2013.
"""

from __future__ import annotations

import numpy as np

from relicctl.bgmask.priors.superpixels import Superpixels, normalize_min_max

ALPHA = 0.99  # how far a rank is propagated over the graph


def compute_mr(superpixels: Superpixels) -> np.ndarray:
    """Return saliency, float64 ``[n]`` from 0 to 1: by ranking against the sides of the image, then by similarity to
    what differs from all of them.
    """
    ranking = compute_ranking_matrix(superpixels)
    unlike = np.ones(len(superpixels))
    for side in superpixels.sides:
        unlike *= 1.0 - normalize_min_max(ranking @ side)
    queries = unlike > unlike.mean()
    return normalize_min_max(ranking @ queries)


def compute_ranking_matrix(superpixels: Superpixels) -> np.ndarray:
    """Return (D - alpha W)^-1, ``[n, n]``, with its diagonal cleared, so that a query does not vote for itself."""
    affinity = superpixels.affinity
    ranking = np.linalg.inv(np.diag(affinity.sum(axis=1)) - ALPHA * affinity)
    np.fill_diagonal(ranking, 0.0)
    return ranking
