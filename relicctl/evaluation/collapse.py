"""Is the representation collapsing? Figures that fall long before accuracy does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import normalize


def compute_rankme(features_NF: torch.Tensor) -> float:
    """Effective rank: exp of the entropy of the normalised singular values (RankMe, Garrido et al. 2023).

    Between 1 (all features on one line) and min(N, F).
    """
    values = torch.linalg.svdvals(features_NF.detach().float())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float((-(share * share.log()).sum()).exp())


def compute_normalized_std(outputs_ND: torch.Tensor) -> float:
    """Standard deviation of L2-normalised outputs times sqrt(D): 1 when uniform on the sphere, 0 when collapsed."""
    z = normalize(outputs_ND.detach().float(), dim=1)
    return float(z.std(0).mean()) * z.shape[1] ** 0.5


def get_collapse_warning(metrics: dict[str, Any], rows: int, candidates: int | None = None) -> str | None:
    """A sentence when the figures of a log line say collapse, else None.

    ``rows``: how many features the rank was taken from. ``candidates``: among how many images the likelihood chooses;
    where its entropy is that of a blind guess, target outputs no longer tell images apart.
    """
    end = "the network is collapsing"
    if metrics["deviation"] < 0.05:
        return f"outputs have almost no spread left (deviation {metrics['deviation']:.3f} of 1): {end}"
    if rows >= 16 and metrics["rank_me"] < 2:
        return f"features span almost one dimension (RankMe {metrics['rank_me']:.2f}): {end}"
    if candidates and metrics["entropy"] > 0.999 * math.log(candidates):
        return f"the likelihood is a blind guess among {candidates} (entropy {metrics['entropy']:.3f}): {end}"
    return None


class CollapseMonitor:
    """Warns once when two log lines in a row say that the representation collapses."""

    def __init__(self, warn: Callable[[str], None], rows: int, candidates: int | None = None) -> None:
        self._warn, self._rows, self._candidates = warn, rows, candidates
        self._was_suspicious = self._warned = False

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        if "rank_me" not in metrics or self._warned:
            return
        text = get_collapse_warning(metrics, self._rows, self._candidates)
        if text and self._was_suspicious:
            self._warn(f"step {step}: {text}")
            self._warned = True
        self._was_suspicious = text is not None
