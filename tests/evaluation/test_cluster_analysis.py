"""Cluster figures against plain loops, and what separation does to them."""

import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from relicctl.evaluation.cluster_analysis import (
    analyze_clusters,
    compute_discriminant_ratio,
    compute_neighbour_distances,
    plot_clusters,
)


@pytest.fixture
def cloud():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    return torch.randn(60, 5, generator=generator, dtype=torch.float64), labels


def test_ratio_equals_a_literal_loop(cloud):
    points, labels = cloud
    ratio = compute_discriminant_ratio(points, labels, 4)
    mean = {
        c: np.mean([p for p, l in zip(points.numpy(), labels.tolist(), strict=True) if l == c], 0) for c in range(3)
    }
    for c in range(3):
        between = np.mean([np.sum((mean[c] - mean[o]) ** 2) for o in range(3) if o != c])
        members = [p for p, l in zip(points.numpy(), labels.tolist(), strict=True) if l == c]
        within = np.mean([np.sum((p - mean[c]) ** 2) for p in members])
        assert ratio[c] == pytest.approx(between / within)
    assert math.isnan(ratio[3])  # a class without images


def test_neighbours_equal_a_literal_loop(cloud):
    points = cloud[0]
    found = compute_neighbour_distances(points)
    for i, row in enumerate(points.tolist()):
        others = sorted(math.dist(row, other) for j, other in enumerate(points.tolist()) if j != i)
        assert found[i].tolist() == pytest.approx(others[:5])


def test_separated_classes_have_a_higher_ratio_whatever_the_scale(cloud):
    points, labels = cloud
    shift = 4 * torch.eye(5, dtype=torch.float64)[labels]
    near, apart, larger = (
        analyze_clusters(p, labels, 3, seed=0) for p in (points, points + shift, 100 * (points + shift))
    )
    assert (apart.discriminant_ratio > 5 * near.discriminant_ratio).all()
    np.testing.assert_allclose(apart.discriminant_ratio, larger.discriminant_ratio)
    np.testing.assert_allclose(apart.neighbour_distances, larger.neighbour_distances)


def test_the_map_depends_on_the_seed_alone_and_all_of_it_is_json(cloud, tmp_path):
    points, labels = cloud
    one, again = (analyze_clusters(points, labels, 4, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one.embedding, again.embedding)
    record = json.loads(json.dumps(one.to_dict("abcd", labels.numpy()), allow_nan=False))
    assert record["classes"]["d"] == {"discriminant_ratio": None, "neighbour_distance": None}
    assert len(record["images"]) == 60
    assert len(record["images"][0]["neighbours"]) == 5
    plot_clusters(tmp_path / "map.png", {"one": one, "two": again}, "abcd", labels.numpy())
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
