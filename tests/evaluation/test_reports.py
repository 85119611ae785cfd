"""Figures against plain loops, and pictures of few and of many classes."""

import numpy as np
import pytest
import torch

from relicctl.console import Console
from relicctl.evaluation import reports
from relicctl.evaluation.linear import SweepResult
from relicctl.evaluation.metrics import ClassificationMetrics


@pytest.fixture
def guessed():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (80,), generator=generator)
    labels[labels == 3] = 2  # no image of class 3
    return torch.randn(80, 8, generator=generator), labels


def test_figures_equal_a_literal_count(guessed):
    logits, labels = guessed
    scores = ClassificationMetrics.from_logits(logits, labels)
    order = [sorted(range(8), key=lambda c: -row[c]) for row in logits.tolist()]
    truth = labels.tolist()
    assert scores.top1 == pytest.approx(np.mean([guess[0] == label for guess, label in zip(order, truth, strict=True)]))
    assert scores.top5 == pytest.approx(
        np.mean([label in guess[:5] for guess, label in zip(order, truth, strict=True)])
    )
    shares = []
    for c in range(8):
        rows = [guess[0] for guess, label in zip(order, truth, strict=True) if label == c]
        assert scores.confusion[c].tolist() == [rows.count(told) for told in range(8)]
        if rows:
            shares.append(rows.count(c) / len(rows))
    assert scores.mean_per_class == pytest.approx(np.mean(shares))
    table = scores.get_class_metrics("abcdefgh")
    assert table["d"] == {"images": 0, "top1": None}
    assert table["a"]["top1"] == pytest.approx(shares[0])


def test_with_fewer_than_five_classes_every_fifth_guess_is_right():
    scores = ClassificationMetrics.from_logits(torch.eye(3), torch.tensor([0, 1, 0]))
    assert (scores.top1, scores.top5) == (pytest.approx(2 / 3), 1.0)


@pytest.mark.parametrize("classes", [3, 20, 100])
def test_pictures_and_tables_of_few_and_many_classes(classes, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat(2)
    scores = ClassificationMetrics.from_logits(torch.randn(2 * classes, classes, generator=generator), labels)
    names = [f"class number {c:03d}, and a long name" for c in range(classes)]
    choice = SweepResult((0.1, 1.0), (0.2, 0.3)) if classes < 100 else None
    reports.plot_linear_results(tmp_path / "picture.png", scores, names, choice, "title")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    figures = scores.to_dict() | {"knn20": 0.1, "knn200": 0.2, "tests": {}, "encoder": {"source": "runs/x"}}
    figures["protocol"] = {"test": "photos/val", "test_images": len(labels)}
    more = {"per_class": scores.get_class_metrics(names), "confusion": scores.confusion.tolist()}
    reports.print_linear_results(figures | more | {"sweep": choice.to_dict() if choice else None}, Console())
    said = capsys.readouterr()
    assert said.out == ""
    assert f"accuracy of runs/x on photos/val, {len(labels)} images" in said.err.split("\n\n")[-1]  # the last table
    assert ("worst" in said.err) == (classes == 100)
    assert ("chosen" in said.err) == (choice is not None)
    assert ("predicted" in said.err) == (classes == 3)
