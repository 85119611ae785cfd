"""Frozen features judged on another data set: whatever is chosen is chosen on validation; the test is asked once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from relicctl.evaluation.knn import iter_knn_votes
from relicctl.evaluation.logistic import LogisticModels, fit_logistic_regression
from relicctl.evaluation.metrics import compute_metric


@dataclass(frozen=True)
class ProtocolResult:
    """``value`` on the test images; what was ``chosen``, and each candidate's value on validation, ``candidates``."""

    value: float
    best_params: dict[str, float]
    candidates: list[dict[str, float]]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LabelledFeatures:
    """``features`` ``[N, F]``, ``labels`` int64 ``[N]``, or int8 ``[N, C]`` as Tagged has them."""

    features: Tensor
    labels: Tensor

    def select_rows(self, rows: np.ndarray) -> LabelledFeatures:
        picked = torch.from_numpy(rows).to(self.labels.device)
        return LabelledFeatures(self.features[picked], self.labels[picked])

    def get_targets(self, metric: str, classes: int) -> Tensor:
        """For a softmax; or for one-vs-rest where each class is ranked by itself."""
        one_of_many = metric == "map11" and self.labels.ndim == 1
        return one_hot(self.labels, classes).bool() if one_of_many else self.labels


def find_best_candidate(candidates: list[dict[str, float]]) -> dict[str, float]:
    """The candidate with the highest ``value``; of several the middle one, as they were tried."""
    highest = max(candidate["value"] for candidate in candidates)
    equal = [candidate for candidate in candidates if candidate["value"] == highest]
    return equal[(len(equal) - 1) // 2]


def evaluate_logistic(
    train: LabelledFeatures, val: LabelledFeatures, trainval: LabelledFeatures, test: LabelledFeatures, *,
    metric: str, classes: int,
    lambdas: tuple[float, ...],
) -> ProtocolResult:  # fmt: skip
    """Of equally good lambdas the middle one is taken; with it the classifier is fitted again to all but the test."""
    models = fit_logistic_regression(
        train.features, train.get_targets(metric, classes), sorted(lambdas, reverse=True), classes
    )
    scores = [compute_metric(metric, logits, val.labels) for logits in models.compute_logits(val.features)]
    candidates = [{"lambda": strength, "value": value} for strength, value in zip(models.lambdas, scores, strict=True)]
    strength = find_best_candidate(candidates)["lambda"]
    row = models.lambdas.index(strength)
    start = LogisticModels(
        (strength,), models.weight[row, None], models.bias[row, None], models.objective[row, None],
        models.converged[row, None],
    )  # fmt: skip
    final = fit_logistic_regression(
        trainval.features, trainval.get_targets(metric, classes), (strength,), classes, start
    )
    warnings = []
    if len(lambdas) > 2 and strength in (min(lambdas), max(lambdas)):
        end, beyond = ("smallest", "smaller") if strength == min(lambdas) else ("largest", "larger")
        warnings.append(f"the best lambda, {strength:g}, is the {end} tried: add {beyond} ones to logistic.lambdas")
    unconverged = int((~models.converged).sum()) + int((~final.converged).sum())
    if unconverged:
        warnings.append(f"{unconverged} of {len(lambdas) + 1} fits stopped short of their optimum")
    return ProtocolResult(
        compute_metric(metric, final.compute_logits(test.features)[0], test.labels),
        {"lambda": strength},
        candidates,
        warnings,
    )


def evaluate_knn(
    train: LabelledFeatures, val: LabelledFeatures, trainval: LabelledFeatures, test: LabelledFeatures, *,
    metric: str, classes: int,
    ks: tuple[int, ...],
) -> ProtocolResult:  # fmt: skip
    """The number of neighbours is chosen on validation; then all but the test are neighbours."""

    def evaluate_ks(
        bank: LabelledFeatures, queries: LabelledFeatures, numbers: tuple[int, ...]
    ) -> list[dict[str, float]]:
        chunks = [v for _, v in iter_knn_votes(bank.features, bank.labels, queries.features, classes, ks=numbers)]
        return [
            {"k": k, "value": compute_metric(metric, torch.cat([v[k] for v in chunks]), queries.labels)}
            for k in numbers
        ]

    candidates = evaluate_ks(train, val, ks)
    k = int(find_best_candidate(candidates)["k"])
    return ProtocolResult(evaluate_ks(trainval, test, (k,))[0]["value"], {"k": k}, candidates)
