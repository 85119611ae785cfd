"""Laws of a run: resumed = never killed, any workers = the same run, evaluation touches nothing; and bad input."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from relicctl.cli import run as relicctl
from relicctl.core import checkpoint
from relicctl.data.datasets.open import open_dataset
from tests.helpers.configs import tiny_pretrain_yaml
from tests.helpers.ports import free_ports

TINY = tiny_pretrain_yaml()
STEPS = 16
TIMINGS = {"images_per_s", "data_wait", "eta_s"}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """They take half of so short a run, and one test looks at them."""
    if request.function is not test_a_run_leaves_what_the_docs_promise:
        monkeypatch.setattr("relicctl.pretraining.run.plot_curves", lambda *_: None)


def pretrain(tiny: Path, out: Path, *arguments: str) -> int:
    return relicctl(["pretrain", "--config", str(tiny), "--out", str(out), "--quiet", *arguments])


def final(run: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Everything a run ends with: all tensors of its last checkpoint, and its metrics but for the timings."""
    tensors, header = checkpoint.load_checkpoint(run / "checkpoints" / checkpoint.format_checkpoint_name(STEPS))
    assert header["step"] == STEPS
    lines = (run / "metrics.jsonl").read_text().splitlines()
    metrics = [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]
    return tensors, metrics


def assert_same_run(one: Path, other: Path) -> None:
    (tensors, metrics), (others, other_metrics) = final(one), final(other)
    assert tensors.keys() == others.keys()
    different = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert not different
    assert metrics == other_metrics


def encoder_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "encoder.safetensors")


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# What a run leaves.


def test_a_run_leaves_what_the_docs_promise(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert pretrain(tiny, run) == 0
    out = capsys.readouterr().out
    assert out == f"{run}\n"  # nothing else on stdout
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == STEPS
    for key in ("knn20", "knn200", "probe_top1", "untrained_knn20"):
        assert 0 <= results[key] <= 1
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in steps if "loss" in record]
    assert [record["step"] for record in trained] == list(range(2, STEPS + 1, 2))
    assert trained[-1].keys() >= {
        "step", "epoch", "loss", "nll", "kl", "entropy", "lr", "ema", "images_per_s", "data_wait", "rankme",
    }  # fmt: skip
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "data_fingerprint" in (run / "config.yaml").read_text()

    import relicctl as package

    encoder = package.load_encoder(run)
    with torch.no_grad():
        features = encoder(encoder.transform(np.zeros((20, 30, 3), np.uint8))[None])
    assert features.shape == (1, 512 // 8)


def test_json_prints_one_object_with_the_figures(tiny, tmp_path, capsys):
    assert pretrain(tiny, tmp_path / "run", "--json", "--set", "optim.max_steps=2") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["run"] == str(tmp_path / "run")
    assert printed["steps"] == 2


def test_max_steps_cuts_short_without_changing_the_schedule(tiny, tmp_path):
    assert pretrain(tiny, tmp_path / "short", "--set", "optim.max_steps=5") == 0
    assert pretrain(tiny, tmp_path / "whole") == 0
    short, whole = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("short", "whole")
    )
    of = [{r["step"]: (r["lr"], r["ema"], r["loss"]) for r in records if "lr" in r} for records in (short, whole)]
    assert of[0][4] == of[1][4]


# Laws.


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert pretrain(tiny, tmp_path / name, "--seed", seed) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    for written in ("encoder.safetensors", f"checkpoints/{checkpoint.format_checkpoint_name(STEPS)}"):
        assert (tmp_path / "a" / written).read_bytes() == (tmp_path / "b" / written).read_bytes()
    assert not torch.equal(encoder_of(tmp_path / "a")["conv1.weight"], encoder_of(tmp_path / "c")["conv1.weight"])


def test_any_number_of_workers_gives_the_same_run(tiny, tmp_path):
    for workers in ("0", "1", "3"):
        assert pretrain(tiny, tmp_path / workers, "--workers", workers, "--set", "data.cache=none") == 0
    assert pretrain(tiny, tmp_path / "memory", "--set", "data.cache=memory") == 0
    for other in ("1", "3", "memory"):
        assert_same_run(tmp_path / "0", tmp_path / other)


