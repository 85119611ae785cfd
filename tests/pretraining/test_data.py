"""Background masks in pretraining: from a bank or from alpha, checked against the images, the same on every road."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relicctl.cli import run as relicctl
from relicctl.config import yaml_io
from relicctl.config.pretrain import PretrainConfig
from relicctl.config.resolve import resolve_config
from relicctl.core import checkpoint
from relicctl.data.datasets.joined import open_joined_dataset
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.mask_bank import MaskBank, MaskBankWriter
from relicctl.errors import UsageError
from relicctl.pretraining.data import resolve_bank_path
from tests.helpers.configs import tiny_pretrain_yaml
from tests.helpers.ports import free_ports

DATA = "shapes:size=32,train=64,val=40"
TINY = tiny_pretrain_yaml(
    bgmask={"probability": 0.5}, optim={"epochs": 1}, data={"train": DATA, "val": None}, eval={"every_epochs": 0}
)
STEPS = 8
MESSAGE = "no background masks"


def true_masks(path: Path, source: ShapesDataset, wanted: range) -> Path:
    """A bank of the objects' true masks, but for samples outside ``wanted``, which have empty ones."""
    with MaskBankWriter(path, source, made_by="the true masks") as writer:
        for index in range(len(source)):
            squashed = Image.fromarray(source.load_mask(index)).resize((128, 128), Image.Resampling.NEAREST)
            writer.write_mask(index, np.asarray(squashed) & (index in wanted))
    return path


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """They take half of so short a run, and are tested elsewhere."""
    monkeypatch.setattr("relicctl.pretraining.run.plot_curves", lambda *_: None)


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    true_masks(folder / "masks.bank", ShapesDataset.from_spec(DATA, "train"), range(64))
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def pretrain(tiny: Path, out: Path, *arguments: str) -> int:
    return relicctl(["pretrain", "--config", str(tiny), "--out", str(out), *arguments])


def sets(*assignments: str) -> list[str]:
    return [argument for assignment in assignments for argument in ("--set", assignment)]


def tensors(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return checkpoint.load_checkpoint(run / "checkpoints" / checkpoint.format_checkpoint_name(step))[0]


def same(one: Path, other: Path) -> bool:
    mine, others = tensors(one), tensors(other)
    assert mine.keys() == others.keys()
    return all(torch.equal(mine[name], others[name]) for name in mine)


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())["bgmask"]


# Laws.


@pytest.mark.parametrize("cache", ["none", "device"])
def test_masks_change_a_run_and_probability_0_does_not(tiny, tmp_path, masks, cache):
    given = ["--bgmask", str(masks), *sets(f"data.cache={cache}")]
    assert pretrain(tiny, tmp_path / "without", *sets(f"data.cache={cache}")) == 0
    assert pretrain(tiny, tmp_path / "with", *given) == 0
    assert pretrain(tiny, tmp_path / "never", *given, *sets("bgmask.probability=0")) == 0
    assert same(tmp_path / "without", tmp_path / "never")
    assert not same(tmp_path / "without", tmp_path / "with")


def test_any_number_of_workers_gives_the_same_run(tiny, tmp_path, masks):
    for workers in ("0", "2"):
        arguments = ["--bgmask", str(masks), "--workers", workers, *sets("data.cache=none")]
        assert pretrain(tiny, tmp_path / workers, *arguments) == 0
    assert pretrain(tiny, tmp_path / "memory", "--bgmask", str(masks / "masks.bank"), *sets("data.cache=memory")) == 0
    assert same(tmp_path / "0", tmp_path / "2")
    assert same(tmp_path / "0", tmp_path / "memory")


@pytest.mark.parametrize("cache", ["none", "device"])
def test_cut_and_resumed_is_never_cut(tiny, tmp_path, masks, cache):
    given = ["--bgmask", str(masks), *sets(f"data.cache={cache}")]
    assert pretrain(tiny, tmp_path / "whole", *given) == 0
    assert pretrain(tiny, tmp_path / "cut", *given, *sets("optim.max_steps=4")) == 0
    moved = tmp_path / "moved.bank"
    shutil.copy(masks / "masks.bank", moved)
    again = ["pretrain", "--resume", str(tmp_path / "cut"), "--bgmask", str(moved), *sets("optim.max_steps=8")]
    assert relicctl(again) == 0
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_a_run_goes_on_with_its_own_bank_only(tiny, tmp_path, masks, capsys):
    run = tmp_path / "run"
    assert pretrain(tiny, run, "--bgmask", str(masks), *sets("optim.max_steps=4")) == 0
    other = true_masks(tmp_path / "other.bank", ShapesDataset.from_spec(DATA, "train"), range(60))
    go_on = ["pretrain", "--resume", str(run), *sets("optim.max_steps=8")]
    assert relicctl([*go_on, "--bgmask", str(other)]) == 3
    assert f"{other} is not the one that {run} was started with" in capsys.readouterr().err
    assert relicctl([*go_on, *sets("bgmask.probability=0.9")]) == 2
    assert relicctl(go_on) == 0

    plain = tmp_path / "plain"
    assert pretrain(tiny, plain, *sets("optim.max_steps=4")) == 0
    assert relicctl(["pretrain", "--resume", str(plain), "--bgmask", str(masks), *sets("optim.max_steps=8")]) == 2


