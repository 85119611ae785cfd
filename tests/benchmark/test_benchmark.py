"""The pieces of a bench: generated photos, counted operations, figures from timings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relicctl.benchmark.limits import flop_per_image, largest_batch, largest_that_fits
from relicctl.benchmark.photos import DISTINCT, GeneratedPhotos
from relicctl.benchmark.step import step_figures
from relicctl.benchmark.timing import Laps, spread
from relicctl.config.resolve import resolve
from relicctl.memory import step_memory
from relicctl.pretraining import build_networks

CPU = torch.device("cpu")


def test_generated_photos_are_imagenets_in_size_and_bytes():
    photos = GeneratedPhotos(4)
    assert photos.load(0).shape == (375, 500, 3)
    kilobytes = [photos.size(i) / 1000 for i in range(4)]
    assert 90 < np.mean(kilobytes) < 130
    assert photos.load(0).std() > 20
    assert not np.array_equal(photos.load(0), photos.load(1))


def test_generated_photos_are_the_same_anywhere_and_come_again():
    photos = GeneratedPhotos(2 * DISTINCT + 1, 32, 24)
    assert photos.read(5) == GeneratedPhotos(8, 32, 24).read(5)
    assert photos.read(5) == photos.read(5 + DISTINCT)
    assert len({photos.read(i) for i in range(len(photos))}) == DISTINCT


def test_operations_of_the_main_set_up_are_the_known_ones():
    """ResNet-50 at 224 px: 4.09 G multiply-adds, so 8.2 GFLOP; three times that to train, once for the target."""
    counted = flop_per_image(resolve("r50-1000ep").config, 1000) / 1e9
    large, small = 8.18, 8.18 * (96 / 224) ** 2
    assert counted == pytest.approx(4 * (3 + 1) * large + 2 * 3 * small, rel=0.03)


def test_computing_twice_to_save_memory_counts_once():
    plain = resolve(sets=["optim.batch_size=8", "loss.negatives=5", "model.width=0.25"]).config
    saving = resolve(
        sets=["optim.batch_size=8", "loss.negatives=5", "model.width=0.25", "optim.microbatch=4",
              "runtime.activation_checkpointing=true"]
    ).config  # fmt: skip
    assert flop_per_image(saving, 10) == flop_per_image(plain, 10)


def test_the_largest_batch_just_fits(monkeypatch):
    monkeypatch.setattr("relicctl.benchmark.limits.free_memory", lambda device: 4 * 2**30)
    config = resolve(sets=["model.arch=resnet18", "optim.batch_size=16"]).config
    largest = largest_batch(config, 10, "fp32", CPU)
    with torch.device("meta"):
        networks = build_networks(config)

    def need(batch: int) -> int:
        sized = config.model_copy(update={"optim": config.optim.model_copy(update={"batch_size": batch})})
        return sum(step_memory(sized, networks, "fp32").values())

    assert need(largest) <= 4 * 2**30 < need(largest + 1)


def test_nothing_fits_where_the_weights_do_not(monkeypatch):
    monkeypatch.setattr("relicctl.benchmark.limits.free_memory", lambda device: 2**20)
    assert largest_batch(resolve().config, 10, "fp32", CPU) == 0


@pytest.mark.parametrize("guess", [0, 8, 100, 1000, 5000])
@pytest.mark.parametrize("limit", [0, 7, 8, 1003, 4096])
def test_the_largest_that_fits_is_found_from_any_guess(guess, limit):
    asked = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    assert largest_that_fits(fits, guess) == limit // 8 * 8
    assert len(asked) <= 24


def test_figures_of_a_step():
    parts = {"augmentation": [1.0, 1.0, 9.0], "networks forward": [2.0, 2.0, 2.0], "networks backward": [5.0, 5.0, 5.0]}
    figures = step_figures(parts, batch=16)
    assert figures["outside_networks"] == 0.125
    assert figures["step_images_per_s"] == {"median": 2.0, "min": 1.0, "max": 2.0, "runs": 3}


def test_a_spread_is_median_and_extremes():
    assert spread([3.0, 1.0, 2.00004]) == {"median": 2.0, "min": 1.0, "max": 3.0, "runs": 3}


def test_laps_leave_out_what_they_are_told_to(monkeypatch):
    clock = iter([10.0, 12.0, 17.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    laps = Laps(CPU)
    laps.lap("a", without=0.5)
    laps.lap("b")
    assert laps.seconds() == {"a": [1.5], "b": [5.0]}