def test_evaluation_leaves_the_networks_alone(tiny, tmp_path):
    assert pretrain(tiny, tmp_path / "on") == 0
    assert pretrain(tiny, tmp_path / "no-probe", "--set", "eval.probe=false") == 0
    assert pretrain(tiny, tmp_path / "off", "--set", "eval.every_epochs=0") == 0
    for other in ("no-probe", "off"):
        assert_same_tensors(final(tmp_path / "on")[0], final(tmp_path / other)[0])


@pytest.mark.parametrize("cut", [1, 7, 8, 15])
def test_a_run_cut_at_any_step_and_resumed_is_the_run_never_cut(tiny, tmp_path, cut):
    """Cut by max_steps: before the first checkpoint falls due, between two, and at an evaluation."""
    assert pretrain(tiny, tmp_path / "whole") == 0
    run = tmp_path / "cut"
    assert pretrain(tiny, run, "--set", f"optim.max_steps={cut}", "--set", "runtime.log_every=2") == 0
    # a last step always logs and evaluates; a cut run is compared by what it trains
    assert relicctl(["pretrain", "--resume", str(run), "--set", "optim.max_steps=16", "--quiet"]) == 0
    whole, resumed = final(tmp_path / "whole")[0], final(run)[0]
    assert_same_tensors(whole, resumed)


