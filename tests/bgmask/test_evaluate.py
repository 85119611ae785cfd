"""Metrics of maps: those of a perfect and an inverted map, of a literal loop over thresholds, and what is left out."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from relicctl.bgmask.evaluate import (
    BETA2,
    METRICS,
    SaliencyMetrics,
    compute_image_metrics,
    compute_prior_agreement,
)
from relicctl.bgmask.pipeline import summarize_priors


def measure(maps, masks) -> dict[str, float | None]:
    metrics = SaliencyMetrics()
    for saliency, mask in zip(maps, masks, strict=True):
        metrics.add_image_metrics(compute_image_metrics(saliency, mask))
    return metrics.compute()


@pytest.fixture
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Five maps, of whole 255ths, and their masks, of different sizes."""
    generator = np.random.default_rng(0)
    pairs = []
    for number in range(5):
        mask = np.zeros((20 + number, 30), dtype=bool)
        mask[5:15, 4 + number : 20] = True
        noise = generator.integers(0, 200, mask.shape)
        pairs.append((np.clip(noise + 90 * mask, 0, 255) / 255, mask))
    return pairs


def test_a_perfect_map_scores_highest_and_an_inverted_one_lowest(pairs):
    perfect = measure([mask.astype(float) for _, mask in pairs], [mask for _, mask in pairs])
    assert {perfect[name] for name in ("max_f", "f_50", "iou", "accuracy")} == {1.0}
    assert perfect["mae"] == 0
    assert perfect["s_measure"] == pytest.approx(1)
    inverted = measure([1.0 - mask for _, mask in pairs], [mask for _, mask in pairs])
    assert {inverted[name] for name in ("f_50", "iou", "accuracy")} == {0.0}
    assert inverted["mae"] == 1
    for name in ("s_measure", "e_measure"):
        assert inverted[name] < 0.5 < perfect[name]


def test_metrics_equal_the_literal_loop_over_thresholds_and_images(pairs):
    def f_at(threshold: float) -> float:
        precision, recall = [], []
        for saliency, mask in pairs:
            found = saliency >= threshold
            precision.append((found & mask).sum() / max(found.sum(), 1))
            recall.append((found & mask).sum() / mask.sum())
        p, r = np.mean(precision), np.mean(recall)
        return (1 + BETA2) * p * r / (BETA2 * p + r) if p + r else 0.0

    metrics = measure(*zip(*pairs, strict=True))
    assert metrics["max_f"] == pytest.approx(max(f_at(t / 255) for t in range(256)), abs=1e-12)
    assert metrics["f_50"] == pytest.approx(f_at(128 / 255), abs=1e-12)
    assert metrics["max_f"] >= metrics["f_50"]
    ious = [((s > 0.5) & m).sum() / ((s > 0.5) | m).sum() for s, m in pairs]
    assert metrics["iou"] == pytest.approx(np.mean(ious), abs=1e-12)
    assert metrics["accuracy"] == pytest.approx(np.mean([((s > 0.5) == m).mean() for s, m in pairs]), abs=1e-12)
    assert metrics["mae"] == pytest.approx(np.mean([abs(s - m).mean() for s, m in pairs]), abs=1e-12)


def test_metrics_equal_those_of_the_library(pairs):
    import py_sod_metrics as sod

    structure, alignment = sod.Smeasure(), sod.Emeasure()
    for saliency, mask in pairs:
        structure.step(saliency, mask, normalize=False)
        alignment.step(saliency, mask, normalize=False)
    metrics = measure(*zip(*pairs, strict=True))
    assert metrics["s_measure"] == pytest.approx(structure.get_results()["sm"], abs=1e-12)
    assert metrics["e_measure"] == pytest.approx(alignment.get_results()["em"]["curve"].mean(), abs=1e-12)


def test_a_map_that_is_not_finite_is_left_out(pairs):
    with_hole, without = SaliencyMetrics(), SaliencyMetrics()
    for number, (saliency, mask) in enumerate(pairs):
        if number != 2:
            without.add_image_metrics(compute_image_metrics(saliency, mask))
        else:
            saliency = saliency.copy()
            saliency[3, 3] = np.nan
        with_hole.add_image_metrics(compute_image_metrics(saliency, mask))
    assert with_hole.compute() == without.compute()
    assert with_hole.images == without.images == 4


def test_without_images_every_metric_is_none():
    assert measure([], []) == dict.fromkeys(METRICS)


@pytest.mark.parametrize("fill", [False, True])
def test_masks_without_object_or_without_background_give_numbers(pairs, fill):
    saliency, mask = pairs[0]
    metrics = measure([saliency], [np.full_like(mask, fill)])
    assert all(0 <= metrics[name] <= 1.01 for name in METRICS)


# Agreement of priors.


def summarize_agreement(maps: np.ndarray, valid: np.ndarray) -> float | None:
    """The mean agreement in results.json of the four priors' maps."""
    priors = SimpleNamespace(maps=maps, valid=valid, count_invalid=dict)
    return summarize_priors(priors)["prior_agreement"]["mean"]


def test_agreement_is_the_mean_correlation_of_two_maps_of_an_image():
    maps = np.random.default_rng(1).integers(0, 256, (6, 4, 8, 8), dtype=np.uint8)
    matrix = compute_prior_agreement(maps, np.ones((6, 4), dtype=bool))
    literal = np.mean([np.corrcoef(image.reshape(4, -1)) for image in maps], axis=0)
    np.testing.assert_allclose(matrix, literal, atol=1e-12)
    mean = literal[np.triu_indices(4, 1)].mean()
    assert summarize_agreement(maps, np.ones((6, 4), dtype=bool)) == pytest.approx(mean)


def test_agreement_ignores_invalid_and_constant_maps():
    generator = np.random.default_rng(2)
    maps = generator.integers(0, 256, (4, 2, 8, 8), dtype=np.uint8)
    valid = np.ones((4, 2), dtype=bool)
    valid[1, 0] = False
    maps[2, 1] = 7
    literal = np.mean([np.corrcoef(maps[i].reshape(2, -1))[0, 1] for i in (0, 3)])
    assert compute_prior_agreement(maps, valid)[0, 1] == pytest.approx(literal)
    assert summarize_agreement(np.repeat(maps, 2, axis=1), np.zeros((4, 4), dtype=bool)) is None
