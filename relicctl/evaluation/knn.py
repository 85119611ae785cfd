"""Weighted nearest-neighbour classification on frozen features: cosine similarity, weights exp(similarity / T)."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

TEMPERATURE = 0.07
SIMILARITIES = 2**27  # held at once


def knn_accuracy(
    bank_NF: torch.Tensor,
    bank_labels: torch.Tensor,
    queries_MF: torch.Tensor,
    labels: torch.Tensor,
    *,
    ks: tuple[int, ...] = (20, 200),
    temperature: float = TEMPERATURE,
) -> dict[int, float]:
    """Share of queries classified rightly, for every k (at most the bank's size)."""
    bank = normalize(bank_NF.float(), dim=1)
    classes = int(torch.cat([bank_labels, labels]).max()) + 1
    right = dict.fromkeys(ks, 0)
    chunk = max(1, min(1024, SIMILARITIES // len(bank)))
    for first in range(0, len(queries_MF), chunk):
        queries = normalize(queries_MF[first : first + chunk].float(), dim=1)
        similarity, nearest = (queries @ bank.T).topk(min(max(ks), len(bank)), dim=1)
        weights = (similarity / temperature).exp()
        for k in ks:
            votes = weights.new_zeros(len(queries), classes)
            votes.scatter_add_(1, bank_labels[nearest[:, :k]], weights[:, :k])
            right[k] += int((votes.argmax(1) == labels[first : first + chunk]).sum())
    return {k: count / len(labels) for k, count in right.items()}
