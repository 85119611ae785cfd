"""Holding out, comparing, choosing."""

import numpy as np
import pytest
import torch

from relicctl.evaluation.linear import LinearClassifierGrid, SweepResult, evaluate_rates, split_holdout_rows


@pytest.mark.parametrize(("count", "held"), [(1000, 100), (15, 2), (3, 1), (2, 1)])
def test_held_out_and_kept_are_all_images_once(count, held):
    kept, chosen_on = split_holdout_rows(count, 0.1, seed=4)
    assert len(chosen_on) == held
    assert sorted([*kept, *chosen_on]) == list(range(count))
    again = split_holdout_rows(count, 0.1, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip((kept, chosen_on), again, strict=True))


def test_accuracies_are_those_of_each_classifier_alone():
    generator = torch.Generator().manual_seed(0)
    classifiers = LinearClassifierGrid(6, 3, (0.1, 0.2, 0.3, 0.4))
    torch.nn.init.normal_(classifiers.weight, generator=generator)
    features, labels = torch.randn(50, 6, generator=generator), torch.randint(3, (50,), generator=generator)
    choice = evaluate_rates(classifiers, features, labels)
    expected = [(classifiers.get_classifier(r)(features).argmax(1) == labels).double().mean().item() for r in range(4)]
    assert choice.accuracy == pytest.approx(expected)
    assert choice.rates == (0.1, 0.2, 0.3, 0.4)
    assert expected[choice.rates.index(choice.best_rate)] == max(expected)


def test_of_equals_the_middle_is_taken_and_an_end_is_warned_of():
    assert SweepResult((1.0, 2.0, 3.0, 4.0, 5.0), (0.1, 0.5, 0.5, 0.5, 0.2)).best_rate == 3.0
    assert SweepResult((1.0, 2.0, 3.0), (0.1, 0.5, 0.2)).get_warning() is None
    assert "smallest" in str(SweepResult((3.0, 2.0, 1.0), (0.1, 0.2, 0.5)).get_warning())
    assert "largest" in str(SweepResult((1.0, 2.0, 3.0), (0.1, 0.2, 0.5)).get_warning())
