"""A linear classifier on features that are already there: it cannot touch the network that made them."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy


def compute_probe_accuracy(
    bank_NF: torch.Tensor,
    bank_labels: torch.Tensor,
    queries_MF: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight_decay: float = 1e-4,
    iterations: int = 100,
) -> float:
    """Top-1 of multinomial logistic regression (L-BFGS) on standardised, detached features."""
    bank, queries = bank_NF.detach().float(), queries_MF.detach().float()
    mean, std = bank.mean(0), bank.std(0) + 1e-6
    bank, queries = (bank - mean) / std, (queries - mean) / std
    classes = int(torch.cat([bank_labels, labels]).max()) + 1
    weight = torch.zeros(bank.shape[1], classes, device=bank.device, requires_grad=True)
    bias = torch.zeros(classes, device=bank.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = cross_entropy(bank @ weight + bias, bank_labels) + weight_decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    with torch.no_grad():
        return (queries @ weight + bias).argmax(1).eq(labels).float().mean().item()
