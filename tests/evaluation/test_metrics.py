"""The metrics are scikit-learn's; 11-point mean average precision is PASCAL VOC 2007's, by a written-out loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relicctl.evaluation.metrics import compute_map11, compute_metric

metrics = pytest.importorskip("sklearn.metrics")


@pytest.fixture
def told():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (200,), generator=generator)
    labels[labels == 3] = 0  # a class without images
    return torch.randn(200, 5, generator=generator) + torch.nn.functional.one_hot(labels, 5), labels


def test_top1_and_mean_per_class_are_scikit_learns(told):
    scores, labels = told
    guesses = scores.argmax(1).numpy()
    assert compute_metric("top1", scores, labels) == pytest.approx(metrics.accuracy_score(labels, guesses), abs=1e-12)
    here = np.isin(guesses, labels)  # scikit-learn warns of guesses that are no label, and counts them as wrong too
    assert not here.all()
    with pytest.warns(UserWarning, match="y_pred contains classes"):
        wanted = metrics.balanced_accuracy_score(labels, guesses)
    assert compute_metric("mean_per_class", scores, labels) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("decimals", [6, 0], ids=["all scores differ", "many are equal"])
def test_map11_takes_the_points_of_scikit_learns_curve(told, decimals):
    scores, labels = told
    truth = torch.nn.functional.one_hot(labels, 5).bool()
    truth[::3, 1] = True  # several classes an image
    scores = (scores * 2).round(decimals=decimals)
    wanted = []
    for c in (0, 1, 2, 4):
        precision, recall, _ = metrics.precision_recall_curve(truth[:, c], scores[:, c])
        reached = [precision[:-1][recall[:-1] >= tenth / 10 - 1e-12].max() for tenth in range(11)]
        wanted.append(np.mean(reached))
    assert compute_map11(scores, truth) == pytest.approx(np.mean(wanted), abs=1e-12)
    assert compute_metric("map11", scores, truth) == compute_map11(scores, truth)


def test_map11_of_a_single_label_takes_it_as_one_of_many(told):
    scores, labels = told
    assert compute_metric("map11", scores, labels) == compute_map11(
        scores, torch.nn.functional.one_hot(labels, 5).bool()
    )
    perfect = torch.nn.functional.one_hot(labels, 5).float()
    assert compute_metric("map11", perfect, labels) == 1


def test_images_that_do_not_count_for_a_class_are_as_if_they_were_not_there(told):
    scores, labels = told
    truth = torch.where(torch.nn.functional.one_hot(labels, 5) > 0, 1, -1).to(torch.int8)
    assert compute_map11(scores, truth) == compute_map11(scores, truth > 0)
    truth[::4, 0] = 0
    wanted = [
        compute_map11(scores[truth[:, c] != 0, c, None], truth[truth[:, c] != 0, c, None] > 0) for c in (0, 1, 2, 4)
    ]
    assert compute_map11(scores, truth) == pytest.approx(np.mean(wanted), abs=1e-12)
    assert compute_map11(scores, truth) != compute_map11(scores, truth > 0)
