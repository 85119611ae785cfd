"""The pieces of a bench: generated photos, counted operations, figures from timings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relicctl.benchmark.data_pipeline import NUM_DISTINCT, GeneratedPhotos
from relicctl.benchmark.hardware_limits import count_flop_per_image, estimate_largest_batch, find_largest_fit
from relicctl.benchmark.train_step import LapTimer, summarize_step, summarize_timings
from relicctl.config.resolve import resolve_config
from relicctl.pretraining.estimate import estimate_step_memory
from relicctl.pretraining.task import build_networks

CPU = torch.device("cpu")


def test_generated_photos_are_imagenets_in_size_and_bytes():
    photos = GeneratedPhotos(4)
    assert photos.load(0).shape == (375, 500, 3)
    kilobytes = [len(photos.read(i)) / 1000 for i in range(4)]
    assert 90 < np.mean(kilobytes) < 130
    assert photos.load(0).std() > 20
    assert not np.array_equal(photos.load(0), photos.load(1))


def test_generated_photos_are_the_same_anywhere_and_come_again():
    photos = GeneratedPhotos(2 * NUM_DISTINCT + 1, 32, 24)
    assert photos.read(5) == GeneratedPhotos(8, 32, 24).read(5)
    assert photos.read(5) == photos.read(5 + NUM_DISTINCT)
    assert len({photos.read(i) for i in range(len(photos))}) == NUM_DISTINCT


def test_operations_of_the_main_set_up_are_the_known_ones():
    """ResNet-50 at 224 px: 4.09 G multiply-adds, so 8.2 GFLOP; three times that to train, once for the target."""
    counted = count_flop_per_image(resolve_config("r50-1000ep").config, 1000) / 1e9
    large, small = 8.18, 8.18 * (96 / 224) ** 2
    assert counted == pytest.approx(4 * (3 + 1) * large + 2 * 3 * small, rel=0.03)


def test_computing_twice_to_save_memory_counts_once():
    plain = resolve_config(sets=["optim.batch_size=8", "loss.negatives=5", "model.width=0.25"]).config
    saving = resolve_config(
        sets=["optim.batch_size=8", "loss.negatives=5", "model.width=0.25", "optim.microbatch=4",
              "runtime.activation_checkpointing=true"]
    ).config  # fmt: skip
    assert count_flop_per_image(saving, 10) == count_flop_per_image(plain, 10)


def test_the_largest_batch_just_fits(monkeypatch):
    monkeypatch.setattr("relicctl.benchmark.hardware_limits.get_free_memory", lambda device: 4 * 2**30)
    config = resolve_config(sets=["model.arch=resnet18", "optim.batch_size=16"]).config
    largest = estimate_largest_batch(config, 10, "fp32", CPU)
    with torch.device("meta"):
        networks = build_networks(config)

    def need(batch: int) -> int:
        sized = config.model_copy(update={"optim": config.optim.model_copy(update={"batch_size": batch})})
        return sum(estimate_step_memory(sized, networks, "fp32").values())

    assert need(largest) <= 4 * 2**30 < need(largest + 1)


def test_nothing_fits_where_the_weights_do_not(monkeypatch):
    monkeypatch.setattr("relicctl.benchmark.hardware_limits.get_free_memory", lambda device: 2**20)
    assert estimate_largest_batch(resolve_config().config, 10, "fp32", CPU) == 0


@pytest.mark.parametrize("guess", [0, 8, 100, 1000, 5000])
@pytest.mark.parametrize("limit", [0, 7, 8, 1003, 4096])
def test_the_largest_that_fits_is_found_from_any_guess(guess, limit):
    asked = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    assert find_largest_fit(fits, guess) == limit // 8 * 8
    assert len(asked) <= 24


def test_figures_of_a_step():
    parts = {"augmentation": [1.0, 1.0, 9.0], "networks forward": [2.0, 2.0, 2.0], "networks backward": [5.0, 5.0, 5.0]}
    figures = summarize_step(parts, batch=16)
    assert figures["outside_networks"] == 0.125
    assert figures["step_images_per_s"] == {"median": 2.0, "min": 1.0, "max": 2.0, "runs": 3}


def test_a_spread_is_median_and_extremes():
    assert summarize_timings([3.0, 1.0, 2.00004]) == {"median": 2.0, "min": 1.0, "max": 3.0, "runs": 3}


def test_laps_leave_out_what_they_are_told_to(monkeypatch):
    clock = iter([10.0, 12.0, 17.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    laps = LapTimer(CPU)
    laps.record_lap("a", excluded=0.5)
    laps.record_lap("b")
    assert laps.get_seconds() == {"a": [1.5], "b": [5.0]}
