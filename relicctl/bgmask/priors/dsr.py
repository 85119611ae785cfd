"""Saliency by dense and sparse reconstruction (DSR).

After X. Li, H. Lu, L. Zhang, X. Ruan, M.-H. Yang, "Saliency Detection via Dense and Sparse Reconstruction", ICCV 2013.
Unlike there, errors are propagated among superpixels of similar features, not within clusters, and the two errors
are averaged, not combined by Bayes' rule.
"""

from __future__ import annotations

import numpy as np

from relicctl.bgmask.priors.superpixels import Superpixels, compute_pairwise_distances, normalize_min_max

PCA_ENERGY = 0.95  # fraction of the border's variance in the principal components
LASSO_WEIGHT = 0.01  # weight of the L1 norm
FISTA_STEPS = 30  # iterations of the sparse solver
CONTEXT_WEIGHT = 0.8  # fraction of an error taken from superpixels of similar features
CONTEXT_SCALE = 0.1
OBJECT_SCALE = 0.35  # standard deviation of the bias towards the object, as a fraction of the image's side


def compute_dsr(superpixels: Superpixels) -> np.ndarray:
    """Return saliency, float64 ``[n]`` from 0 to 1: how badly the border's superpixels reconstruct each other one."""
    features = compute_superpixel_features(superpixels)
    templates = features[superpixels.border]
    context = compute_feature_affinity(features)
    errors = [compute_dense_error(features, templates), compute_sparse_error(features, templates)]
    maps = [normalize_min_max(propagate_error(error, context)) for error in errors]
    return normalize_min_max(apply_object_bias(maps[0] + maps[1], superpixels))


def compute_superpixel_features(superpixels: Superpixels) -> np.ndarray:
    """Return colour in two spaces, and distances from all sides, each from 0 to 1: float64 ``[n, 10]``.

    With one distance per axis, as in the paper, sparse codes would differ for the mirror image.
    """
    lab = (superpixels.lab - [0.0, -128.0, -128.0]) / [100.0, 255.0, 255.0]
    place = np.sqrt(0.5) * np.concatenate([superpixels.centre, 1.0 - superpixels.centre], axis=1)
    return np.concatenate([lab, superpixels.rgb, place], axis=1)


def compute_dense_error(features: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Return squared distances ``[n]`` of ``features``, ``[n, d]``, to the main plane of ``templates``, ``[m, d]``."""
    mean = templates.mean(axis=0)
    _, singular_values, directions = np.linalg.svd(templates - mean, full_matrices=False)
    energy = np.cumsum(np.square(singular_values))
    components = directions[: 1 + np.searchsorted(energy, PCA_ENERGY * energy[-1])]
    centred = features - mean
    return np.asarray(np.square(centred - centred @ components.T @ components).sum(axis=1))


def compute_sparse_error(features: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Return the squared error of ``features``, ``[n, d]``, as sparse sums of ``templates``, ``[m, d]``: ``[n]``."""
    codes = solve_lasso(features, templates, LASSO_WEIGHT, FISTA_STEPS)
    return np.asarray(np.square(features - codes @ templates).sum(axis=1))


def solve_lasso(targets: np.ndarray, templates: np.ndarray, weight: float, steps: int) -> np.ndarray:
    """Minimise  |targets - A templates|²/2 + weight |A|_1  over A, ``[n, m]``, by FISTA (Beck, Teboulle 2009)."""
    step = 1.0 / np.linalg.norm(templates, 2) ** 2
    codes = ahead = np.zeros((len(targets), len(templates)))
    momentum = 1.0
    for _ in range(steps):
        moved = ahead - step * (ahead @ templates - targets) @ templates.T
        shrunk = np.sign(moved) * np.maximum(np.abs(moved) - step * weight, 0.0)
        after = (1.0 + np.sqrt(1.0 + 4.0 * momentum**2)) / 2.0
        ahead = shrunk + (momentum - 1.0) / after * (shrunk - codes)
        codes, momentum = shrunk, after
    return codes


def compute_feature_affinity(features: np.ndarray) -> np.ndarray:
    """Return how similar each two superpixels are: ``[n, n]``, zero diagonal, rows sum to one."""
    similarity = np.exp(-np.square(compute_pairwise_distances(features)) / (2 * CONTEXT_SCALE**2))
    np.fill_diagonal(similarity, 0.0)
    return np.asarray(similarity / np.maximum(similarity.sum(axis=1, keepdims=True), 1e-300))


def propagate_error(error: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Return the errors ``[n]`` as means of a superpixel's error and, recursively, those of similar ones."""
    return np.linalg.solve(np.eye(len(error)) - CONTEXT_WEIGHT * context, (1.0 - CONTEXT_WEIGHT) * error)


def apply_object_bias(error: np.ndarray, superpixels: Superpixels) -> np.ndarray:
    """Weight the error, ``[n]``, by a Gaussian about its centre of mass."""
    weight = error * superpixels.area
    centre = weight @ superpixels.centre / weight.sum()
    distances = np.square(superpixels.centre - centre).sum(axis=1)
    return np.asarray(error * np.exp(-distances / (2 * OBJECT_SCALE**2)))