def start(arguments: list[str], **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "relicctl", "pretrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    """Until the run has logged a step as late as ``step``, or has ended."""
    while process.poll() is None:
        if (run / "metrics.jsonl").exists():
            steps = [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines() if x.endswith("}")]
            if steps and steps[-1] >= step:
                return
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_and_resumed_is_never_killed(tiny, tmp_path):
    """SIGKILL at random moments, among them during a checkpoint's write; bit for bit, metrics too."""
    slow = ["--config", str(tiny), "--quiet"]
    assert pretrain(tiny, tmp_path / "whole") == 0
    run, moments = tmp_path / "killed", random.Random(0)
    arguments = [*slow, "--out", str(run)]
    for step in (0, 4, 9):
        process = start(arguments)
        wait_for_step(run, step, process)
        time.sleep(moments.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        arguments = [*slow, "--resume", str(run)]
    process = start(arguments)
    assert process.wait() == 0, process.stderr.read()
    assert process.stdout.read() == f"{run}\n"
    assert_same_run(tmp_path / "whole", run)
    assert (run / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    assert_same_tensors(encoder_of(run), encoder_of(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(tiny, tmp_path, number, code):
    undecoded = ["--set", "data.cache=none", "--workers", "1"]
    assert pretrain(tiny, tmp_path / "whole", *undecoded) == 0
    run = tmp_path / "run"
    process = start(["--config", str(tiny), "--out", str(run), *undecoded])
    wait_for_step(run, 4, process)
    process.send_signal(number)
    assert process.wait() == code
    error = process.stderr.read()
    assert f"relicctl pretrain --resume {run}" in error
    assert "Traceback" not in error
    assert process.stdout.read() == ""
    saved = checkpoint.list_checkpoints(run / "checkpoints")
    assert relicctl(["pretrain", "--resume", str(run), "--quiet"]) == 0
    assert saved
    assert_same_run(tmp_path / "whole", run)


@pytest.mark.parametrize(
    "sets",
    [
        ["objective=relic", "views.small.count=0", "loss.negatives=all"],
        ["objective=simclr"],
        ["objective=byol"],
        ["objective=supervised"],
        ["loss.invariance=swapped"],
        ["loss.negatives=all"],
        ["views.large.count=4", "views.small.count=2"],
        ["views.large.count=2", "views.small.count=6"],
        ["views.small.count=0", "optim.name=adamw", "optim.base_lr=0.01"],
        ["model.stem=cifar", "optim.name=sgd", "optim.base_lr=0.1", "runtime.activation_checkpointing=true"],
    ],
    ids=" ".join,
)
def test_every_objective_and_setup_trains_through_the_same_loop(tiny, tmp_path, sets):
    assignments = [argument for assignment in [*sets, "optim.max_steps=4"] for argument in ("--set", assignment)]
    assert pretrain(tiny, tmp_path / "run", *assignments) == 0
    losses = [json.loads(x).get("loss") for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(loss) for loss in losses if loss is not None)


def test_weights_to_start_from_are_in_the_network_at_step_zero(tiny, tmp_path):
    assert pretrain(tiny, tmp_path / "first") == 0
    still = ["--set", "optim.base_lr=1e-30", "--set", "optim.weight_decay=0", "--set", "optim.max_steps=1"]
    assert pretrain(tiny, tmp_path / "second", "--init-from", str(tmp_path / "first"), *still, "--seed", "9") == 0
    first, second = encoder_of(tmp_path / "first"), encoder_of(tmp_path / "second")
    assert torch.equal(first["layer4.1.conv2.weight"], second["layer4.1.conv2.weight"])
    untrained = json.loads((tmp_path / "second" / "results.json").read_text())["untrained_knn20"]
    assert untrained == json.loads((tmp_path / "first" / "results.json").read_text())["knn20"]


def test_divergence_is_told_with_the_last_good_checkpoint(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    blow_up = ["--set", "optim.name=sgd", "--set", "optim.base_lr=1e12", "--set", "optim.warmup_epochs=1"]
    # every step is checked before it is saved: checkpoints hold finite numbers only
    assert pretrain(tiny, run, *blow_up, "--set", "checkpoint.every_steps=1") == 4
    error = capsys.readouterr().err
    assert "not finite at step" in error
    kept = checkpoint.list_checkpoints(run / "checkpoints")
    assert str(kept[-1]) in error
    tensors, _ = checkpoint.load_checkpoint(kept[-1])
    assert all(t.isfinite().all() for t in tensors.values())


def test_the_advice_after_a_divergence_can_be_followed(tiny, tmp_path, capsys):
    """The rate climbs until the run breaks; from the last good checkpoint it goes on with a lower one."""
    run = tmp_path / "run"
    climb = ["--set", "optim.name=sgd", "--set", "optim.base_lr=1e36", "--set", "optim.warmup_epochs=2"]
    assert pretrain(tiny, run, *climb, "--set", "checkpoint.every_steps=1", "--set", "checkpoint.keep=9") == 4
    error = capsys.readouterr().err
    kept = checkpoint.list_checkpoints(run / "checkpoints")
    assert str(kept[-1]) in error
    for spoilt in kept[1:]:  # finite, but as large as the rate made them
        spoilt.unlink()
    assert relicctl(["pretrain", "--resume", str(run), "--set", "optim.base_lr=0.1", "--quiet"]) == 0


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path):
    """The very last step can spoil the weights by a gradient that is finite itself."""
    run = tmp_path / "run"
    last = ["optim.name=sgd", "optim.base_lr=1e39", "optim.warmup_epochs=0", "optim.max_steps=1"]
    assert pretrain(tiny, run, *[argument for assignment in last for argument in ("--set", assignment)]) == 4
    assert not (run / "encoder.safetensors").exists()
    assert checkpoint.list_checkpoints(run / "checkpoints") == []


# Bad images.


@pytest.fixture
def photos(tmp_path):
    """Forty small photos in two classes."""
    generator = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "photos" / ("left", "right")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (20, 24, 3), np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize("cache", ["none", "memory", "device"])
def test_a_corrupt_image_is_replaced_listed_and_the_run_goes_on(tiny, tmp_path, photos, cache):
    (photos / "left" / "04.png").write_bytes(b"not a picture")
    arguments = ["--data", str(photos), "--set", "eval.every_epochs=0", "--set", f"data.cache={cache}"]
    run = tmp_path / "run"
    assert pretrain(tiny, run, *arguments, "--set", "data.max_corrupt_fraction=0.05") == 0
    listed = (run / "bad_images.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["left/04.png"]
    assert json.loads((run / "results.json").read_text())["bad_images"] == 1
    assert pretrain(tiny, tmp_path / "strict", *arguments, "--set", "data.max_corrupt_fraction=0") == 3


@pytest.mark.parametrize("workers", ["0", "1"])
def test_data_without_one_good_image_end_with_exit_3_and_a_list(tiny, tmp_path, photos, capsys, workers):
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    run = tmp_path / "run"
    arguments = ["--data", str(photos), "--workers", workers, "--set", "eval.every_epochs=0"]
    assert pretrain(tiny, run, *arguments, "--set", "data.cache=none") == 3
    assert len((run / "bad_images.txt").read_text().splitlines()) >= 1
    assert "error:" in capsys.readouterr().err


def test_held_out_images_that_are_corrupt_are_left_out_and_listed(tiny, tmp_path, photos):
    held_out = tmp_path / "held-out"
    shutil.copytree(photos, held_out)
    (held_out / "left" / "04.png").write_bytes(b"")
    run = tmp_path / "run"
    arguments = ["--data", str(photos), "--val", str(held_out), "--set", "data.max_corrupt_fraction=0.05"]
    assert pretrain(tiny, run, *arguments) == 0
    results = json.loads((run / "results.json").read_text())
    assert (results["protocol"]["val_images"], results["bad_val_images"], results["bad_images"]) == (39, 1, 0)
    assert (run / "bad_images.txt").read_text().startswith("left/04.png\t")
    for number in range(0, 20, 2):
        (held_out / "left" / f"{number:02d}.png").write_bytes(b"")
    assert pretrain(tiny, tmp_path / "many", *arguments) == 3


def test_auto_cache_takes_images_of_several_sizes(tiny, tmp_path, photos):
    """Even if those that were looked at are of one size; asked for by name, the device refuses them."""
    Image.new("RGB", (9, 33)).save(photos / "left" / "99.png")
    arguments = ["--data", str(photos), "--set", "eval.every_epochs=0", "--set", "optim.max_steps=2"]
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr("relicctl.pretraining.run.resolve_cache", lambda *_: "device")
        assert pretrain(tiny, tmp_path / "auto", *arguments) == 0
        assert pretrain(tiny, tmp_path / "named", *arguments, "--set", "data.cache=device") == 2
    assert not (tmp_path / "named").exists()


def test_a_run_inside_its_own_data_is_refused(tiny, photos):
    assert pretrain(tiny, photos / "run", "--data", str(photos), "--set", "eval.every_epochs=0") == 2
    assert not (photos / "run").exists()
    val = shutil.copytree(photos, photos.parent / "val")
    assert pretrain(tiny, val / "run", "--data", str(photos), "--val", str(val)) == 2
    assert not (val / "run").exists()


def test_the_device_and_the_host_make_the_same_views_up_to_rounding(tiny, tmp_path, photos):
    """The decoded-once road trains like the other: losses differ by resampling's rounding alone."""
    losses = []
    for cache in ("none", "device"):
        run = tmp_path / cache
        sets = ["--set", "eval.every_epochs=0", "--set", f"data.cache={cache}", "--set", "optim.max_steps=2"]
        assert pretrain(tiny, run, "--data", str(photos), *sets) == 0
        losses.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


# Bad input: exit code, two sentences, nothing left behind.


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--data", "nowhere"], 3, "nowhere"),
        (["--data", "EMPTY"], 3, "empty"),
        (["--data", "NOARCHIVE"], 3, "archive"),
        (["--set", "optim.batch_size=65"], 2, "larger than the data"),
        (["--set", "optim.batch_size=1"], 2, "optim.batch_size"),
        (["--set", "loss.negatives=8"], 2, "loss.negatives"),
        (["--set", "views.large.size=100000"], 2, "memory"),
        (["--set", "loss.temprature=1"], 2, "loss.temperature"),
        (["--set", "loss.temperature=warm"], 2, "loss.temperature"),
        (["--preset", "cifar10-r81"], 2, "cifar10-r18"),
        (["--device", "cuda"], 2, "CUDA"),
        (["--init-from", "PICKLE"], 2, "PICKLE"),
        (["--init-from", "nowhere"], 2, "nowhere"),
        (["--set", "data.subset=1000"], 2, "data.subset"),
        (["--no-such-option"], 2, "--no-such-option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_gets_two_sentences_and_its_code(tiny, tmp_path, capsys, monkeypatch, arguments, code, says):
    import pickle

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    Path("NOARCHIVE.zip").write_bytes(b"no archive at all")
    Path("PICKLE").write_bytes(pickle.dumps({"weight": 1}))
    arguments = [a + ".zip" if a == "NOARCHIVE" else a for a in arguments]
    assert pretrain(tiny, Path("run"), *arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert says in captured.err
    assert [line.split(":")[0].strip() for line in captured.err.splitlines()[-2:]] == ["error", "fix"]
    assert not Path("run").exists()


def test_a_folder_in_use_is_refused_with_the_ways_on(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert pretrain(tiny, run, "--set", "optim.max_steps=2") == 0
    before = (run / "results.json").read_bytes()
    assert pretrain(tiny, run) == 2
    error = capsys.readouterr().err
    assert all(way in error for way in ("--resume", "--out", "--overwrite"))
    assert (run / "results.json").read_bytes() == before
    assert pretrain(tiny, run, "--overwrite", "--set", "optim.max_steps=3") == 0

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    assert pretrain(tiny, precious, "--overwrite") == 2  # not a run's folder: never deleted
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_an_unwritable_out_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert pretrain(tiny, tmp_path / "file" / "run") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_checkpoint_of_another_architecture_is_refused(tiny, tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    assert pretrain(tiny, run, "--set", "optim.max_steps=4") == 0
    assert pretrain(tiny, other, "--set", "optim.max_steps=4", "--set", "model.width=0.25") == 0
    assert relicctl(["pretrain", "--resume", str(run), "--set", "model.width=0.25"]) == 2
    assert "model.width" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    assert relicctl(["pretrain", "--resume", str(run)]) == 2
    assert "another architecture" in capsys.readouterr().err


def test_a_broken_newest_checkpoint_costs_no_more_than_the_way_from_the_one_before(tiny, tmp_path, capsys):
    assert pretrain(tiny, tmp_path / "whole") == 0
    run = tmp_path / "run"
    assert pretrain(tiny, run, "--set", "optim.max_steps=8") == 0
    newest = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    assert relicctl(["pretrain", "--resume", str(run), "--set", "optim.max_steps=16"]) == 0
    assert newest.name in capsys.readouterr().err
    assert_same_run(tmp_path / "whole", run)
    for path in checkpoint.list_checkpoints(run / "checkpoints"):
        path.write_bytes(b"")
    assert relicctl(["pretrain", "--resume", str(run)]) == 2


def test_a_run_goes_on_only_with_the_images_it_was_started_with(tiny, tmp_path, photos, capsys):
    run = tmp_path / "run"
    arguments = ["--data", str(photos), "--set", "eval.every_epochs=0", "--set", "optim.max_steps=2"]
    assert pretrain(tiny, run, *arguments) == 0
    moved = tmp_path / "moved"
    photos.rename(moved)
    assert relicctl(["pretrain", "--resume", str(run), "--data", str(moved), "--set", "optim.max_steps=3"]) == 0
    (moved / "left" / "04.png").unlink()
    assert relicctl(["pretrain", "--resume", str(run), "--data", str(moved), "--set", "optim.max_steps=4"]) == 3
    assert "images are not those" in capsys.readouterr().err


def test_two_runs_cannot_write_into_one_folder(tiny, tmp_path, capsys):
    """Nor does a lock outlive its holder in the data workers that it started."""
    run = tmp_path / "run"
    assert pretrain(tiny, run, "--set", "optim.max_steps=2") == 0
    ready, done = multiprocessing.get_context("fork").Event(), multiprocessing.get_context("fork").Event()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(run, ready, done))
    holder.start()
    ready.wait()
    assert relicctl(["pretrain", "--resume", str(run)]) == 2
    assert "Another process" in capsys.readouterr().err
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert relicctl(["pretrain", "--resume", str(run), "--quiet"]) == 0
    done.set()


def hold(run: Path, ready, done) -> None:
    """Lock the folder, as a run that has a data worker."""
    from relicctl.runs.folder import RunFolder

    folder = RunFolder.reopen(run, keep=2)
    if os.fork() == 0:
        done.wait(30)
        os._exit(0)
    ready.set()
    time.sleep(60)
    folder.close()


# What --resume takes, and what it does not.


@pytest.mark.parametrize(
    "arguments",
    [
        ["--overwrite"],
        ["--init-from", "RUN"],
        ["--out", "elsewhere"],
        ["--preset", "demo"],
        ["--set", "data.cache=none"],
    ],
    ids=" ".join,
)
def test_resume_refuses_what_it_would_have_to_ignore(tiny, tmp_path, capsys, arguments):
    run = tmp_path / "run"
    assert pretrain(tiny, run, "--set", "optim.max_steps=2") == 0
    arguments = [str(run) if a == "RUN" else a for a in arguments]
    assert relicctl(["pretrain", "--resume", str(run), *arguments]) == 2
    assert "error:" in capsys.readouterr().err
    assert relicctl(["pretrain", "--resume", str(run), "--quiet", "--set", "optim.max_steps=3"]) == 0
    assert "max_steps: 3" in (run / "config.yaml").read_text()


def test_a_resumed_run_keeps_its_preset_and_bare_resume_finds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [
        "data.train=shapes:size=16,train=64,val=40",
        "data.val=null",
        "optim.max_steps=2",
        "runtime.threads=1",
        "optim.batch_size=32",
    ]
    sets = [argument for assignment in small for argument in ("--set", assignment)]
    assert relicctl(["pretrain", "--preset", "demo", "--quiet", *sets]) == 0
    assert relicctl(["pretrain", "--preset", "cifar10-r18", "--quiet", *sets, "--out", "runs/demo-of-another"]) == 0
    more = ["--quiet", "--set", "optim.max_steps=3"]
    assert relicctl(["pretrain", "--preset", "demo", "--resume", *more]) == 0
    results = json.loads(Path("runs/demo/results.json").read_text())
    assert (results["preset"], results["steps"]) == ("demo", 3)
    assert relicctl(["pretrain", "--preset", "imagenette-r18", "--resume", *more]) == 2


def test_a_start_is_announced_with_an_unfinished_run_of_the_preset(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["data.train=shapes:size=16,train=64,val=40", "data.val=null", "optim.batch_size=32", "optim.max_steps=1"]
    command = ["pretrain", "--preset", "demo", *(word for assignment in small for word in ("--set", assignment))]

    def start(*more: str) -> str:
        assert relicctl([*command, *more]) == 0
        return capsys.readouterr().err

    assert start().startswith("64 images, cpu, 1 steps, run folder runs/demo\n")
    assert "not finished" not in start()
    status = json.loads(Path("runs/demo/status.json").read_text())
    for state, pid, unfinished in [("stopped", 1, True), ("running", os.getpid(), False), ("running", 2**22, True)]:
        Path("runs/demo/status.json").write_text(json.dumps({**status, "state": state, "pid": pid}))
        assert ("continue it instead: relicctl pretrain --resume runs/demo\n" in start()) == unfinished
    assert "not finished" not in start("--out", "elsewhere")


# Several processes.


@pytest.mark.slow
def test_torchrun_makes_one_run_of_two_processes(tiny, tmp_path):
    """The weights after one step are those of one process up to float32's rounding; only one process writes."""
    gentle = ["--set", "optim.name=sgd", "--set", "optim.warmup_epochs=0", "--set", "optim.max_steps=1"]
    assert pretrain(tiny, tmp_path / "one", *gentle) == 0
    two = torchrun(tiny, tmp_path / "two", *gentle)
    assert two.returncode == 0, two.stderr
    assert two.stdout == f"{tmp_path / 'two'}\n"
    one, other = (
        checkpoint.load_checkpoint(checkpoint.list_checkpoints(tmp_path / n / "checkpoints")[-1])[0]
        for n in ("one", "two")
    )
    assert one.keys() == other.keys()
    whole = torch.cat([t.flatten().double() for n, t in one.items() if n.startswith("optim.")]).norm()
    for name, tensor in one.items():
        if name.startswith("optim."):  # after one step the momentum is the gradient
            assert (tensor - other[name]).norm() < 1e-4 * whole, name
        assert (tensor.double() - other[name].double()).norm() < 1e-3 * tensor.double().norm().clamp_min(1), name


@pytest.mark.slow
def test_a_batch_that_cannot_be_split_over_processes_is_refused(tiny, tmp_path):
    two = torchrun(tiny, tmp_path / "two", "--set", "optim.batch_size=7")
    assert two.returncode != 0
    assert "cannot be split evenly over 2 processes" in two.stderr
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["--set=optim.batch_sise=8", "--nope", "--preset=dem"])
def test_an_error_of_all_processes_is_told_once(tiny, tmp_path, argument):
    two = torchrun(tiny, tmp_path / "two", argument)
    assert two.returncode != 0
    assert len([line for line in two.stderr.splitlines() if line.startswith("error: ")]) == 1


def torchrun(tiny: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(*free_ports(1))]
    command = [
        sys.executable,
        *launch,
        "-m",
        "relicctl",
        "pretrain",
        "--config",
        str(tiny),
        "--out",
        str(out),
        "--quiet",
    ]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], env=alone, capture_output=True, text=True, check=False)


def test_the_runs_own_values_count_when_it_is_resumed(tiny, tmp_path, capsys):
    """The defaults' warm-up of ten epochs is longer than two; the run's is not."""
    run = tmp_path / "run"
    assert pretrain(tiny, run, "--set", "optim.max_steps=2") == 0
    assert relicctl(["pretrain", "--resume", str(run), "--set", "optim.epochs=2", "--set", "optim.max_steps=4"]) == 0
    assert json.loads((run / "results.json").read_text())["steps"] == 4
    assert relicctl(["pretrain", "--resume", str(run), "--set", "optim.epochs=3"]) == 2
    assert "optim.epochs is 2" in capsys.readouterr().err


def test_a_resumed_run_that_has_nothing_left_to_train_says_so(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert pretrain(tiny, run) == 0
    before = (run / "encoder.safetensors").read_bytes()
    for added, said in (
        (["--set", f"optim.max_steps={STEPS + 5}"], f"the schedule ends at step {STEPS}"),
        (["--set", f"optim.max_steps={STEPS - 5}"], f"nothing is left to train: step {STEPS} of {STEPS - 5}"),
        (["--set", "optim.max_steps=null"], f"nothing is left to train: step {STEPS} of {STEPS}"),
    ):
        capsys.readouterr()
        assert relicctl(["pretrain", "--resume", str(run), *added]) == 0
        assert said in capsys.readouterr().err
        assert (run / "encoder.safetensors").read_bytes() == before


# Several data sets.


def test_several_data_sets_are_trained_on_together(tiny, tmp_path, photos, capsys):
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    several = ["--data", str(photos), "--data", str(other), "--val", str(photos), "--val", str(other)]
    assert pretrain(tiny, tmp_path / "run", *several, "--set", "optim.epochs=1") == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["data"]["train"] == config["data"]["val"] == [str(photos), str(other)]
    one = len(open_dataset(str(photos)))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["images"] == config["run"]["images"] == 2 * one
    assert relicctl(["pretrain", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert relicctl(["pretrain", "--resume", str(tmp_path / "run"), "--data", str(photos)]) == 3
    assert "not those" in capsys.readouterr().err
    assert pretrain(tiny, photos / "run", "--data", "shapes", "--data", str(photos)) == 2
    assert "inside the data" in capsys.readouterr().err


def test_a_second_bank_is_not_ignored(tiny, tmp_path, capsys):
    assert pretrain(tiny, tmp_path / "run", "--bgmask", "a", "--bgmask", "b") == 2
    assert "--bgmask is given 2 times" in capsys.readouterr().err
