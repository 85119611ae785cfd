"""`--dry-run`: the figures, and that its output is a config again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relicctl import cli
from relicctl.config.resolve import resolve_config
from relicctl.core.hardware import count_elements
from relicctl.errors import UsageError
from relicctl.models.resnet import build_encoder
from relicctl.pretraining.estimate import estimate_pretrain, format_pretrain_dry_run
from relicctl.pretraining.task import Schedule, build_networks
from relicctl.runs.resume import TrainingOptions

DATA = "shapes:train=1000,val=100"


def test_the_text_is_a_config_with_origins_and_figures(tmp_path: Path) -> None:
    resolved = resolve_config("demo", sets=["seed=7"], options={"data": DATA})
    text = format_pretrain_dry_run(resolved, TrainingOptions())
    file = tmp_path / "planned.yaml"
    file.write_text(text)
    assert resolve_config(config_file=file).config == resolved.config
    assert "# from preset demo" in text
    assert "# from --set" in text
    assert "# from --data" in text
    for name in ("parameters", "images", "crops", "steps", "start", "middle", "end", "memory", "disk"):
        assert f"\n# {name} " in text


def test_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["pretrain", "--preset", "demo", "--data", DATA, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["config"]["data"]["train"] == DATA
    assert planned["origin"]["data.train"] == "--data"
    assert planned["images"] == 1000


def test_steps_and_schedules() -> None:
    sets = ["optim.batch_size=64", "optim.epochs=20", "optim.base_lr=0.4", "target.ema=0.9"]
    config = resolve_config("demo", sets=[*sets, "optim.warmup_epochs=1"], options={"data": DATA}).config
    planned = estimate_pretrain(config)
    assert (planned["steps_per_epoch"], planned["total_steps"]) == (15, 300)
    schedule = planned["schedule"]
    assert schedule["start"] == {"lr": 0.0, "ema": pytest.approx(0.9)}
    assert schedule["warmed up"]["lr"] == pytest.approx(0.1)
    assert schedule["middle"]["ema"] == pytest.approx(0.95)
    assert schedule["end"] == {"lr": pytest.approx(0.0), "ema": pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("images", "batch", "epochs", "ema"),
    [(1000, 50, 50, 0.5), (1000, 25, 50, 2 / 3), (1000, 50, 450, 0.9)],
)
def test_an_automatic_decay_follows_the_steps_of_the_run(images: int, batch: int, epochs: int, ema: float) -> None:
    sets = [f"optim.batch_size={batch}", f"optim.epochs={epochs}", "target.ema=auto", "optim.max_steps=30"]
    options = {"data": f"shapes:train={images},val=100"}
    resolved = resolve_config("demo", sets=sets, options=options)
    assert estimate_pretrain(resolved.config)["schedule"]["start"]["ema"] == pytest.approx(ema)
    assert f"ema {ema:.6g}" in format_pretrain_dry_run(resolved, TrainingOptions())


@pytest.mark.parametrize(("epochs", "published"), [(1000, 0.996), (300, 0.99)])
def test_the_automatic_decay_is_close_to_byols_published_values(epochs: int, published: float) -> None:
    """ImageNet in batches of 4096; the window over which the target averages agrees within a third."""
    config = resolve_config("r50-1000ep", sets=["target.ema=auto", f"optim.epochs={epochs}"]).config
    decay = Schedule(config, 1_281_167 // 4096).initial_ema
    assert (1 - published) / (1 - decay) == pytest.approx(1, abs=1 / 3)


def test_a_run_cut_short_keeps_its_schedule() -> None:
    whole = estimate_pretrain(resolve_config("demo", options={"data": DATA}).config)
    short = estimate_pretrain(resolve_config("demo", sets=["optim.max_steps=7"], options={"data": DATA}).config)
    assert short["total_steps"] == 7
    assert short["schedule"] == whole["schedule"]


def test_held_out_and_left_out_images_are_not_counted() -> None:
    sets = ["data.val=null", "eval.val_fraction=0.2"]
    assert estimate_pretrain(resolve_config("demo", sets=sets, options={"data": DATA}).config)["images"] == 800
    sets.append("data.subset=300")
    assert estimate_pretrain(resolve_config("demo", sets=sets, options={"data": DATA}).config)["images"] == 300


def test_parameters_are_those_of_the_networks() -> None:
    config = resolve_config("demo", options={"data": DATA}).config
    networks = build_networks(config)
    assert estimate_pretrain(config)["parameters"] == {
        "encoder": count_elements(build_encoder("resnet18", 0.25, "stride2").parameters()),
        "online": count_elements(networks.online.parameters()),
        "target": count_elements(networks.target.parameters() if networks.target is not None else ()),
    }


def test_the_largest_preset_is_planned_without_data_or_memory() -> None:
    config = resolve_config("r200x2-1000ep", sets=["optim.batch_size=16"]).config
    planned = estimate_pretrain(config)
    assert planned["parameters"]["encoder"] == 250_128_512
    assert planned["images"] is planned["steps_per_epoch"] is planned["total_steps"] is None
    assert planned["images_unknown"]
    assert planned["crops_per_image"] == 6


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["views.large.size=200000"], "views of one batch"),
        (["optim.batch_size=2000"], "larger than the data"),
        (["data.subset=2000"], "data.subset"),
    ],
)
def test_what_cannot_start_is_refused(sets: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        estimate_pretrain(resolve_config("demo", sets=sets, options={"data": DATA}).config)
