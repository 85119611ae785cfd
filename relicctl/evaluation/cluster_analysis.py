"""Cluster analysis of features by class: discriminant ratio, neighbour distances and a t-SNE map, for any encoders.

Features are scaled to length 1 first, so that encoders can be compared (our choice).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from relicctl.errors import UsageError
from relicctl.runs.plots import new_figure, save_figure

NUM_NEIGHBOURS = 5
ROWS_PER_STEP = 1024
MAX_CLASSES_ON_MAP = 20


@dataclass(frozen=True)
class ClusterAnalysis:
    """Of C classes and N images, float64.

    ``discriminant_ratio`` ``[C]``, ``neighbour_distances`` ``[N, 5]``, ``embedding`` ``[N, 2]``.
    """

    discriminant_ratio: np.ndarray
    neighbour_distances: np.ndarray
    embedding: np.ndarray

    def to_dict(self, names: Sequence[str], labels: np.ndarray) -> dict[str, Any]:
        near = self.neighbour_distances.mean(1)
        classes = {
            name: {
                "discriminant_ratio": None if np.isnan(self.discriminant_ratio[c]) else self.discriminant_ratio[c],
                "neighbour_distance": near[labels == c].mean() if (labels == c).any() else None,
            }
            for c, name in enumerate(names)
        }
        return {
            "discriminant_ratio": float(np.nanmean(self.discriminant_ratio)),
            "neighbour_distance": float(near.mean()),
            "classes": classes,
            "images": [
                {"label": names[label], "neighbours": distances, "map": point}
                for label, distances, point in zip(
                    labels.tolist(), self.neighbour_distances.tolist(), self.embedding.tolist(), strict=True
                )
            ],
        }


def check_sklearn() -> None:
    """Raises UsageError if scikit-learn, which computes the map, is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise UsageError("--analysis needs scikit-learn, which is not installed.", "Run pip install scikit-learn.")


def analyze_clusters(features: Tensor, labels: Tensor, classes: int, seed: int) -> ClusterAnalysis:
    """Analyse ``features`` ``[N, F]`` with ``labels`` int64 ``[N]`` below ``classes``."""
    points = normalize(features.double(), dim=1).cpu()
    labels = labels.cpu()
    return ClusterAnalysis(
        compute_discriminant_ratio(points, labels, classes).numpy(),
        compute_neighbour_distances(points).numpy(),
        _compute_tsne(points.float().numpy(), seed),
    )


def compute_discriminant_ratio(points: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return, per class, mean |mu_c - mu_c'|^2 over other classes / mean |z - mu_c|^2 over members; NaN without."""
    counts = torch.bincount(labels, minlength=classes).to(points.dtype)
    means = torch.zeros(classes, points.shape[1], dtype=points.dtype).index_add_(0, labels, points) / counts[:, None]
    within = torch.zeros(classes, dtype=points.dtype)
    within.index_add_(0, labels, (points - means[labels]).square().sum(1))
    present = counts > 0
    between = (means[:, None] - means[present]).square().sum(2).sum(1) / (int(present.sum()) - 1)
    return between / (within / counts)


def compute_neighbour_distances(points: Tensor) -> Tensor:
    """Return Euclidean distances of each point to its five nearest neighbours, ascending: ``[N, 5]``."""
    nearest = []
    for indices in torch.arange(len(points)).split(ROWS_PER_STEP):
        distances = torch.cdist(points[indices], points, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(indices)), indices] = torch.inf  # not itself
        nearest.append(distances.topk(NUM_NEIGHBOURS, largest=False).values)
    return torch.cat(nearest)


def _compute_tsne(points: np.ndarray, seed: int) -> np.ndarray:
    """Return the embedding by t-SNE (van der Maaten and Hinton 2008), float64 ``[N, 2]``."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(points) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed % 2**32)
    return np.asarray(tsne.fit_transform(points).astype(np.float64))


def plot_clusters(path: Path, clusters: dict[str, ClusterAnalysis], names: Sequence[str], labels: np.ndarray) -> None:
    """Plot a column per encoder: its map coloured by the class's ratio above, by neighbour distance below."""
    figure = new_figure(5.5 * len(clusters) + 1.5, 10.5)
    grid = figure.subplots(2, len(clusters), squeeze=False)
    colours = (
        ([c.discriminant_ratio[labels] for c in clusters.values()], "linear discriminant ratio of the class"),
        ([c.neighbour_distances.mean(1) for c in clusters.values()], f"mean distance to {NUM_NEIGHBOURS} nearest"),
    )
    for row, (values, meaning) in zip(grid, colours, strict=True):
        low, high = np.concatenate(values).min(), np.concatenate(values).max()
        for axes, (name, analysis), value in zip(row, clusters.items(), values, strict=True):
            points = axes.scatter(
                *analysis.embedding.T, c=value, s=8, cmap="viridis", vmin=low, vmax=high, linewidths=0
            )
            axes.set(title=f"{name}\nmean {value.mean():.3g}", xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
            if len(names) <= MAX_CLASSES_ON_MAP:
                _draw_class_names(axes, analysis.embedding, names, labels)
        figure.colorbar(points, ax=row.tolist(), label=meaning, shrink=0.9)
    save_figure(path, figure, dpi=100)


def _draw_class_names(axes: Any, embedding: np.ndarray, names: Sequence[str], labels: np.ndarray) -> None:
    """Write every class's name at the median of its points, moved up where it would cover another."""
    height = np.ptp(embedding[:, 1]) / 28
    width = np.ptp(embedding[:, 0]) / 5
    taken: list[np.ndarray] = []
    middles = [(np.median(embedding[labels == c], axis=0), name) for c, name in enumerate(names) if (labels == c).any()]
    for middle, name in sorted(middles, key=lambda item: item[0][1]):
        place = middle.copy()
        while any(abs(place[0] - other[0]) < width and abs(place[1] - other[1]) < height for other in taken):
            place[1] += height / 4
        taken.append(place)
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
        axes.text(*place, name[:18], ha="center", va="center", fontsize=8, bbox=box)
