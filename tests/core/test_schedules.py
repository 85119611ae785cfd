from __future__ import annotations

import math

import pytest

from relicctl.core.optim import compute_ema_gamma, compute_learning_rate


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 0.08),
        (5, 0.4),
        (9, 0.72),
        (10, 0.8),  # the warm-up ends at its peak
        (11, 0.4 * (1 + math.cos(math.pi / 100))),
        (60, 0.4),  # half way down
        (110, 0.0),
        (500, 0.0),
    ],
)
def test_learning_rate(step, expected):
    rate = compute_learning_rate(step, peak=0.8, warmup_steps=10, total_steps=110)
    assert rate == pytest.approx(expected, abs=1e-15)


def test_learning_rate_without_warmup_starts_at_its_peak():
    assert compute_learning_rate(0, peak=0.8, warmup_steps=0, total_steps=100) == 0.8
    assert compute_learning_rate(50, peak=0.8, warmup_steps=0, total_steps=100) == pytest.approx(0.4)


def test_learning_rate_when_warmup_is_as_long_as_the_run():
    assert compute_learning_rate(10, peak=0.8, warmup_steps=20, total_steps=10) == pytest.approx(0.4)
    assert compute_learning_rate(10, peak=0.8, warmup_steps=10, total_steps=10) == 0.8


@pytest.mark.parametrize("gamma0", [0.996, 0.99, 0.97])
def test_ema_gamma(gamma0):
    assert compute_ema_gamma(0, gamma0=gamma0, total_steps=1000) == gamma0
    assert compute_ema_gamma(500, gamma0=gamma0, total_steps=1000) == pytest.approx((1 + gamma0) / 2)
    assert compute_ema_gamma(250, gamma0=gamma0, total_steps=1000) == pytest.approx(
        1 - (1 - gamma0) * (math.sqrt(0.5) + 1) / 2
    )
    assert compute_ema_gamma(1000, gamma0=gamma0, total_steps=1000) == 1.0
    assert compute_ema_gamma(2000, gamma0=gamma0, total_steps=1000) == 1.0


def test_schedules_return_python_floats():
    assert type(compute_learning_rate(3, peak=1.0, warmup_steps=2, total_steps=9)) is float
    assert type(compute_ema_gamma(3, gamma0=0.9, total_steps=9)) is float
