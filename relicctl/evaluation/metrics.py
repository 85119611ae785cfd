"""Metrics of classification: top-1, top-5, mean per class, VOC's mean average precision, and how to choose by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What papers report on the data sets of BYOL's suite (2006.07733, appendix D); everything else is top1.
DATASET_METRICS = {
    "aircraft": "mean_per_class",
    "pets": "mean_per_class",
    "caltech101": "mean_per_class",
    "flowers102": "mean_per_class",
    "voc2007": "map11",
}


def compute_metric(metric: str, scores: Tensor, targets: Tensor) -> float:
    """Return a fraction of 1. ``targets``: int64 ``[N]``; for ``map11`` also bool or int8 ``[N, C]``."""
    if metric == "map11":
        truth = targets if targets.ndim == 2 else torch.nn.functional.one_hot(targets, scores.shape[1]).bool()
        return compute_map11(scores, truth)
    correct = (scores.argmax(1) == targets).double()
    return correct.mean().item() if metric == "top1" else compute_mean_per_class(correct, targets)


def compute_mean_per_class(correct: Tensor, labels: Tensor) -> float:
    """Return the mean of ``correct``, float64 ``[N]``, in each class, averaged over classes with images."""
    counts = torch.bincount(labels).double()
    hits = torch.zeros_like(counts).index_add_(0, labels, correct)
    present = counts > 0
    return (hits[present] / counts[present]).mean().item()


def compute_map11(scores: Tensor, truth: Tensor) -> float:
    """Return PASCAL VOC 2007's mean average precision: the best precision at or beyond recall 0, .1, ..., 1.

    ``truth`` ``[N, C]``: bool, or int8 of 1 and -1, and 0 for what is ignored: as in VOC's evaluation code, an
    image that shows a class in difficult objects alone is left out of that class's ranking. The mean is over classes
    with an image, of which there must be one. Images of equal score enter together, as at a threshold.
    """
    valid = torch.ones_like(truth) if truth.dtype == torch.bool else truth != 0
    truth = truth > 0
    precisions = [
        _compute_ap11(scores[valid[:, c], c], truth[valid[:, c], c]) for c in range(truth.shape[1]) if truth[:, c].any()
    ]
    return sum(precisions) / len(precisions)


def _compute_ap11(scores: Tensor, truth: Tensor) -> float:
    scores, order = scores.sort(descending=True, stable=True)
    hits = truth[order].cumsum(0)
    last = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])  # of images of equal score
    retrieved = torch.arange(1, len(hits) + 1, device=hits.device)[last]
    hits = hits[last]
    precision = hits.double() / retrieved
    best = precision.flip(0).cummax(0).values.flip(0)  # at or beyond
    first = [torch.searchsorted(10 * hits, tenth * hits[-1]) for tenth in range(11)]  # integers: exact
    return best[torch.stack(first)].mean().item()


@dataclass(frozen=True)
class ClassificationMetrics:
    """``confusion``: int64 ``[C, C]``, how many images of class (row) were predicted as class (column)."""

    top1: float
    top5: float
    confusion: np.ndarray

    @classmethod
    def from_logits(cls, logits: Tensor, labels: Tensor) -> ClassificationMetrics:
        """Logits ``[N, C]``, labels int64 ``[N]``. With fewer than five classes top-5 counts all of them."""
        classes = logits.shape[1]
        predicted = logits.topk(min(5, classes), dim=1).indices
        correct = predicted == labels[:, None]
        pairs = torch.bincount(labels * classes + predicted[:, 0], minlength=classes**2)
        top1, top5 = (hits.double().mean().item() for hits in (correct[:, 0], correct.any(1)))
        return cls(top1, top5, pairs.view(classes, classes).cpu().numpy())

    @property
    def class_counts(self) -> np.ndarray:
        """Number of images of each class, int64 ``[C]``."""
        return np.asarray(self.confusion.sum(1))

    @property
    def class_accuracy(self) -> np.ndarray:
        """Accuracy within each class, float64 ``[C]``; NaN where it has no image."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.confusion.diagonal() / self.class_counts)

    @property
    def mean_per_class(self) -> float:
        return float(np.nanmean(self.class_accuracy))

    def to_dict(self) -> dict[str, float]:
        return {"top1": self.top1, "top5": self.top5, "mean_per_class": self.mean_per_class}

    def get_class_metrics(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return each class's number of images and accuracy (None without images)."""
        rows = zip(names, self.class_counts.tolist(), self.class_accuracy.tolist(), strict=True)
        return {name: {"images": count, "top1": accuracy if count else None} for name, count, accuracy in rows}


@dataclass(frozen=True)
class ProtocolResult:
    """``value`` on the test images, the hyperparameters chosen, and each candidate's value on validation."""

    value: float
    best_params: dict[str, float]
    candidates: list[dict[str, float]]
    warnings: list[str] = field(default_factory=list)


def find_best_candidate(candidates: list[dict[str, float]]) -> dict[str, float]:
    """Return the candidate with the highest ``value``; of equal ones the middle one, in the order of ``candidates``."""
    highest = max(candidate["value"] for candidate in candidates)
    equal = [candidate for candidate in candidates if candidate["value"] == highest]
    return equal[(len(equal) - 1) // 2]
