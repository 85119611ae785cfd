"""Saliency by robust background detection (RBD).

After W. Zhu, S. Liang, Y. Wei, J. Sun, "Saliency Optimization from Robust Background Detection", CVPR 2014.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path
from skimage.filters import threshold_otsu

from relicctl.bgmask.priors.superpixels import Superpixels, compute_pairwise_distances, normalize_min_max

REGION_SCALE = 7.0  # geodesic distance in CIELab within which superpixels belong to one region
COLOUR_SCALE = 10.0  # standard deviation in CIELab of the similarity of neighbours
CONNECTIVITY_SCALE = 1.0
SPATIAL_SCALE = 0.25  # of the image's side
BACKGROUND_WEIGHT = 5.0
MIN_SMOOTHNESS = 0.1


def compute_rbd(superpixels: Superpixels) -> np.ndarray:
    """Return saliency, float64 ``[n]`` from 0 to 1: contrast to what is connected to the image's border, smoothed.

    Contrasts below Otsu's threshold count as none: our choice, by measurement.
    """
    background = compute_background_probability(superpixels)
    foreground = normalize_min_max(compute_background_contrast(superpixels, background))
    if not np.isfinite(foreground).all():
        return foreground
    foreground[foreground < threshold_otsu(foreground)] = 0.0  # type: ignore[no-untyped-call]
    smoothness = compute_smoothness_weights(superpixels)
    return normalize_min_max(optimize_saliency(BACKGROUND_WEIGHT * background, foreground, smoothness))


def compute_boundary_connectivity(superpixels: Superpixels) -> np.ndarray:
    """Return ``[n]``: the length of a superpixel's region along the border, over the square root of its area."""
    region = np.exp(-np.square(compute_geodesic_distances(superpixels)) / (2 * REGION_SCALE**2))
    return np.asarray(region @ superpixels.border / np.sqrt(region.sum(axis=1)))


def compute_geodesic_distances(superpixels: Superpixels) -> np.ndarray:
    """Return the least sum of colour differences along paths of neighbours, ``[n, n]``; the border is connected.

    Differences up to the mean one between a superpixel and its most similar neighbour count as none.
    """
    n, colour = len(superpixels), superpixels.colour_distance
    nearest = np.where(superpixels.adjacency, colour, np.inf).min(axis=1)
    mean_nearest = nearest[np.isfinite(nearest)].mean()
    first, second = np.nonzero(np.triu(superpixels.adjacency | (superpixels.border[:, None] & superpixels.border), 1))
    step = np.maximum(colour[first, second] - mean_nearest, 0.0) + 1e-9  # a stored zero would be no edge
    graph = coo_array((step, (first, second)), shape=(n, n)).tocsr()
    return np.asarray(shortest_path(graph, method="D", directed=False))


def compute_background_probability(superpixels: Superpixels) -> np.ndarray:
    """Return ``[n]``: near 1 for superpixels of regions that run along the border."""
    connectivity = compute_boundary_connectivity(superpixels)
    return np.asarray(1.0 - np.exp(-np.square(connectivity) / (2 * CONNECTIVITY_SCALE**2)))


def compute_background_contrast(superpixels: Superpixels, background: np.ndarray) -> np.ndarray:
    """Return the colour difference to all others, weighted by proximity and background probability: ``[n]``."""
    proximity = np.exp(-np.square(compute_pairwise_distances(superpixels.centre)) / (2 * SPATIAL_SCALE**2))
    return np.asarray((superpixels.colour_distance * proximity) @ background)


def compute_smoothness_weights(superpixels: Superpixels) -> np.ndarray:
    """Return how strongly two superpixels should share their saliency: ``[n, n]``, symmetric, zero diagonal."""
    similarity = np.exp(-np.square(superpixels.colour_distance) / (2 * COLOUR_SCALE**2)) + MIN_SMOOTHNESS
    return np.where(superpixels.linked, similarity, 0.0)


def optimize_saliency(background: np.ndarray, foreground: np.ndarray, smooth: np.ndarray) -> np.ndarray:
    """Minimise over s, ``[n]``:  sum b s² + sum f (s-1)² + sum over pairs of w (s_i - s_j)²."""
    laplacian = np.diag(smooth.sum(axis=1)) - smooth
    return np.linalg.solve(np.diag(background + foreground) + laplacian, foreground)