@pytest.mark.slow
def test_processes_train_with_the_same_masks_as_one(tiny, tmp_path, masks):
    """Over one step, after which sums in another order have not grown yet."""
    arguments = [
        "pretrain", "--config", str(tiny), "--bgmask", str(masks), *sets("optim.max_steps=1", "optim.warmup_epochs=0"),
    ]  # fmt: skip
    assert relicctl([*arguments, "--out", str(tmp_path / "one")]) == 0
    (port,) = free_ports(1)
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "relicctl", *arguments, "--out", str(tmp_path / "two")],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
        )
        for rank in (0, 1)
    ]  # fmt: skip
    assert [child.wait() for child in children] == [0, 0]
    assert relicctl([*arguments, "--out", str(tmp_path / "without"), *sets("bgmask.probability=0")]) == 0
    one, two, without = (tensors(tmp_path / name, 1) for name in ("one", "two", "without"))
    weights = [name for name in one if name.startswith("state.online.") and one[name].ndim > 1]
    apart = {name: (one[name] - two[name]).norm() / (one[name] - without[name]).norm() for name in weights}
    assert len(weights) > 20
    assert max(apart.values()) < 0.01
    assert results(tmp_path / "one") == results(tmp_path / "two")


# From the demo's true masks to results.json.


def test_the_demo_preset_with_true_masks_end_to_end(tmp_path, capsys, monkeypatch):
    data, run = "shapes:train=64,val=40", tmp_path / "run"
    bank = true_masks(tmp_path / "masks.bank", ShapesDataset.from_spec(data, "train"), range(48))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"made it\n{bank}\n"))
    arguments = ["--preset", "demo", "--data", data, "--val", data, "--out", str(run), "--bgmask", "-"]
    assert relicctl(["pretrain", *arguments, *sets("optim.epochs=1", "eval.every_epochs=1")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{run}\n"
    assert "background masks: 75.0% of" in err
    assert MESSAGE not in err
    identity = MaskBank.open(bank).identity
    assert results(run) == {
        "source": "bank", "bank": str(bank), "probability": 0.1, "sha256": identity, "made_by": "the true masks",
        "usable": 0.75, "masked_views": 0.075,
    }  # fmt: skip
    written = yaml_io.load_mapping(run / "config.yaml")
    assert written["bgmask"]["bank"] == str(bank)
    assert written["run"]["bgmask_sha256"] == identity


def test_alpha_channels_are_masks_where_they_are_asked_for(tiny, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(16):
        pixels = rng.integers(0, 256, (32, 32, 4), dtype=np.uint8)
        pixels[..., 3] = np.where(np.arange(32) < 16, 255, 0)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels[..., : 3 if number % 4 == 0 else 4]).save(tmp_path / "photos" / f"{number:02d}.png")
    data = ["--data", str(tmp_path / "photos"), *sets("optim.epochs=4")]
    assert pretrain(tiny, tmp_path / "without", *data) == 0
    capsys.readouterr()
    for cache in ("none", "memory"):
        alpha = sets("bgmask.source=alpha", f"data.cache={cache}")
        assert pretrain(tiny, tmp_path / cache, *data, *alpha) == 0
        assert "background masks: 75.0% of the alpha channels of the first 16 images" in capsys.readouterr().err
    assert same(tmp_path / "none", tmp_path / "memory")
    assert not same(tmp_path / "none", tmp_path / "without")
    assert (results(tmp_path / "none")["source"], results(tmp_path / "none")["usable"]) == ("alpha", 0.75)


def test_alpha_that_no_image_has_is_warned_of(tiny, tmp_path, capsys):
    assert pretrain(tiny, tmp_path / "run", "--quiet", *sets("bgmask.source=alpha", "optim.max_steps=1")) == 0
    assert "warning: none of the alpha channels of the first 64 images" in capsys.readouterr().err


# Asked for and not given.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--config", "masked.yaml"], True), (["--preset", "demo"], False), ([], False)],
)
def test_masks_that_a_file_asks_for_and_nobody_gives_are_missed(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("masked.yaml").write_text("bgmask: {probability: 0.5}\n")
    small = sets(
        "optim.max_steps=1", "optim.batch_size=16", "eval.every_epochs=0", "model.arch=resnet18", "model.width=0.125",
        "views.large.size=32", "views.small.size=16", "model.stem=stride2", "optim.warmup_epochs=0",
    )  # fmt: skip
    run = tmp_path / "run"
    assert relicctl(["pretrain", "--out", str(run), "--data", "shapes:train=64,val=4", *arguments, *small]) == 0
    assert (MESSAGE in capsys.readouterr().err) == said
    assert (results(run)["source"], results(run)["masked_views"]) == ("none", 0.0)


def test_the_presets_that_ask_for_masks():
    for name in ("demo", "r50-100ep", "r50-300ep", "r50-1000ep"):
        resolved = resolve_config(name)
        assert resolved.config.bgmask.probability == 0.1
        assert resolved.origin["bgmask.probability"] == f"preset {name}"


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (sets("bgmask.source=bank"), "no bank is given"),
        (sets("bgmask.bank=x"), "bgmask.source is none"),
        (sets("bgmask.fill=gray"), "has no effect while"),
        (sets("bgmask.foreground_range=[0.1,0.9]"), "has no effect while"),
        ([*sets("bgmask.foreground_range=[0.9,0.1]"), "--bgmask", "x"], "no range"),
        ([*sets("bgmask.fill=black"), "--bgmask", "x"], "bgmask.fill cannot be"),
    ],
)
def test_contradictions_are_told_before_anything_starts(tiny, tmp_path, capsys, arguments, said):
    assert pretrain(tiny, tmp_path / "run", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_bank_of_other_images_is_refused_before_a_run_is_made(tiny, tmp_path, masks, capsys, dry):
    for data, said in (
        ("shapes:size=32,train=70", "no mask for 6 of the 70 images, such as train/"),
        ("shapes:size=32,train=64,seed=1", "no mask for 64 of the 64 images"),
    ):
        assert pretrain(tiny, tmp_path / "run", "--data", data, "--bgmask", str(masks), *dry) == 3
        error = capsys.readouterr().err
        assert said in error
        assert f"--masks-for {data}" in error
    assert pretrain(tiny, tmp_path / "run", "--bgmask", str(tmp_path / "nothing"), *dry) == 3
    assert "There is no mask bank" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_joined_data_take_a_bank_that_was_made_for_all_of_them(tiny, tmp_path, masks, capsys):
    specs = ("shapes:size=32,train=16,val=8", "shapes:size=32,train=16,val=8,seed=1")
    several = [argument for spec in specs for argument in ("--data", spec)]
    assert pretrain(tiny, tmp_path / "run", *several, "--bgmask", str(masks)) == 3
    assert capsys.readouterr().err.rstrip().endswith(f"--masks-for {specs[0]} --masks-for {specs[1]}")
    joined = open_joined_dataset(specs)
    with MaskBankWriter(tmp_path / "masks.bank", joined, made_by="the true masks") as writer:
        for index in range(len(joined)):
            writer.write_mask(index, np.eye(128, dtype=bool) | (index % 2 == 0))
    assert pretrain(tiny, tmp_path / "run", *several, "--bgmask", str(tmp_path / "masks.bank")) == 0
    assert results(tmp_path / "run")["usable"] == 0
    foreground = ["--set", "bgmask.foreground_range=[0.001,1]", "--set", "data.subset=20"]
    assert pretrain(tiny, tmp_path / "all", *several, "--bgmask", str(tmp_path / "masks.bank"), *foreground) == 0
    assert results(tmp_path / "all")["usable"] == 1


def test_a_dry_run_tells_of_the_masks(tiny, tmp_path, masks, capsys):
    assert pretrain(tiny, tmp_path / "run", "--bgmask", str(masks), "--dry-run", *sets("data.subset=32")) == 0
    text = capsys.readouterr().out
    assert "# from --bgmask" in text
    assert "# masks       bank; 100.0% of the images have a usable one, 50.0% of large views" in text


def test_a_path_on_stdin_is_for_one_process(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("runs/masks\n"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = resolve_config(options={"bgmask": "-"}, schema=PretrainConfig)
    with pytest.raises(UsageError, match="Several processes"):
        resolve_bank_path(given)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert resolve_bank_path(given).config.bgmask.bank == "runs/masks"
    with pytest.raises(UsageError, match="got none"):
        resolve_bank_path(given)
    assert resolve_bank_path(resolve_config(options={"bgmask": "b"}, schema=PretrainConfig)).config.bgmask.bank == "b"


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (["--preset", "demo", "--set", "optim.epoch=3"], 2),
        (["--preset", "demo", "--data", "no/such/folder"], 3),
        (["--preset", "demo", "--out", "."], 2),
        (["--preset", "demo", "--data", "shapes:train=64", "--set", "optim.batch_size=65"], 2),
    ],
)
def test_what_is_wrong_is_told_before_the_masks_come(monkeypatch, wrong, code):
    """They may take hours, in the command before this one in a pipe."""
    monkeypatch.setattr("relicctl.pretraining.data.read_path_from_stdin", lambda _: pytest.fail("waited for the masks"))
    assert relicctl(["pretrain", *wrong, "--bgmask", "-"]) == code
