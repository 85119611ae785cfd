from __future__ import annotations

import numpy as np
import pytest

from relicctl.core.counter_rng import Stream, derive_seed, draw_uniform


def test_a_draw_depends_on_its_coordinates_alone():
    together = draw_uniform(7, Stream.GEOMETRY, np.arange(50)[:, None], np.arange(6), n=4)
    assert together.shape == (50, 6, 4)
    assert together.dtype == np.float64
    for sample, view in [(0, 0), (3, 5), (49, 2)]:
        alone = draw_uniform(7, Stream.GEOMETRY, sample, view, n=4)
        assert np.array_equal(together[sample, view], alone)
    assert np.array_equal(draw_uniform(7, Stream.GEOMETRY, 3, 5, n=2), together[3, 5, :2])


def test_values_are_pinned():
    """A change of the hash changes every run: resumed runs would silently take other crops."""
    assert derive_seed(0, Stream.ORDER) == 6017775124710473527
    assert draw_uniform(1, Stream.EVAL, 2, -3, n=2).tolist() == [0.39655904284427956, 0.6544653401236278]


@pytest.mark.parametrize("change", ["seed", "stream", "first", "second", "swap", "fewer"])
def test_draws_depend_on_every_coordinate(change):
    def draw(seed=5, stream=Stream.MASK, *coords):
        return draw_uniform(seed, stream, *(coords or (10, 20)), n=1000)

    other = {
        "seed": lambda: draw(6),
        "stream": lambda: draw(5, Stream.ORDER),
        "first": lambda: draw(5, Stream.MASK, 11, 20),
        "second": lambda: draw(5, Stream.MASK, 10, 21),
        "swap": lambda: draw(5, Stream.MASK, 20, 10),
        "fewer": lambda: draw(5, Stream.MASK, 10),
    }[change]()
    assert not np.any(draw() == other)
    assert abs(np.corrcoef(draw(), other)[0, 1]) < 4 / np.sqrt(1000)


def test_draws_are_uniform_along_every_axis():
    draws = draw_uniform(0, Stream.PHOTOMETRY, np.arange(100)[:, None], np.arange(40), n=25)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    chi_square = np.square(counts - draws.size / 100).sum() / (draws.size / 100)
    assert 43 < chi_square < 155  # 99 degrees of freedom: four standard deviations to either side
    for axis in range(3):
        means = draws.mean(axis=tuple(a for a in range(3) if a != axis))
        spread = np.sqrt(1 / 12 / (draws.size / draws.shape[axis]))
        assert np.abs(means - 0.5).max() < 5 * spread
        before, after = np.moveaxis(draws, axis, 0)[:-1].ravel(), np.moveaxis(draws, axis, 0)[1:].ravel()
        assert abs(np.corrcoef(before, after)[0, 1]) < 5 / np.sqrt(before.size)


def test_seeds_are_distinct_and_fit_a_generator():
    seeds = {derive_seed(seed, Stream.NEGATIVES, step) for seed in range(20) for step in range(500)}
    assert len(seeds) == 20 * 500
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_any_integer_is_a_seed_and_numpy_integers_are_integers():
    big = draw_uniform(2**200 + 1, Stream.INIT, -1, n=3)
    assert np.all((big >= 0) & (big < 1))
    assert derive_seed(3, Stream.INIT, np.int32(-4)) == derive_seed(3, Stream.INIT, -4)
    with pytest.raises(TypeError, match="integers"):
        draw_uniform(0, Stream.INIT, 0.5, n=1)
