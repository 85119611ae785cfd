"""The collapse monitor tells a healthy representation from a collapsed one."""

import pytest
import torch

from relicctl.evaluation import collapse


def test_rank_of_known_matrices():
    assert collapse.rank_me(torch.eye(16)) == pytest.approx(16, rel=1e-3)
    assert collapse.rank_me(torch.ones(16, 8)) == pytest.approx(1, rel=1e-3)
    two = torch.zeros(10, 6)
    two[0, 0] = two[1, 1] = 3
    assert collapse.rank_me(two) == pytest.approx(2, rel=1e-3)


def test_spread_is_one_on_the_sphere_and_zero_in_a_point():
    torch.manual_seed(0)
    assert collapse.spread(torch.randn(4000, 64)) == pytest.approx(1, abs=0.02)
    assert collapse.spread(torch.ones(10, 64) * 5) == pytest.approx(0, abs=1e-6)


def test_warnings_come_with_collapse_only():
    assert collapse.warning(rank=40, deviation=0.9, rows=64) is None
    assert "spread" in str(collapse.warning(rank=40, deviation=0.01, rows=64))
    assert "dimension" in str(collapse.warning(rank=1.2, deviation=0.5, rows=64))
    assert collapse.warning(rank=1.2, deviation=0.5, rows=2) is None  # two images cannot span more
