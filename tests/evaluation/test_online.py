"""The collapse monitor tells a healthy representation from a collapsed one."""

import math

import pytest
import torch

from relicctl.evaluation import online


def test_rank_of_known_matrices():
    assert online.compute_rankme(torch.eye(16)) == pytest.approx(16, rel=1e-3)
    assert online.compute_rankme(torch.ones(16, 8)) == pytest.approx(1, rel=1e-3)
    two = torch.zeros(10, 6)
    two[0, 0] = two[1, 1] = 3
    assert online.compute_rankme(two) == pytest.approx(2, rel=1e-3)


def test_spread_is_one_on_the_sphere_and_zero_in_a_point():
    torch.manual_seed(0)
    assert online.compute_normalized_std(torch.randn(4000, 64)) == pytest.approx(1, abs=0.02)
    assert online.compute_normalized_std(torch.ones(10, 64) * 5) == pytest.approx(0, abs=1e-6)


HEALTHY = {"rankme": 40.0, "embedding_std": 0.9, "entropy": 1.5}


def test_warnings_come_with_collapse_only():
    assert online.get_collapse_warning(HEALTHY, rows=64, candidates=11) is None
    assert "spread" in str(online.get_collapse_warning(HEALTHY | {"embedding_std": 0.01}, rows=64))
    assert "dimension" in str(online.get_collapse_warning(HEALTHY | {"rankme": 1.2}, rows=64))
    assert online.get_collapse_warning(HEALTHY | {"rankme": 1.2}, rows=2) is None  # two images cannot span more
    blind = HEALTHY | {"entropy": math.log(11)}
    assert "uniform guess among 11" in str(online.get_collapse_warning(blind, rows=64, candidates=11))
    assert online.get_collapse_warning(blind, rows=64) is None  # an objective without a likelihood


def test_the_watch_warns_once_after_two_lines_in_a_row():
    said: list[str] = []
    watch = online.CollapseMonitor(said.append, rows=64)
    sick = HEALTHY | {"embedding_std": 0.0}
    for step, figures in enumerate([sick, HEALTHY, sick, {"knn20": 0.1}, sick, sick, sick]):
        watch(step, figures)
    assert len(said) == 1
    assert said[0].startswith("step 4: outputs")
