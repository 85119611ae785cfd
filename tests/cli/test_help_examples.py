"""Every example in the help runs: for real, in a folder that holds the files it names, on few and small images."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from relicctl import cli
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.doctor.environment import CheckResult

DATA = "shapes:size=32,train=24,val=16"
SMALL_NETWORK = [
    "model.arch=resnet18", "model.width=0.125", "model.projector.hidden=16", "model.projector.out=8",
    "model.predictor.hidden=16", "model.predictor.out=8", "views.large.count=2", "views.large.size=32",
    "views.small.count=1", "views.small.size=16", "loss.negatives=4", "optim.batch_size=8",
]  # fmt: skip
FEW_STEPS = ["optim.epochs=1", "optim.warmup_epochs=0"]
# What is appended to the examples of a command, so that it ends soon: options, and keys for --set.
APPENDED: dict[str, tuple[list[str], list[str]]] = {
    "pretrain": (["--data", DATA, "--val", DATA], [*SMALL_NETWORK, *FEW_STEPS, "optim.max_steps=2"]),
    "train-bgmask": ([], ["model.size=32", "labels.size=32", "optim.batch_size=2", *FEW_STEPS]),
    "linear-eval": ([], ["optim.epochs=1"]),
    "transfer": ([], []),
    "bench": (["--batch", "4", "--repeats", "1"], SMALL_NETWORK),
    "export": ([], []),
    "doctor": ([], []),
    "presets": ([], []),
}
# The same for one example, by a text in it.
FOR_ONE = {
    "doctor --preset": ["--set", "optim.batch_size=16"],
    "demo-bgmask": ["--data", DATA, "--set", "data.max_eval_images=4"],
    "byol-suite": ["--data", f"shapes={DATA}"],
    "torchvision:resnet50": ["--set", "eval.size=32"],
    "--analysis": ["--set", "analysis.images=16"],
    "linear-imagenet": ["--set", "optim.batch_size=4"],
    "cifar10-r18 --set": ["--data", DATA],
    "finetune-quick": ["--set", "finetune.steps=2", "--set", "finetune.batch_size=8"],
    "segmentation": ["--set", "optim.steps=2", "--set", "crop.size=32", "--set", "head.channels=8"],
    "detection": ["--set", "optim.steps=2", "--set", "optim.batch_size=2", "--set", "images.min_size=[32]",
                  "--set", "head.channels=8", "--set", "head.hidden=16"],
}  # fmt: skip


def list_examples() -> list[str]:
    modules = ("pretrain", "train_bgmask", "linear_eval", "transfer", "export", "bench", "doctor")
    texts = [importlib.import_module(f"relicctl.cli.{name}").EXAMPLES for name in modules]
    texts += [cli.app.info.epilog, cli.presets.app.info.epilog]
    return list(dict.fromkeys(line for text in texts for line in re.findall(r"^ +(relicctl .*)$", text, re.M)))


def shorten_command(words: list[str]) -> list[str]:
    """The command on fewer and smaller demo images, with options that make it short."""
    words = [re.sub("^(|.*=)shapes(:|$)", rf"\1{DATA},", word).rstrip(",") for word in words]
    text = " ".join(words)
    options, keys = APPENDED[words[0]]
    sets = [word for key in keys for word in ("--set", key)]
    more = [word for part, appended in FOR_ONE.items() if part in text for word in appended]
    if "--resume" in words:  # the run has its settings
        options, sets, more = [], [], []
    if words[0] == "doctor" and not torch.cuda.is_available():
        more = [*more, "--device", "cpu"]
    workers = ["--workers", "0"] if words[0] in ("pretrain", "train-bgmask", "linear-eval", "transfer", "bench") else []
    return [*words, *options, *sets, *more, *workers]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files and runs that the examples name."""
    root = tmp_path_factory.mktemp("workspace")
    images = ShapesDataset.from_spec(DATA, "train")
    pixels = [images.load(index) for index in range(len(images))]

    def write_folder(folder: Path, count: int) -> None:
        for index in range(count):
            path = root / folder / f"class{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index % len(pixels)]).save(path)

    def pack(name: str) -> None:
        shutil.make_archive(str(root / name), "zip", root / name)

    for folder in ("birds", "dtd", "imagenet"):
        for part, count in (("train", 80 if folder == "dtd" else 12), ("val", 8), ("test", 8)):
            write_folder(Path(folder) / part, count)
    for folder, count in (("pets-train", 12), ("pets-test", 12), ("photos", 16), ("more", 4)):
        write_folder(Path(folder), count)
    for index in range(4):
        for kind, content in (("images", pixels[index]), ("masks", images.load_mask(index).astype(np.uint8) * 255)):
            (root / "ecssd" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(root / "ecssd" / kind / f"{index}.png")
    for name in ("photos", "birds", "dtd", "pets-train", "pets-test", "ecssd"):
        pack(name)
    write_voc(root / "VOCdevkit" / "VOC2012", pixels[:8])
    write_coco(root / "coco", pixels[:8])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        tiny = shorten_command(["pretrain", "--preset", "demo"])
        for name, seed in (("demo", "0"), ("b", "1")):
            assert cli.run([*tiny, "--quiet", "--out", f"runs/{name}", "--seed", seed]) == 0
        for name in ("a", "short"):
            shutil.copytree(root / "runs/demo", root / "runs" / name)
        exportable = ["--set", "model.width=1.0", "--set", "model.stem=imagenet"]
        assert cli.run([*tiny, *exportable, "--quiet", "--out", "runs/r50"]) == 0
        classify = ["linear-eval", "runs/r50", "--set", "optim.epochs=1", "--quiet"]
        assert cli.run(classify) == 0
        masks = shorten_command(["train-bgmask", "--preset", "u2netp", "--data", "more"])
        assert cli.run([*masks, "--quiet", "--out", "runs/u2netp"]) == 0
        compare = ["transfer", "runs/a", "--data", f"shapes={DATA}", "--protocol", "knn", "--quiet"]
        assert cli.run([*compare, "--out", "runs/transfer"]) == 0
    weights = root / "torch" / "hub" / "checkpoints" / "resnet50-0676ba61.pth"
    weights.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet50().state_dict(), weights)
    return root


