"""Weighted nearest-neighbour classification on frozen features: cosine similarity, weights exp(similarity / T)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

TEMPERATURE = 0.07
MAX_SIMILARITIES = 2**27  # in memory at once


def compute_knn_accuracy(
    bank_NF: Tensor, bank_labels: Tensor, queries_MF: Tensor, labels: Tensor, *, ks: tuple[int, ...] = (20, 200)
) -> dict[int, float]:
    """Return the accuracy on the queries for every k (at most the bank's size)."""
    classes = int(torch.cat([bank_labels, labels]).max()) + 1
    correct = dict.fromkeys(ks, 0)
    for rows, votes in iter_knn_votes(bank_NF, bank_labels, queries_MF, classes, ks=ks):
        for k in ks:
            correct[k] += int((votes[k].argmax(1) == labels[rows]).sum())
    return {k: count / len(labels) for k, count in correct.items()}


def iter_knn_votes(
    bank_NF: Tensor, bank_labels: Tensor, queries_MF: Tensor, classes: int, *, ks: tuple[int, ...]
) -> Iterator[tuple[slice, dict[int, Tensor]]]:
    """Yield, for each chunk of queries, their rows, and for every k the classes' weights, float32 ``[rows, classes]``.

    ``bank_labels``: int64 ``[N]``. Or int8 ``[N, classes]``, 1 and -1, and 0 where an image is ignored: then a
    class's weight is a mean over neighbours, so that queries can be ranked by it.
    """
    bank = normalize(bank_NF.float(), dim=1)
    width = max(len(bank), max(ks) * classes * (bank_labels.ndim - 1))
    chunk = max(1, min(1024, MAX_SIMILARITIES // width))
    for first in range(0, len(queries_MF), chunk):
        queries = normalize(queries_MF[first : first + chunk].float(), dim=1)
        similarity, nearest = (queries @ bank.T).topk(min(max(ks), len(bank)), dim=1)
        weights = (similarity / TEMPERATURE).exp()
        votes = {k: _compute_votes(weights[:, :k], bank_labels[nearest[:, :k]], classes) for k in ks}
        yield slice(first, first + len(queries)), votes


def _compute_votes(weights_QK: Tensor, labels: Tensor, classes: int) -> Tensor:
    if labels.ndim == 2:
        return weights_QK.new_zeros(len(weights_QK), classes).scatter_add_(1, labels, weights_QK)
    normalized = weights_QK / weights_QK.sum(1, keepdim=True)
    return torch.einsum("qk,qkc->qc", normalized, labels.float())
