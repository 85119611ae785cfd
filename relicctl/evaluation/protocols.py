"""Frozen features judged on another data set: whatever is chosen is chosen on validation; the test is asked once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from relicctl.evaluation.knn import knn_votes
from relicctl.evaluation.logistic import Solutions, solve
from relicctl.evaluation.metrics import measure


@dataclass(frozen=True)
class Outcome:
    """``value`` on the test images; what was ``chosen``, and each candidate's value on validation, ``tried``."""

    value: float
    chosen: dict[str, float]
    tried: list[dict[str, float]]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Examples:
    """``features`` ``[N, F]``, ``labels`` int64 ``[N]``, or int8 ``[N, C]`` as Tagged has them."""

    features: Tensor
    labels: Tensor

    def at(self, rows: np.ndarray) -> Examples:
        picked = torch.from_numpy(rows).to(self.labels.device)
        return Examples(self.features[picked], self.labels[picked])

    def targets(self, metric: str, classes: int) -> Tensor:
        """For a softmax; or for one-vs-rest where each class is ranked by itself."""
        one_of_many = metric == "map11" and self.labels.ndim == 1
        return one_hot(self.labels, classes).bool() if one_of_many else self.labels


def best(tried: list[dict[str, float]]) -> dict[str, float]:
    """The candidate with the highest ``value``; of several the middle one, as they were tried."""
    highest = max(candidate["value"] for candidate in tried)
    equal = [candidate for candidate in tried if candidate["value"] == highest]
    return equal[(len(equal) - 1) // 2]


def logistic(
    fit: Examples, chosen_on: Examples, both: Examples, test: Examples, *, metric: str, classes: int,
    lambdas: tuple[float, ...],
) -> Outcome:  # fmt: skip
    """Of equally good lambdas the middle one is taken; with it the classifier is fitted again to all but the test."""
    found = solve(fit.features, fit.targets(metric, classes), sorted(lambdas, reverse=True), classes)
    scores = [measure(metric, logits, chosen_on.labels) for logits in found.logits(chosen_on.features)]
    tried = [{"lambda": strength, "value": value} for strength, value in zip(found.lambdas, scores, strict=True)]
    strength = best(tried)["lambda"]
    row = found.lambdas.index(strength)
    start = Solutions(
        (strength,), found.weight[row, None], found.bias[row, None], found.objective[row, None],
        found.converged[row, None],
    )  # fmt: skip
    final = solve(both.features, both.targets(metric, classes), (strength,), classes, start)
    warnings = []
    if len(lambdas) > 2 and strength in (min(lambdas), max(lambdas)):
        end, beyond = ("smallest", "smaller") if strength == min(lambdas) else ("largest", "larger")
        warnings.append(f"the best lambda, {strength:g}, is the {end} tried: add {beyond} ones to logistic.lambdas")
    lost = int((~found.converged).sum()) + int((~final.converged).sum())
    if lost:
        warnings.append(f"{lost} of {len(lambdas) + 1} fits stopped short of their optimum")
    return Outcome(measure(metric, final.logits(test.features)[0], test.labels), {"lambda": strength}, tried, warnings)


def knn(
    fit: Examples, chosen_on: Examples, both: Examples, test: Examples, *, metric: str, classes: int,
    ks: tuple[int, ...],
) -> Outcome:  # fmt: skip
    """The number of neighbours is chosen on validation; then all but the test are neighbours."""

    def values(bank: Examples, asked: Examples, numbers: tuple[int, ...]) -> list[dict[str, float]]:
        chunks = [v for _, v in knn_votes(bank.features, bank.labels, asked.features, classes, ks=numbers)]
        return [{"k": k, "value": measure(metric, torch.cat([v[k] for v in chunks]), asked.labels)} for k in numbers]

    tried = values(fit, chosen_on, ks)
    k = int(best(tried)["k"])
    return Outcome(values(both, test, (k,))[0]["value"], {"k": k}, tried)
