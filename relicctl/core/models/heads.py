"""The two-layer head used as projector and as predictor (BYOL, arXiv 2006.07733, section 3.3)."""

from __future__ import annotations

from torch import nn


class MLPHead(nn.Sequential):
    """[N, in_dim] -> [N, out]: Linear with bias, BatchNorm, ReLU, Linear without bias.

    BatchNorm eps 1e-5, momentum 0.1. PyTorch's default initialisation (our choice).
    """

    def __init__(self, in_dim: int, hidden: int, out: int) -> None:
        super().__init__(
            nn.Linear(in_dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out, bias=False),
        )
