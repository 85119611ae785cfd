"""Laws of dense comparisons: killed and resumed = never killed, nothing twice, processes as one."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relicctl.cli import run as relicctl
from relicctl.encoders.file import save_encoder
from relicctl.evaluation.dense.detection import DetectionTask
from relicctl.evaluation.dense.segmentation import SegmentationTask
from tests.helpers.runs import lively_encoder

DATA = "shapes:size=32,train=16,val=10"
COMMON = """
checkpoint: {every_steps: 2, every_minutes: null}
runtime: {device: cpu, threads: 1, precision: fp32, workers: 0, log_every: 1}
optim: {steps: 5, batch_size: 4, base_lr: 0.01, warmup_steps: 0}
"""
FAST = {
    "segmentation": "crop: {size: 32}\nhead: {channels: 8, dilation: 1}\n" + COMMON,
    "detection": "model: {freeze_bn: false}\nimages: {min_size: [32], max_size: 48}\n"
    "head: {channels: 8, hidden: 16, box_batch_size_per_image: 8, rpn_post_nms_top_n_train: 20,\n"
    "  rpn_post_nms_top_n_test: 20, anchors: [4, 8, 12, 16, 24]}" + COMMON,
}
TASKS = {"segmentation": SegmentationTask, "detection": DetectionTask}
METRICS = {"segmentation": "miou", "detection": "ap"}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("encoders")
    metadata = {"size": "32", "crop_ratio": "1.0", "mean": "[0.485, 0.456, 0.406]", "std": "[0.229, 0.224, 0.225]"}
    for seed in range(2):
        save_encoder(folder / f"{seed}.safetensors", lively_encoder("resnet18", 0.125, "stride2", seed=seed), metadata)
    return [str(folder / f"{seed}.safetensors") for seed in range(2)]


@pytest.fixture
def compare(tmp_path):
    for task, text in FAST.items():
        (tmp_path / f"{task}.yaml").write_text(text)

    def compare(task: str, out: str, *arguments: str) -> int:
        told = ["--config", str(tmp_path / f"{task}.yaml"), "--out", str(tmp_path / out), "--quiet"]
        return relicctl(["transfer", "--task", task, *arguments, *told])

    return compare


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("task", TASKS)
def test_killed_and_resumed_is_never_killed_and_computes_nothing_twice(
    task, encoders, compare, tmp_path, monkeypatch, capsys
):
    told = [encoders[0], "--baseline", encoders[1], "--data", f"x={DATA}"]
    assert compare(task, "whole", *told) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'whole'}\n"
    steps, loss = [], TASKS[task].compute_loss

    def killing(self, batch, step):
        steps.append(step)
        if len(steps) == 9:  # in the second cell's training, after its checkpoint of step 2
            raise KeyboardInterrupt
        return loss(self, batch, step)

    monkeypatch.setattr(TASKS[task], "compute_loss", killing)
    assert compare(task, "cut", *told) == 130
    assert relicctl(["transfer", "--task", task, "--resume", str(tmp_path / "cut"), "--quiet"]) == 0
    assert steps == [0, 1, 2, 3, 4, 0, 1, 2, 3, 2, 3, 4]
    found = results(tmp_path / "cut")
    assert found == results(tmp_path / "whole")
    assert (tmp_path / "cut" / "table.md").read_text() == (tmp_path / "whole" / "table.md").read_text()
    assert (tmp_path / "cut" / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "cut").rglob("*.safetensors"))
    for cell, encoder in zip(found["cells"], encoders, strict=True):
        assert {name: cell[name] for name in ("encoder", "data", "protocol", "labels", "metric")} == {
            "encoder": encoder, "data": "x", "protocol": task, "labels": "all", "metric": METRICS[task],
        }  # fmt: skip
        assert 0 <= cell["value"] <= 1
        assert cell["value"] == cell["figures"][METRICS[task]]
    assert [row["encoder"] for row in found["relative"]] == [encoders[0]]
    # what is there is taken over when another set of data comes along
    more = ["--data", f"x={DATA}", "--data", f"y={DATA},seed=1", "--resume", str(tmp_path / "cut")]
    assert relicctl(["transfer", "--task", task, *more, "--quiet"]) == 0
    assert len(steps) == 12 + 2 * 5
    assert results(tmp_path / "cut")["cells"][:2] == found["cells"]


@pytest.mark.parametrize("task", TASKS)
def test_another_setting_is_another_cell(task, encoders, compare, tmp_path):
    assert compare(task, "out", encoders[0], "--data", f"x={DATA}", "--set", "optim.steps=1") == 0
    before = results(tmp_path / "out")["cells"]
    told = ["transfer", "--task", task, "--resume", str(tmp_path / "out"), "--quiet"]
    assert relicctl([*told, "--set", "model.freeze_encoder=true"]) == 0
    after = results(tmp_path / "out")["cells"]
    assert (before[0]["frozen"], after[0]["frozen"]) == (False, True)
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2


def test_images_that_cannot_be_read_are_left_out_and_listed(encoders, compare, tmp_path):
    generator = np.random.default_rng(0)
    for part, number in (("train", 8), ("val", 4)):
        for folder in ("images", "masks"):
            (tmp_path / "d" / part / folder).mkdir(parents=True)
        for row in range(number):
            pixels = generator.integers(0, 255, (40, 36 + row, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "d" / part / "images" / f"{row}.png")
            Image.fromarray(pixels[..., 0] // 100).save(tmp_path / "d" / part / "masks" / f"{row}.png")
    (tmp_path / "d/val/images/1.png").write_bytes(b"no picture")
    told = [encoders[0], "--data", f"x={tmp_path / 'd'}"]
    assert compare("segmentation", "out", *told, "--set", "data.max_corrupt_fraction=0.3") == 0
    assert results(tmp_path / "out")["cells"][0]["images"] == {"fit": 8, "test": 3}
    assert (tmp_path / "out" / "bad_images.txt").read_text().startswith("1.png\t")
    assert compare("segmentation", "strict", *told, "--set", "data.max_corrupt_fraction=0") == 3


def test_without_pycocotools_a_sentence_says_how_to_get_it(encoders, compare, monkeypatch, capsys):
    importing = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pycocotools"):
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert compare("detection", "out", encoders[0], "--data", f"x={DATA}") == 2
    assert "pip install 'relicctl[detection]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--task", "segmentation", "A"], 2, "Missing --data"),
        (["--task", "panoptic", "A", "--data", f"x={DATA}"], 2, "no task 'panoptic'"),
        (["--task", "segmentation", "A", "--data", f"x={DATA}", "--labels", "0.1"], 2, "--labels has no effect"),
        (["--task", "detection", "A", "--data", f"x={DATA}", "--protocol", "knn"], 2, "--protocol has no effect"),
        (["--task", "detection", "A", "--data", f"x={DATA}", "--preset", "finetune-quick"], 2, "relicctl transfer`"),
        (["A", "--data", f"x={DATA}", "--preset", "segmentation-quick"], 2, "transfer --task segmentation`"),
        (["--task", "segmentation", "A", "A2", "--data", f"x={DATA}"], 2, "the same encoder"),
        (["--task", "segmentation", "pixels", "--data", f"x={DATA}"], 2, "no feature maps"),
        (["--task", "segmentation", "A", "--data", "x=nowhere"], 3, "nowhere"),
        (["--task", "detection", "A", "--data", "x=empty"], 3, "no train split"),
        (["--task", "segmentation", "A", "--data", f"x={DATA}", "--set", "crop.scale=[2, 1]"], 2, "crop.scale"),
        (["--task", "detection", "A", "--data", f"x={DATA}", "--set", "head.anchors=[8]"], 2, "head.anchors"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_gets_two_sentences_and_its_code(encoders, tmp_path, monkeypatch, capsys, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "copy.safetensors").write_bytes(Path(encoders[0]).read_bytes())
    names = {"A": encoders[0], "A2": "copy.safetensors"}
    assert relicctl(["transfer", *(names.get(a, a) for a in arguments), "--device", "cpu"]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err
    assert [line.split(":")[0].strip() for line in said.err.splitlines()[-2:]] == ["error", "fix"]


def test_a_dry_run_prints_the_config(encoders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "VOC2012").mkdir()
    told = ["--preset", "voc-segmentation", "--data", "voc=VOC2012", "--dry-run"]
    assert relicctl(["transfer", "--task", "segmentation", encoders[0], *told]) == 0
    said = capsys.readouterr().out
    assert said.startswith("command: transfer --task segmentation")
    assert "trainaug" in said
    assert not (tmp_path / "runs").exists()
