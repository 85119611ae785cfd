"""How features of one class lie together: separation, neighbours and a map, for one or several encoders.

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

from relicctl.core.atomic_io import write_atomically
from relicctl.errors import UsageError

NUM_NEIGHBOURS = 5
ROWS_PER_STEP = 1024
MAX_CLASSES_ON_MAP = 20


@dataclass(frozen=True)
class ClusterAnalysis:
    """Of N images: ``ratio`` ``[C]``; ``distances`` ``[N, 5]``; ``places`` ``[N, 2]`` on the map; all float64."""

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
                {"label": names[label], "neighbours": distances, "map": place}
                for label, distances, place in zip(
                    labels.tolist(), self.neighbour_distances.tolist(), self.embedding.tolist(), strict=True
                )
            ],
        }


def check_sklearn() -> None:
    """Raises UsageError where scikit-learn, which draws the map, is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise UsageError("--analysis takes scikit-learn, which is not installed.", "Run pip install scikit-learn.")


def analyze_clusters(features: Tensor, labels: Tensor, classes: int, seed: int) -> ClusterAnalysis:
    """Of ``features`` ``[N, F]`` with ``labels`` int64 ``[N]`` below ``classes``."""
    points = normalize(features.double(), dim=1).cpu()
    labels = labels.cpu()
    return ClusterAnalysis(
        compute_discriminant_ratio(points, labels, classes).numpy(),
        compute_neighbour_distances(points).numpy(),
        _compute_tsne(points.float().numpy(), seed),
    )


def compute_discriminant_ratio(points: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Float ``[C]``: mean over other classes |mu_c - mu_c'|^2 / mean over members |z - mu_c|^2; NaN without members."""
    counts = torch.bincount(labels, minlength=classes).to(points.dtype)
    means = torch.zeros(classes, points.shape[1], dtype=points.dtype).index_add_(0, labels, points) / counts[:, None]
    within = torch.zeros(classes, dtype=points.dtype)
    within.index_add_(0, labels, (points - means[labels]).square().sum(1))
    there = counts > 0
    between = (means[:, None] - means[there]).square().sum(2).sum(1) / (int(there.sum()) - 1)
    return between / (within / counts)


def compute_neighbour_distances(points: Tensor) -> Tensor:
    """``[N, 5]``: Euclidean distances of each point to the five nearest others, ascending."""
    found = []
    for first in range(0, len(points), ROWS_PER_STEP):
        rows = points[first : first + ROWS_PER_STEP]
        distances = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(rows)), torch.arange(first, first + len(rows))] = torch.inf  # not itself
        found.append(distances.topk(NUM_NEIGHBOURS, largest=False).values)
    return torch.cat(found)


def _compute_tsne(points: np.ndarray, seed: int) -> np.ndarray:
    """float64 ``[N, 2]`` by t-SNE (van der Maaten and Hinton 2008)."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(points) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed % 2**32)
    return tsne.fit_transform(points).astype(np.float64)


def plot_clusters(path: Path, clusters: dict[str, ClusterAnalysis], names: Sequence[str], labels: np.ndarray) -> None:
    """PNG: a column per encoder; its map coloured by the class's ratio above, by neighbours' distance below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(clusters) + 1.5, 10.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(clusters), squeeze=False)
    colours = (
        ([found.discriminant_ratio[labels] for found in clusters.values()], "linear discriminant ratio of the class"),
        (
            [found.neighbour_distances.mean(1) for found in clusters.values()],
            f"mean distance to {NUM_NEIGHBOURS} nearest",
        ),
    )
    for row, (values, meaning) in zip(grid, colours, strict=True):
        low, high = np.concatenate(values).min(), np.concatenate(values).max()
        for axes, (name, found), value in zip(row, clusters.items(), values, strict=True):
            points = axes.scatter(*found.embedding.T, c=value, s=8, cmap="viridis", vmin=low, vmax=high, linewidths=0)
            axes.set(title=f"{name}\nmean {value.mean():.3g}", xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
            if len(names) <= MAX_CLASSES_ON_MAP:
                _draw_class_names(axes, found.embedding, names, labels)
        figure.colorbar(points, ax=row.tolist(), label=meaning, shrink=0.9)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))


def _draw_class_names(axes: Any, places: np.ndarray, names: Sequence[str], labels: np.ndarray) -> None:
    """Every class's name at its middle, moved up or down where it would cover another."""
    height = np.ptp(places[:, 1]) / 28
    width = np.ptp(places[:, 0]) / 5
    taken: list[np.ndarray] = []
    middles = [(np.median(places[labels == c], axis=0), name) for c, name in enumerate(names) if (labels == c).any()]
    for middle, name in sorted(middles, key=lambda item: item[0][1]):
        place = middle.copy()
        while any(abs(place[0] - other[0]) < width and abs(place[1] - other[1]) < height for other in taken):
            place[1] += height / 4
        taken.append(place)
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
        axes.text(*place, name[:18], ha="center", va="center", fontsize=8, bbox=box)