def link_or_copy(source: str, target: str) -> None:
    """Copy a small file; weights, which are replaced and never written into, are linked."""
    if source.endswith((".safetensors", ".pth")):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def write_voc(folder: Path, pixels: list[np.ndarray]) -> None:
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"JPEGImages/{index}.jpg")
        Image.fromarray((image[..., 0] > 127).astype(np.uint8)).save(folder / f"SegmentationClass/{index}.png")
    for part, images in (("train", range(6)), ("val", range(6, 8))):
        (folder / f"ImageSets/Segmentation/{part}.txt").write_text("".join(f"{index}\n" for index in images))


def write_coco(folder: Path, pixels: list[np.ndarray]) -> None:
    for part in ("train2017", "val2017"):
        (folder / part).mkdir(parents=True)
        for index, image in enumerate(pixels):
            Image.fromarray(image).save(folder / part / f"{index}.jpg")
        side = len(pixels[0])
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg", "width": side, "height": side} for i in range(len(pixels))],
            "annotations": [
                {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [4, 4, 16, 16], "area": 256, "iscrowd": 0}
                for i in range(len(pixels))
            ],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.parametrize("line", list_examples())
def test_an_example_in_the_help_runs(
    line: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(workspace, folder, copy_function=link_or_copy)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setattr("relicctl.benchmark.hardware_limits.MATMUL_SIZE", {"cpu": 64})
    # Two processes under torchrun take long; tests/commands/test_doctor.py starts them.
    monkeypatch.setattr("relicctl.doctor.smoke_tests.check_processes", lambda _: CheckResult("ok", "left out"))
    out = ""
    if given := re.search(r"--out (runs/\S+)", line):
        shutil.rmtree(folder / given[1], ignore_errors=True)
    for stage in line.split(" | "):
        monkeypatch.setattr("sys.stdin", io.StringIO(out))
        code = cli.run(shorten_command(shlex.split(stage)[1:]))
        printed = capsys.readouterr()
        assert code == 0, f"{stage}: {printed.err}"
        out = printed.out
    assert out
