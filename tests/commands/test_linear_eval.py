"""Laws of a linear evaluation: it never touches the encoder nor learns from the test set; resumed = never cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from relicctl.cli import run as relicctl
from relicctl.commands import linear_eval as command
from relicctl.data.datasets.open import open_dataset
from relicctl.encoders.file import load_encoder
from relicctl.export.bundle import load_head
from tests.helpers.configs import tiny_pretrain_yaml

DATA = "shapes:size=16,train=80,val=40"
TINY = tiny_pretrain_yaml(views={"small": {"count": 0}}, data={"train": DATA, "val": DATA}, eval={"every_epochs": 10})
FAST = """
optim: {epochs: 4}
runtime: {device: cpu, threads: 1}
"""
IMAGENET = """
protocol: imagenet
sweep: {lrs: [0.3, 3.0]}
optim: {batch_size: 16, epochs: 2}
checkpoint: {every_steps: 3, every_minutes: null}
runtime: {device: cpu, threads: 1, precision: fp32, log_every: 2}
"""  # four steps an epoch in the sweep, five in the last training


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "tiny.yaml").write_text(TINY)
    assert relicctl(["pretrain", "--config", str(folder / "tiny.yaml"), "--out", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


@pytest.fixture
def evaluate(tmp_path):
    """Run linear-eval quietly into OUT, in a form; its exit code."""
    (tmp_path / "fast").write_text(FAST)
    (tmp_path / "imagenet").write_text(IMAGENET)

    def evaluate(source: Path | str, out: str, *arguments: str, form: str = "fast") -> int:
        told = ["--config", str(tmp_path / form), "--out", str(tmp_path / out), "--quiet", *arguments]
        return relicctl(["linear-eval", str(source), *told])

    return evaluate


def results(folder: Path) -> dict:
    content = json.loads((folder / "results.json").read_text())
    del content["seconds"]
    return content


def assert_same_classifier(one: Path, other: Path) -> None:
    classifiers = [load_file(folder / "classifier.safetensors") for folder in (one, other)]
    for name in ("weight", "bias"):
        assert torch.equal(classifiers[0][name], classifiers[1][name])


# What it leaves.


def test_with_a_run_alone_it_finds_everything_else_there(run, capsys):
    assert relicctl(["linear-eval", str(run), "--device", "cpu", "--set", "optim.epochs=2"]) == 0
    said = capsys.readouterr()
    folder = run / "linear-eval"
    assert said.out == f"{folder}\n"
    assert all(word in said.err for word in ("top-1", "top-5", "kNN(200)", "rate per 256", "predicted"))
    found = results(folder)
    for name in ("top1", "top5", "mean_per_class", "knn20", "knn200"):
        assert 0 <= found[name] <= 1
    assert found["protocol"]["test"] == DATA
    assert np.sum(found["confusion"]) == found["protocol"]["test_images"] == 40
    assert found["top1"] == np.trace(found["confusion"]) / 40
    assert found["sweep"]["rate"] == found["protocol"]["rate_per_256"]
    assert (folder / "linear.png").read_bytes().startswith(b"\x89PNG")
    assert relicctl(["linear-eval", str(run), "--dry-run"]) == 0
    assert f"train: {DATA}" in capsys.readouterr().out


def test_json_is_one_object_with_the_figures(run, evaluate, tmp_path, capsys):
    assert evaluate(run, "out", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["run"] == str(tmp_path / "out")
    assert printed["knn20"] == json.loads((run / "results.json").read_text())["knn20"]


@pytest.mark.parametrize("form", ["fast", "imagenet"])
def test_the_saved_classifier_on_the_exported_encoder_gives_the_figures(run, evaluate, tmp_path, form):
    assert evaluate(run, "out", form=form) == 0
    encoder, test = load_encoder(run), open_dataset(DATA, split="val")
    head = load_head(tmp_path / "out", encoder.feature_dim)
    with torch.no_grad():
        features = encoder(torch.stack([encoder.transform(test.load(i)) for i in range(len(test))]))
    told = torch.nn.functional.linear(features, head.weight, head.bias).argmax(1)
    right = [head.classes[k] == test.classes[label] for k, label in zip(told.tolist(), test.labels, strict=True)]
    assert results(tmp_path / "out")["top1"] == pytest.approx(np.mean(right), abs=1.5 / len(test))


# Laws.


@pytest.mark.parametrize("form", ["fast", "imagenet"])
def test_the_encoder_and_its_features_are_the_same_to_the_bit(run, evaluate, monkeypatch, form):
    opened, images = [], torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def open_encoder(*args, **told):
        reference = command_open(*args, **told)
        encoder = reference.encoder.to(memory_format=torch.channels_last)
        with torch.no_grad():
            before = {name: t.clone() for name, t in encoder.state_dict().items()}
            opened.append((encoder, before, encoder(images)))
        return reference

    command_open = command.open_encoder
    monkeypatch.setattr(command, "open_encoder", open_encoder)
    assert evaluate(run, "out", form=form) == 0
    ((encoder, before, features),) = opened
    assert not any(module.training for module in encoder.modules())
    assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())
    with torch.no_grad():
        assert torch.equal(encoder(images), features)


@pytest.mark.parametrize("form", ["fast", "imagenet"])
def test_the_classifier_owes_nothing_to_the_test_set(run, evaluate, tmp_path, form):
    assert evaluate(run, "one", form=form) == 0
    assert evaluate(run, "other", "--val", "shapes:size=16,val=50,seed=7", form=form) == 0
    assert_same_classifier(tmp_path / "one", tmp_path / "other")
    assert results(tmp_path / "other")["protocol"]["test_images"] == 50


def test_any_number_of_workers_gives_the_same(run, evaluate, tmp_path):
    for workers in ("0", "2"):
        told = ["--workers", workers, "--set", "data.cache=none", "--set", "sweep.lrs=[0.3]"]
        assert evaluate(run, workers, *told, form="imagenet") == 0
    assert_same_classifier(tmp_path / "0", tmp_path / "2")
    assert results(tmp_path / "0") == results(tmp_path / "2")


@pytest.mark.parametrize("cut", [1, 5])
@pytest.mark.parametrize("form", ["fast", "imagenet"])
def test_cut_at_any_step_and_resumed_is_never_cut(run, evaluate, tmp_path, form, cut):
    assert evaluate(run, "whole", form=form) == 0
    assert evaluate(run, "cut", "--set", f"optim.max_steps={cut}", form=form) == 0
    on = ["linear-eval", "--resume", str(tmp_path / "cut"), "--quiet", "--set", "optim.max_steps=null"]
    assert relicctl(on) == 0
    assert_same_classifier(tmp_path / "whole", tmp_path / "cut")
    assert results(tmp_path / "whole") == results(tmp_path / "cut")


def test_the_same_command_line_starts_an_evaluation_and_resumes_it(run, evaluate, tmp_path):
    """As a scheduler executes it again. An empty folder may be left of a start that was stopped."""
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / ".lock").touch()
    assert evaluate(run, "whole", form="imagenet") == 0
    again = ["again", "--resume", "--preset", "linear-imagenet"]
    assert evaluate(run, *again, "--set", "optim.max_steps=3", form="imagenet") == 0
    assert evaluate(run, *again, "--set", "optim.max_steps=null", form="imagenet") == 0
    assert results(tmp_path / "whole") == results(tmp_path / "again")


def test_a_finished_evaluation_is_not_trained_again_but_scores_further_sets(run, evaluate, tmp_path):
    assert evaluate(run, "out", form="imagenet") == 0
    before, metrics = results(tmp_path / "out"), (tmp_path / "out" / "metrics.jsonl").read_bytes()
    swapped = f"swapped={DATA},backgrounds=swapped"
    assert relicctl(["linear-eval", "--resume", str(tmp_path / "out"), "--test", swapped, "--quiet"]) == 0
    after = results(tmp_path / "out")
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == metrics
    assert after.pop("tests")["swapped"]["images"] == 40
    before.pop("tests")
    assert before == after


def test_the_evaluations_own_values_count_when_it_is_resumed(run, evaluate, tmp_path, capsys):
    """data.cache has no effect on the default protocol, but on this one."""
    assert evaluate(run, "out", form="imagenet") == 0
    resume = ["linear-eval", "--resume", str(tmp_path / "out")]
    assert relicctl([*resume, "--set", "data.cache=memory", "--set", "optim.max_steps=99"]) == 0
    said = capsys.readouterr().err
    assert said.count("the schedule ends at step 10") == 1
    assert "nothing is left to train: step 10 of 10" in said
    assert relicctl([*resume, "--set", "crop.hflip_prob=0"]) == 2
    assert "crop.hflip_prob is 0.5" in capsys.readouterr().err


# Other encoders.


def test_the_untrained_network_of_a_run_is_the_one_that_the_run_began_with(run, evaluate, tmp_path):
    assert evaluate(f"random:{run}", "out") == 0
    untrained = json.loads((run / "results.json").read_text())["untrained_knn20"]
    assert results(tmp_path / "out")["knn20"] == untrained


def test_random_and_pixels_take_data_and_sizes_from_the_options(evaluate, tmp_path):
    told = ["--data", DATA, "--val", DATA, "--set", "eval.size=16"]
    network = ["--set", "model.arch=resnet18", "--set", "model.width=0.125", "--set", "model.stem=cifar"]
    assert evaluate("random", "random", *told, *network) == 0
    assert evaluate("pixels", "pixels", *told) == 0
    shapes = [load_file(tmp_path / n / "classifier.safetensors")["weight"].shape for n in ("random", "pixels")]
    assert shapes == [(10, 64), (10, 3 * 16 * 16)]


def test_torchvision_weights_are_taken_from_the_cache_and_never_fetched(evaluate, tmp_path, monkeypatch, capsys):
    import torchvision

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    told = ["--data", DATA, "--val", DATA, "--set", "eval.size=32", "--set", "sweep.lrs=[0.1]"]
    assert evaluate("torchvision:resnet18", "out", *told) == 3
    assert "not in its cache" in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    assert evaluate("torchvision:resnet18", "out", *told) == 0
    assert results(tmp_path / "out")["encoder"]["arch"] == "resnet18"


def test_the_target_network_is_another(run, evaluate, tmp_path):
    assert evaluate(run, "online") == 0
    assert evaluate(run, "target", "--network", "target") == 0
    found = [results(tmp_path / name)["encoder"]["network"] for name in ("online", "target")]
    assert found == ["online", "target"]
    weights = [load_file(tmp_path / n / "classifier.safetensors")["weight"] for n in ("online", "target")]
    assert not torch.equal(*weights)


def test_several_encoders_stand_side_by_side_in_the_analysis(run, evaluate, tmp_path):
    pytest.importorskip("sklearn")
    assert evaluate(run, "out", f"pixels:{run}", "--analysis") == 0
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert list(found) == [str(run), f"pixels:{run}"]
    assert all(len(clusters["images"]) == 40 for clusters in found.values())
    assert (tmp_path / "out" / "analysis.png").read_bytes().startswith(b"\x89PNG")


# Images on disk: further test sets, files that cannot be read, and what is refused.


@pytest.fixture
def photos(tmp_path):
    """Folders of small photos: ``train`` and ``val`` of three classes; ``other`` lacks one and has a fourth."""
    generator = np.random.default_rng(0)
    names = {"train": "abc", "val": "abc", "other": "bcd", "few": "ab"}
    for part, classes in names.items():
        for number in range(12):
            path = tmp_path / part / classes[number % len(classes)] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (20, 24, 3), np.uint8)).save(path)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "flat" / "one.png")
    return tmp_path


def test_further_test_sets_go_by_class_names_and_say_what_is_missing(run, evaluate, photos):
    told = ["--data", str(photos / "train"), "--val", str(photos / "val")]
    assert evaluate(run, "out", *told, "--test", f"other={photos / 'other'}", "--test", f"again={photos / 'val'}") == 0
    found = results(photos / "out")
    other = found["tests"]["other"]
    assert (other["images"], other["missing_classes"], other["unknown_classes"]) == (8, ["a"], ["d"])
    assert {name: row["images"] for name, row in other["per_class"].items()} == {"a": 0, "b": 4, "c": 4}
    assert found["tests"]["again"]["top1"] == found["top1"]


def test_several_data_sets_are_joined_by_their_class_names(run, evaluate, photos):
    told = ["--data", str(photos / "train"), "--data", str(photos / "other"), "--set", "sweep.lrs=[0.1]"]
    assert evaluate(run, "out", *told, "--val", str(photos / "val"), "--val", str(photos / "other")) == 0
    found = results(photos / "out")
    assert (found["protocol"]["train_images"], found["protocol"]["test_images"]) == (24, 24)
    assert found["protocol"]["train"] == [str(photos / "train"), str(photos / "other")]
    assert {name: row["images"] for name, row in found["per_class"].items()} == {"a": 4, "b": 8, "c": 8, "d": 4}
    assert relicctl(["linear-eval", "--resume", str(photos / "out"), "--quiet"]) == 0


def test_of_joined_data_sets_the_one_without_labels_is_named(run, evaluate, photos, capsys):
    told = ["--data", str(photos / "train"), "--data", str(photos / "flat"), "--val", str(photos / "val")]
    assert evaluate(run, "out", *told) == 3
    assert f"error: {photos / 'flat'} has no labels" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_left_out_and_listed(run, evaluate, photos):
    (photos / "val" / "a" / "00.png").write_bytes(b"no picture")
    told = ["--data", str(photos / "train"), "--val", str(photos / "val")]
    assert evaluate(run, "strict", *told, "--set", "data.max_corrupt_fraction=0") == 3
    assert evaluate(run, "out", *told, "--set", "data.max_corrupt_fraction=0.2") == 0
    assert results(photos / "out")["protocol"]["test_images"] == 11
    assert (photos / "out" / "bad_images.txt").read_text().startswith("a/00.png\t")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--data", "flat", "--val", "val"], 3, "no labels"),
        (["--data", "train", "--val", "flat"], 3, "no labels"),
        (["--data", "train", "--val", "few"], 3, "different classes"),
        (["--data", "train", "--val", "other"], 3, "only there 'd'"),
        (["--data", "train", "--set", "eval.val_fraction=0"], 2, "--val"),
        (["--data", "train", "--val", "val", "--test", "flat"], 2, "NAME=DATA"),
        (["--data", "train", "--val", "val", "--test", "x=nowhere"], 3, "nowhere"),
        (["--out", "train"], 2, "not empty"),
        (["--resume", "nowhere"], 2, "no folder of results"),
        (["--resume", "RUN"], 2, "pretrain"),
        (["--set", "sweep.lrs=[]"], 2, "sweep.lrs"),
        (["--set", "crop.hflip_prob=0"], 2, "fast"),
        (["--set", "loss.beta=1"], 2, "loss.beta"),
        (["--preset", "demo"], 2, "pretrain"),
        (["--network", "third"], 2, "online or target"),
        (["random"], 2, "--analysis"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_gets_two_sentences_and_its_code(run, photos, monkeypatch, capsys, arguments, code, says):
    monkeypatch.chdir(photos)
    assert relicctl(["linear-eval", str(run), *(str(run) if a == "RUN" else a for a in arguments)]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err
    assert [line.split(":")[0].strip() for line in said.err.splitlines()[-2:]] == ["error", "fix"]


def test_weights_that_fit_no_encoder_are_refused_whole(run, evaluate, tmp_path, capsys):
    tensors = load_file(run / "encoder.safetensors")
    del tensors["conv1.weight"]
    save_file(tensors, tmp_path / "weights.safetensors")
    assert evaluate(tmp_path / "weights.safetensors", "out") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_in_a_pipe_only_the_folder_comes_out_and_a_failing_stage_fails_it(run, tmp_path):
    relic = f"{sys.executable} -m relicctl"
    fast = "--device cpu --set optim.epochs=1 --quiet"

    def bash(line: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = bash(f"echo {run} | {relic} linear-eval - --out out {fast}")
    assert (done.returncode, done.stdout) == (0, "out\n"), done.stderr
    broken = bash(f"{relic} pretrain --preset no-such | {relic} linear-eval - {fast}")
    assert (broken.returncode, broken.stdout) == (2, "")
    assert "got none" in broken.stderr


# Which images.


def make_photos(folder: Path, each: int = 10) -> Path:
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            Image.new("RGB", (16, 16), (number * 9, ord(name), 0)).save(folder / name / f"{number}.png")
    return folder


def test_class_folders_without_others_to_test_on_are_divided_and_said_so(run, evaluate, tmp_path, capsys):
    photos = make_photos(tmp_path / "photos")
    assert relicctl(["linear-eval", str(run), "--data", str(photos), "--dry-run"]) == 0
    assert "val_fraction: 0.1" in capsys.readouterr().out
    told = ["--config", str(tmp_path / "fast"), "--out", str(tmp_path / "out"), "--data", str(photos)]
    assert relicctl(["linear-eval", str(run), *told]) == 0
    assert f"2 images of {photos} are held out for testing (eval.val_fraction)" in capsys.readouterr().err
    assert results(tmp_path / "out")["protocol"]["test_images"] == 2
    assert evaluate(run, "asked", "--data", str(photos), "--set", "eval.val_fraction=0") == 2
    assert "no images to test on" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["train", "val", "extra"])
def test_results_are_never_written_into_the_images(run, evaluate, tmp_path, capsys, place):
    for name in ("train", "val", "extra"):
        make_photos(tmp_path / name, each=3)
    told = ["--data", f"{tmp_path}/train", "--val", f"{tmp_path}/val", "--test", f"more={tmp_path}/extra"]
    assert evaluate(run, f"{place}/results", *told) == 2
    assert f"lies inside the data ({tmp_path}/{place})." in capsys.readouterr().err
    assert not (tmp_path / place / "results").exists()
