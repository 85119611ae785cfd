"""How well scores ``[N, C]`` tell classes: the metric that a data set of the transfer suite is measured by."""

from __future__ import annotations

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
    """A share of 1. ``targets``: int64 ``[N]``; for ``map11`` also bool or int8 ``[N, C]``, as it takes them."""
    if metric == "map11":
        truth = targets if targets.ndim == 2 else torch.nn.functional.one_hot(targets, scores.shape[1]).bool()
        return compute_map11(scores, truth)
    correct = (scores.argmax(1) == targets).double()
    return correct.mean().item() if metric == "top1" else compute_mean_per_class(correct, targets)


def compute_mean_per_class(correct: Tensor, labels: Tensor) -> float:
    """The mean over classes that have images of the share of ``right`` float64 ``[N]``."""
    counts = torch.bincount(labels).double()
    hits = torch.zeros_like(counts).index_add_(0, labels, correct)
    present = counts > 0
    return (hits[present] / counts[present]).mean().item()


def compute_map11(scores: Tensor, truth: Tensor) -> float:
    """PASCAL VOC 2007's mean average precision: precision at recall 0, .1, ..., 1, each the best at or beyond it.

    ``truth`` ``[N, C]``: bool, or int8 of 1 and -1, and 0 for what does not count: as in VOC's own evaluation, an
    image that shows a class in difficult objects alone is left out of that class's ranking. The mean is over classes
    with an image, of which there must be one. Images of one score come in together, as at a threshold.
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
    last = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])  # of images of one score
    retrieved = torch.arange(1, len(hits) + 1, device=hits.device)[last]
    hits = hits[last]
    precision = hits.double() / retrieved
    best = precision.flip(0).cummax(0).values.flip(0)  # at or beyond
    first = [torch.searchsorted(10 * hits, tenth * hits[-1]) for tenth in range(11)]  # in whole numbers: exact
    return best[torch.stack(first)].mean().item()
