"""``relicctl bench``: its fields and how they hang together. How long anything takes is no matter here."""

from __future__ import annotations

import json

import pytest

from relicctl import cli
from relicctl.commands.bench import IMAGENET_TRAIN_IMAGES, bench
from relicctl.config.resolve import resolve_config
from relicctl.errors import UsageError

TINY = [
    "model.arch=resnet18", "model.width=0.125", "model.projector.hidden=16", "model.predictor.hidden=16",
    "views.large.count=2", "views.large.size=32", "views.small.count=1", "views.small.size=16",
    "optim.batch_size=16", "optim.epochs=20", "runtime.workers=0", "runtime.precision=fp32",
]  # fmt: skip
SETS = [word for key in TINY for word in ("--set", key)]
PROMISED = {
    "host_images_per_s_per_core", "step_images_per_s", "images_per_s", "outside_networks", "data_wait",
    "peak_memory_bytes", "hours", "flops_per_image", "peak_flops", "mfu",
    "largest_batch",
    "largest_batch_measured",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _small_matrices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relicctl.benchmark.hardware_limits.MATMUL_SIZE", {"cpu": 64})
        yield


@pytest.fixture(scope="module")
def generated():
    return bench(resolve_config(sets=TINY), batch=4, repeats=2, quiet=True)


def test_stdout_is_one_json_object(capsys):
    assert cli.run(["bench", *SETS, "--data", "shapes:train=40,val=10", "--repeats", "1", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["data"] == "shapes:train=40,val=10"
    assert result["batch"] == 16
    assert result["hours"] == pytest.approx(20 * 40 / result["images_per_s"] / 3600, abs=0.01)
    assert "hours: 40 images, 20 epochs" in result["assumptions"][0]
    assert err == ""


def test_every_promised_metric_is_a_number(generated):
    assert all(isinstance(generated[name], (int, float)) for name in PROMISED)
    assert set(generated["host_stages"]) == {"read", "decode", "crop", "collate"}


def test_each_median_has_its_spread(generated):
    for name in ("host_images_per_s_per_core", "step_images_per_s", "images_per_s", "data_wait"):
        spread = generated["spread"][name]
        assert spread["median"] == generated[name]
        assert spread["min"] <= spread["median"] <= spread["max"]
        assert spread["runs"] == (5 if name.startswith("host") else 2)


def test_the_parts_outside_the_networks_add_up(generated):
    parts = generated["outside_parts"]
    assert set(parts) == {"augmentation", "loss", "check", "optimiser", "ema", "logging"}
    assert sum(parts.values()) == pytest.approx(generated["outside_networks"], abs=1e-4)
    assert 0 < generated["outside_networks"] < 1


def test_without_data_hours_are_for_imagenet(generated):
    assert generated["data"] == "generated"
    assert generated["hours"] == pytest.approx(20 * IMAGENET_TRAIN_IMAGES / generated["images_per_s"] / 3600, rel=0.01)
    said = " ".join(generated["assumptions"])
    for word in ("1,281,167 images (ImageNet)", "batch 4, not 16", "generated JPEGs", "estimate"):
        assert word in said


def test_a_small_batch_takes_fewer_negatives():
    result = bench(resolve_config(sets=[*TINY, "loss.negatives=10"]), batch=2, repeats=1, quiet=True)
    assert result["batch"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "1"], "--batch is 1."),
        (["--repeats", "0"], "--repeats is 0."),
        (["--preset", "nothing-like-it"], "nothing-like-it"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, said, capsys):
    assert cli.run(["bench", *SETS, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


def test_generated_images_cannot_train_supervised():
    with pytest.raises(UsageError, match="no labels"):
        bench(resolve_config(sets=["objective=supervised"]), batch=None, repeats=1, quiet=True)


def test_help_has_examples_that_are_commands(capsys):
    assert cli.run(["bench", "--help"]) == 0
    assert "relicctl bench --preset r50-1000ep" in capsys.readouterr().out
