"""What is chosen is best on validation, told when it lies at an end, and fitted again with validation's images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from relicctl.evaluation.features import LabelledFeatures
from relicctl.evaluation.metrics import find_best_candidate
from relicctl.evaluation.transfer import FeatureSplits, evaluate_knn, evaluate_logistic


@pytest.fixture(scope="module")
def examples() -> LabelledFeatures:
    """Two thirds of class 0, one third of class 1, well apart."""
    labels = (torch.arange(90) % 3 == 0).long()
    noise = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    return LabelledFeatures(noise + 4 * labels[:, None], labels, np.arange(90))


def split(examples: LabelledFeatures) -> FeatureSplits:
    train, val, test = np.split(np.arange(90), 3)
    rows = (train, val, np.concatenate([train, val]), test)
    return FeatureSplits(*map(examples.select, rows), classes=2)


@pytest.mark.parametrize("metric", ["top1", "mean_per_class"])
def test_the_lambda_that_classifies_best_is_taken_and_told_at_the_end_of_the_grid(examples, metric):
    found = evaluate_logistic(split(examples), metric=metric, l2=(1.0, 1e9, 2e9))
    assert found.best_params == {"lambda": 1.0}  # at the others all are of the more frequent class
    assert found.value > 0.95
    assert [candidate["lambda"] for candidate in found.candidates] == [2e9, 1e9, 1.0]
    assert len(found.warnings) == 1
    assert "smaller ones to logistic.l2" in found.warnings[0]
    inside = evaluate_logistic(split(examples), metric=metric, l2=(1e-4, 1.0, 1e4, 1e9))
    assert inside.warnings == []


def test_map11_fits_one_class_against_the_rest(examples):
    found = evaluate_logistic(split(examples), metric="map11", l2=(0.1, 1.0, 10.0))
    assert found.value > 0.95


def test_the_final_fit_knows_validations_images(examples):
    both = replace(examples, labels=1 - examples.labels).select(np.arange(60))  # all labels swapped
    splits = replace(split(examples), trainval=both)
    found = evaluate_logistic(splits, metric="top1", l2=(1.0,))
    assert found.value < 0.05
    assert evaluate_knn(splits, metric="top1", k=(1,)).value < 0.05


def test_the_number_of_neighbours_is_chosen(examples):
    noisy = examples.labels.clone()
    noisy[:30:7] = 1 - noisy[:30:7]  # a single neighbour is misled now and then
    found = evaluate_knn(split(replace(examples, labels=noisy)), metric="mean_per_class", k=(1, 5, 30))
    values = {candidate["k"]: candidate["value"] for candidate in found.candidates}
    assert values[found.best_params["k"]] == max(values.values())
    assert found.value > 0.8


def test_of_equally_good_ones_the_middle_is_best():
    tried = [{"k": k, "value": v} for k, v in enumerate([0.1, 0.5, 0.5, 0.5, 0.2])]
    assert find_best_candidate(tried)["k"] == 2
