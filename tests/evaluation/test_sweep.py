"""Holding out, comparing, choosing."""

import numpy as np
import pytest
import torch

from relicctl.evaluation.linear import Classifiers
from relicctl.evaluation.sweep import Choice, choose, hold_out


@pytest.mark.parametrize(("count", "held"), [(1000, 100), (15, 2), (3, 1), (2, 1)])
def test_held_out_and_kept_are_all_images_once(count, held):
    kept, chosen_on = hold_out(count, 0.1, seed=4)
    assert len(chosen_on) == held
    assert sorted([*kept, *chosen_on]) == list(range(count))
    again = hold_out(count, 0.1, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip((kept, chosen_on), again, strict=True))


def test_accuracies_are_those_of_each_classifier_alone():
    generator = torch.Generator().manual_seed(0)
    classifiers = Classifiers(6, 3, (0.1, 0.2, 0.3, 0.4))
    torch.nn.init.normal_(classifiers.weight, generator=generator)
    features, labels = torch.randn(50, 6, generator=generator), torch.randint(3, (50,), generator=generator)
    choice = choose(classifiers, features, labels)
    expected = [(classifiers.linear(r)(features).argmax(1) == labels).double().mean().item() for r in range(4)]
    assert choice.accuracy == pytest.approx(expected)
    assert choice.rates == (0.1, 0.2, 0.3, 0.4)
    assert expected[choice.rates.index(choice.rate)] == max(expected)


def test_of_equals_the_middle_is_taken_and_an_end_is_warned_of():
    assert Choice((1.0, 2.0, 3.0, 4.0, 5.0), (0.1, 0.5, 0.5, 0.5, 0.2)).rate == 3.0
    assert Choice((1.0, 2.0, 3.0), (0.1, 0.5, 0.2)).warning() is None
    assert "smallest" in str(Choice((3.0, 2.0, 1.0), (0.1, 0.2, 0.5)).warning())
    assert "largest" in str(Choice((1.0, 2.0, 3.0), (0.1, 0.2, 0.5)).warning())
