"""Laws of a comparison: killed and resumed = never killed, nothing twice, the test set decides nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relicctl.cli import run as relicctl
from relicctl.config.resolve import resolve_config
from relicctl.encoders.file import save_encoder
from relicctl.errors import Terminated
from relicctl.evaluation import features as keeping
from relicctl.evaluation import logistic_regression
from relicctl.evaluation import transfer as command
from relicctl.evaluation.metrics import DATASET_METRICS
from tests.helpers.runs import lively_encoder
from tests.helpers.voc import write_voc

DATA = "shapes:size=16,train=120,val=60"
FAST = """
command: transfer
logistic: {l2: [0.01, 0.1, 1, 10, 100]}
knn: {k: [1, 5]}
finetune: {lrs: [0.01, 0.1], steps: 6, batch_size: 16}
checkpoint: {every_steps: 2, every_minutes: null}
runtime: {device: cpu, threads: 1, precision: fp32, workers: 0}
"""


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("encoders")
    metadata = {"size": "16", "crop_ratio": "1.0", "mean": "[0.485, 0.456, 0.406]", "std": "[0.229, 0.224, 0.225]"}
    for seed in range(2):
        save_encoder(folder / f"{seed}.safetensors", lively_encoder("resnet18", 0.125, "stride2", seed=seed), metadata)
    return [str(folder / f"{seed}.safetensors") for seed in range(2)]


@pytest.fixture
def compare(tmp_path):
    (tmp_path / "fast.yaml").write_text(FAST)

    def compare(out: str, *arguments: str) -> int:
        told = ["--config", str(tmp_path / "fast.yaml"), "--out", str(tmp_path / out), "--quiet"]
        return relicctl(["transfer", *arguments, *told])

    return compare


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


PROTOCOLS = [f"--protocol={name}" for name in ("logistic", "knn", "finetune")]


def test_every_protocol_on_every_data_set_for_every_encoder(encoders, compare, tmp_path, capsys):
    told = ["--data", f"one={DATA}", "--data", f"pets={DATA},seed=1", "--labels=all", "--labels=0.5", *PROTOCOLS[:2]]
    assert compare("out", *encoders, "--baseline", "pixels", *told, "--set", "eval.size=16") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    found = results(tmp_path / "out")
    cells = found["cells"]
    assert len(cells) == len({(c["encoder"], c["data"], c["protocol"], c["labels"]) for c in cells}) == 3 * 2 * 2 * 2
    assert {c["data"]: c["metric"] for c in cells} == {"one": "top1", "pets": "mean_per_class"}
    assert all(0 <= c["value"] <= 1 and c["images"]["test"] == 60 for c in cells)
    assert {c["images"]["fit"] + c["images"]["validation"] for c in cells if c["labels"] == "all"} == {120}
    assert len(found["relative"]) == 16
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 8
    assert (tmp_path / "out" / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_several_classes_an_image_by_every_protocol(encoders, compare, tmp_path):
    kinds = (["cat"], ["dog"], ["cat", "dog"], ["dog?"], [])
    lists = {
        part: {str(n): kinds[n % 5] for n in range(first, first + 20)}
        for part, first in (("train", 0), ("val", 20), ("test", 40))
    }
    voc = write_voc(tmp_path / "voc", lists)
    told = [encoders[0], "--data", f"x={voc}", *PROTOCOLS, "--set", "finetune.steps=2"]
    assert compare("out", *told, "--labels=all", "--labels=0.9") == 0
    cells = results(tmp_path / "out")["cells"]
    assert [(c["protocol"], c["labels"], c["metric"]) for c in cells] == [
        (p, n, "map11") for p in ("logistic", "knn", "finetune") for n in ("all", "0.9")
    ]
    assert all(0 < c["value"] <= 1 for c in cells)
    assert cells[0]["value"] > 0.5  # cats are red
    images = {c["labels"]: c["images"] for c in cells}
    assert images == {
        "all": {"fit": 20, "validation": 20, "test": 20},
        "0.9": {"fit": 14, "validation": 4, "test": 20},
    }


def test_lengths_are_chosen_with_the_rates(encoders, compare, tmp_path):
    told = [encoders[0], "--data", f"one={DATA}", "--protocol=finetune", "--set", "finetune.epochs=[1, 2]"]
    assert compare("out", *told, "--set", "finetune.batch_size=48") == 0
    (cell,) = results(tmp_path / "out")["cells"]
    assert [(c["rate"], c["epochs"]) for c in cell["tried"]] == [(0.01, 1), (0.01, 2), (0.1, 1), (0.1, 2)]
    (best,) = [c for c in cell["tried"] if cell["chosen"].items() <= c.items()]
    assert best["value"] == max(c["value"] for c in cell["tried"])
    (folder,) = (tmp_path / "out" / "finetune").iterdir()
    steps = {
        path.name: [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()][-1]
        for path in folder.iterdir()
    }
    assert steps["0.01-0-1"] == 2  # of 96 images; in the end of all 120, the last batch of each pass left out
    assert steps["0.1-0-2"] == 4
    assert steps["final"] == 2 * cell["chosen"]["epochs"]


def test_killed_and_resumed_is_never_killed_and_computes_nothing_twice(encoders, compare, tmp_path, monkeypatch):
    told = [*encoders, "--data", f"one={DATA}", *PROTOCOLS]
    assert compare("whole", *told) == 0
    solved, looked = [], []
    whole_solve, whole_look = command.FROZEN_PROTOCOLS["logistic"], command.FeatureExtractor.__call__

    def judge(*args, **kwargs):
        if len(solved) == 1:
            solved.append("killed")
            raise KeyboardInterrupt
        solved.append("done")
        return whole_solve(*args, **kwargs)

    def look(self, images):
        looked.append(len(images.labels))
        return whole_look(self, images)

    monkeypatch.setitem(command.FROZEN_PROTOCOLS, "logistic", judge)
    monkeypatch.setattr(command.FeatureExtractor, "__call__", look)
    assert compare("cut", *told) == 130
    assert relicctl(["transfer", "--resume", str(tmp_path / "cut"), "--quiet"]) == 0
    assert solved == ["done", "killed", "done"]
    assert looked == [120, 60, 120, 60]
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert (tmp_path / "cut" / "table.md").read_text() == (tmp_path / "whole" / "table.md").read_text()


def test_the_same_command_line_starts_a_comparison_and_resumes_it(encoders, compare, tmp_path):
    told = [*encoders, "--data", f"one={DATA}", "--protocol=knn", "--resume"]
    assert compare("again", *told) == 0
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "again" / "cells").rglob("*")}
    assert finished
    assert compare("again", *told) == 0
    assert finished == {path: path.stat().st_mtime_ns for path in (tmp_path / "again" / "cells").rglob("*")}


def test_a_killed_fine_tuning_goes_on_from_its_checkpoint(encoders, compare, tmp_path, monkeypatch):
    from relicctl.evaluation import finetune as tuning

    told = [encoders[0], "--data", f"one={DATA}", "--protocol=finetune"]
    assert compare("whole", *told) == 0
    steps, loss = [], tuning.FinetuneTask.compute_loss

    def killing(self, batch, step):
        steps.append(step)
        if len(steps) == 11:  # in the second training, after its checkpoint of step 4
            raise KeyboardInterrupt
        return loss(self, batch, step)

    monkeypatch.setattr(tuning.FinetuneTask, "compute_loss", killing)
    assert compare("cut", *told) == 130
    assert relicctl(["transfer", "--resume", str(tmp_path / "cut"), "--quiet"]) == 0
    assert steps == [*range(6), *range(5), 4, 5, *range(6)]
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_more_data_or_protocols_keep_what_is_there(encoders, compare, tmp_path, monkeypatch):
    assert compare("out", encoders[0], "--data", f"one={DATA}") == 0
    monkeypatch.setattr(logistic_regression, "fit_logistic_regression", None)
    more = [*PROTOCOLS[:2], "--resume", str(tmp_path / "out")]
    assert relicctl(["transfer", *more, "--quiet"]) == 0
    assert [c["protocol"] for c in results(tmp_path / "out")["cells"]] == ["logistic", "knn"]


def test_what_is_chosen_owes_nothing_to_the_test_images(encoders, compare, tmp_path):
    for name, spec in (("one", DATA), ("other", DATA.replace("val=60", "val=30"))):
        assert compare(name, encoders[0], "--data", f"x={spec}", *PROTOCOLS) == 0
    chosen = [[(c["chosen"], c["tried"]) for c in results(tmp_path / n)["cells"]] for n in ("one", "other")]
    assert chosen[0] == chosen[1]


def test_a_disk_that_is_full_stops_it_with_two_sentences(encoders, compare, monkeypatch, capsys):
    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keeping, "write_atomically", full)
    assert compare("out", encoders[0], "--data", f"one={DATA}") == 1
    assert "No space left on device" in capsys.readouterr().err


def test_damaged_features_are_made_again(encoders, compare, tmp_path):
    told = [encoders[0], "--data", f"one={DATA}"]
    assert compare("out", *told) == 0
    before = results(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "cells")
    for path in (tmp_path / "out" / "features").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert relicctl(["transfer", "--resume", str(tmp_path / "out"), "--quiet"]) == 0
    assert results(tmp_path / "out") == before


def test_features_that_are_not_finite_are_refused(compare, tmp_path, encoders, capsys):
    from safetensors.torch import load_file, safe_open, save_file

    tensors = load_file(encoders[0])
    tensors["conv1.weight"][0, 0, 0, 0] = torch.nan
    with safe_open(encoders[0], "pt") as handle:
        save_file(tensors, tmp_path / "nan.safetensors", handle.metadata())
    assert compare("out", str(tmp_path / "nan.safetensors"), "--data", f"one={DATA}") == 3
    assert "not finite" in capsys.readouterr().err


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for split, classes in {"full/train": "abc", "full/test": "abc", "notest/train": "ab", "single/train": "a",
                           "single/test": "a"}.items():  # fmt: skip
        for number in range(12):
            path = tmp_path / split / classes[number % len(classes)] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (20, 24, 3), np.uint8)).save(path)
    write_voc(tmp_path / "voc", {"train": {"1": ["cat"], "2": ["dog"]}, "test": {"3": ["cat"]}})
    return tmp_path


def test_images_that_cannot_be_read_are_left_out_and_listed(encoders, compare, photos):
    (photos / "full/test/a/00.png").write_bytes(b"no picture")
    assert compare("out", encoders[0], "--data", f"x={photos / 'full'}", "--set", "data.max_corrupt_fraction=0.1") == 0
    assert (photos / "out" / "bad_images.txt").read_text().startswith("a/00.png\t")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["A"], 2, "Missing --data"),
        (["--data", "x=full"], 2, "Missing encoder"),
        (["A", "--data", "full"], 2, "NAME=DATA"),
        (["A", "--data", "x=full", "--data", "x=full"], 2, "twice"),
        (["A", "A", "--data", "x=full"], 2, "named twice"),
        (["A", "COPY", "--data", "x=full"], 2, "the same encoder"),
        (["A", "--baseline", "A", "--data", "x=full"], 2, "named twice"),
        (["A", "--data", "x=notest"], 3, "no test split"),
        (["A", "--data", "x=single"], 3, "two classes"),
        (["A", "--data", "x=nowhere"], 3, "nowhere"),
        (["A", "--data", "x=full", "--labels", "lots"], 2, "--labels lots"),
        (["A", "--data", "x=full", "--labels", "1-per-class"], 3, "too few labels"),
        (["A", "--data", "x=full", "--labels", "9-per-class"], 3, "only 4 images"),
        (["A", "--data", "x=full", "--protocol", "svm"], 2, "protocol"),
        (["A", "--data", "x=full", "--set", "data.metrics={x: f1}"], 2, "data.metrics"),
        (["A", "--data", "x=full", "--set", "data.samples_per_class={x: [1, 2, 3]}"], 2, "data.samples_per_class"),
        (["A", "--data", "x=full/train", "--set", "data.samples_per_class={x: [9]}"], 3, "only 4 images"),
        (["A", "--data", "x=full", "--set", "finetune.epochs=[]"], 2, "finetune.epochs"),
        (["A", "--data", "x=voc", "--set", "data.metrics={x: top1}"], 2, "multi-label"),
        (["A", "--data", "x=voc", "--labels", "1-per-class"], 2, "multi-label"),
        (["A", "--data", "x=full", "--out", "full"], 2, "not empty"),
        (["--resume", "nowhere"], 2, "--resume"),
        (["A", "--data", "x=full", "--preset", "demo"], 2, "pretrain"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_gets_two_sentences_and_its_code(encoders, photos, monkeypatch, capsys, arguments, code, says):
    monkeypatch.chdir(photos)
    shutil.copy(encoders[0], "copy.safetensors")
    names = {"A": encoders[0], "COPY": "copy.safetensors"}
    assert relicctl(["transfer", *(names.get(a, a) for a in arguments), "--device", "cpu"]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err
    assert [line.split(":")[0].strip() for line in said.err.splitlines()[-2:]] == ["error", "fix"]


def test_byols_suite_has_its_metrics_and_draws():
    data = resolve_config("byol-suite").config.data
    assert DATASET_METRICS.keys() <= data.datasets.keys()
    assert data.metrics == {}
    assert data.samples_per_class == {"sun397": (50, 50), "caltech101": (30,)}


def test_a_draw_is_named_in_the_table(encoders, compare, photos):
    told = ["--data", f"x={photos / 'full/train'}", "--set", "data.samples_per_class={x: [2, 1], y: [1]}"]
    assert compare("out", encoders[0], *told) == 0
    found = results(photos / "out")
    assert found["data"]["x"] | {"source": ""} == {
        "source": "", "classes": 3, "train": 6, "val": None, "test": 3, "draw": [2, 1],
    }  # fmt: skip
    notes = [line for line in (photos / "out" / "table.md").read_text().splitlines() if "drawn" in line]
    assert notes == ["- x: 2 images of each class to train on and 1 to test on, drawn by seed 0"]


def test_a_dry_run_prints_the_config_and_makes_nothing(encoders, photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    before = set(photos.rglob("*"))
    assert relicctl(["transfer", encoders[0], "--preset", "byol-suite", "--labels", "0.1", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "torchvision:FGVCAircraft" in said
    assert "caltech101: [30]" in said
    assert "# from --labels" in said
    assert set(photos.rglob("*")) == before


def test_a_rate_that_diverges_loses_and_ends_nothing(encoders, compare, tmp_path, capsys):
    told = [encoders[0], "--data", f"one={DATA}", "--protocol=finetune"]
    assert compare("out", *told, "--set", "finetune.lrs=[0.01, 1e30]") == 0
    (cell,) = results(tmp_path / "out")["cells"]
    assert [candidate["rate"] for candidate in cell["tried"]] == [0.01]
    assert cell["chosen"]["rate"] == 0.01
    assert any("rate 1e+30" in text and "diverged" in text for text in cell["warnings"])
    assert compare("none", *told, "--set", "finetune.lrs=[1e29, 1e30]") == 4
    assert "finetune.lrs" in capsys.readouterr().err


def test_random_is_like_the_first_encoder(encoders, compare, tmp_path):
    assert compare("out", encoders[0], "--baseline", "random", "--data", f"one={DATA}") == 0
    facts = results(tmp_path / "out")["encoders"]
    assert facts["random"]["size"] == facts[encoders[0]]["size"] == 16
    assert facts["random"]["crop_ratio"] == 1.0
    from safetensors import safe_open

    widths = set()
    for path in (tmp_path / "out" / "features").iterdir():
        with safe_open(path, framework="pt") as file:
            widths.add(file.get_slice("features").get_shape()[1])
    assert widths == {64}  # of a ResNet-18 of width 1/8, both


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_signal_says_how_to_go_on(encoders, compare, tmp_path, monkeypatch, capsys, stop, code):
    def judge(*args, **kwargs):
        raise stop

    monkeypatch.setitem(command.FROZEN_PROTOCOLS, "logistic", judge)
    assert compare("cut", encoders[0], "--data", f"one={DATA}") == code
    assert f"Resume with: relicctl transfer --resume {tmp_path / 'cut'}" in capsys.readouterr().err


def test_another_precision_is_another_fine_tuning(encoders, compare, tmp_path):
    told = [encoders[0], "--data", f"one={DATA}", "--protocol=finetune", "--set", "finetune.steps=2"]
    assert compare("out", *told) == 0
    resumed = ["transfer", "--resume", str(tmp_path / "out"), "--quiet"]
    assert relicctl([*resumed, "--set", "runtime.precision=bf16"]) == 0
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2
    assert relicctl([*resumed, "--network", "target"]) == 2


def test_what_is_told_of_data_that_are_none_is_warned_of(encoders, tmp_path, capsys):
    (tmp_path / "fast.yaml").write_text(FAST)
    told = ["--config", str(tmp_path / "fast.yaml"), "--out", str(tmp_path / "out"), "--data", f"one={DATA}"]
    assert relicctl(["transfer", encoders[0], *told, "--set", "data.metrics={onr: mean_per_class}"]) == 0
    assert "unknown data set onr" in capsys.readouterr().err


def make_photos(folder: Path, splits=("train", "test")) -> Path:
    for split in splits:
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(10):
                Image.new("RGB", (16, 16), (number * 9, ord(name), 0)).save(folder / split / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("spec", ["photos", "photos/{split}", "photos#test"])
def test_results_are_never_written_into_the_images(encoders, compare, tmp_path, capsys, spec):
    make_photos(tmp_path / "photos")
    assert compare("photos/test/out", encoders[0], "--data", f"x={tmp_path}/{spec}") == 2
    assert "lies inside the data" in capsys.readouterr().err
    assert not (tmp_path / "photos/test/out").exists()


def test_the_folder_that_is_chosen_is_outside_the_images_too(encoders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(make_photos(tmp_path / "photos", splits=("",)))
    assert relicctl(["transfer", encoders[0], "--data", "x=."]) == 2
    assert "runs/transfer lies inside the data" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_draw_without_splits_is_in_the_table_and_the_results(encoders, compare, tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", splits=("",))
    assert compare("out", encoders[0], "--data", f"x={photos}", "--protocol=knn") == 0
    assert capsys.readouterr().err.count("has no splits; 4 of its 20 images") == 1
    assert "x: 20% of each class to test on, drawn by seed 0" in (tmp_path / "out/table.md").read_text()
    assert results(tmp_path / "out")["data"]["x"]["test_split"] == "20% of each class to test on, drawn by seed 0"
