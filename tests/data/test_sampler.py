from __future__ import annotations

import numpy as np
import pytest

from relicctl.data.sampler import Sampler
from relicctl.errors import UsageError


def test_an_epoch_visits_every_sample_at_most_once_and_drops_only_the_rest():
    sampler = Sampler(seed=1, size=103, batch_size=10)
    assert sampler.steps_per_epoch == 10
    for epoch in range(3):
        seen = np.concatenate([sampler.get_batch_indices(epoch * 10 + k) for k in range(10)])
        assert len(set(seen.tolist())) == 100
        assert seen.min() >= 0
        assert seen.max() < 103


def test_a_batch_is_a_function_of_seed_and_step():
    forward = Sampler(0, 64, 8)
    batches = [forward.get_batch_indices(step) for step in range(32)]
    for step in (31, 0, 17, 8, 30):
        assert np.array_equal(Sampler(0, 64, 8).get_batch_indices(step), batches[step])
    assert batches[0].dtype == np.int64
    assert batches[0].shape == (8,)
    assert not np.array_equal(Sampler(1, 64, 8).get_batch_indices(0), batches[0])
    assert not np.array_equal(batches[0], batches[8])


def test_the_order_is_the_same_for_any_batch_size():
    whole, halves = Sampler(3, 40, 40), Sampler(3, 40, 20)
    assert np.array_equal(
        whole.get_batch_indices(1), np.concatenate([halves.get_batch_indices(2), halves.get_batch_indices(3)])
    )


def test_every_sample_takes_every_place():
    firsts = np.array([Sampler(0, 10, 10).get_batch_indices(epoch) for epoch in range(1000)])
    counts = np.stack([np.bincount(firsts[:, place], minlength=10) for place in range(10)])
    assert np.abs(counts - 100).max() < 50  # standard deviation 9.5


def test_epochs_are_counted_in_whole_batches():
    sampler = Sampler(0, 25, 10)
    assert [sampler.get_epoch(step) for step in range(5)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("batch_size", [11, 0])
def test_a_batch_that_cannot_be_filled_is_refused(batch_size):
    with pytest.raises(UsageError) as error:
        Sampler(0, 10, batch_size)
    assert "optim.batch_size" in error.value.fix
