"""Choosing the learning rate: on a part of the training images that is held out, never on the test set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relicctl.core.counted import Stream
from relicctl.evaluation.during import permutation
from relicctl.evaluation.linear import LinearClassifierGrid


@dataclass(frozen=True)
class SweepResult:
    """``rates`` that were tried, each one's ``accuracy`` on the held-out images, and the best, ``rate``."""

    rates: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def best_rate(self) -> float:
        """Of several that are as good the middle one."""
        best = [rate for rate, value in zip(self.rates, self.accuracy, strict=True) if value == max(self.accuracy)]
        return sorted(best)[len(best) // 2]

    def get_warning(self) -> str | None:
        """A sentence when the best rate lies at an end of those tried, else None."""
        if self.best_rate not in (min(self.rates), max(self.rates)) or len(self.rates) < 3:
            return None
        end, verb = ("smallest", "lower") if self.best_rate == min(self.rates) else ("largest", "raise")
        return f"the best learning rate, {self.best_rate:g}, is the {end} of the sweep: {verb} sweep.rates"

    def to_dict(self) -> dict[str, Any]:
        return {"rates": list(self.rates), "held_out_top1": list(self.accuracy), "rate": self.best_rate}


def split_holdout_rows(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 rows to train on, and those to choose on: ``share`` of ``count``, at least one of each."""
    order = permutation(count, seed, Stream.EVAL)
    held = min(max(1, round(share * count)), count - 1)
    return np.sort(order[held:]), np.sort(order[:held])


@torch.no_grad()
def evaluate_rates(classifiers: LinearClassifierGrid, features: Tensor, labels: Tensor) -> SweepResult:
    """Compare all rates on held-out ``features`` ``[N, F]``."""
    correct_R = torch.zeros(len(classifiers.rates), device=features.device)
    for rows, truth in zip(features.split(4096), labels.split(4096), strict=True):
        correct_R += (classifiers(rows).argmax(1) == truth[:, None]).sum(0)
    accuracy = (correct_R.double() / len(labels)).tolist()
    return SweepResult(tuple(classifiers.rates.tolist()), tuple(accuracy))
