"""Images and config files that the cases work on, the same bytes every time."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from golden_lib.renames import Renames

CLASSES = ("cats", "dogs", "owls")
SHAPES = "shapes:train=48,val=32,size=32"
TINY: dict[str, Any] = {
    "extends": "demo",
    "model": {"width": 0.125, "projector": {"hidden": 32, "out": 16}, "predictor": {"hidden": 32, "out": 16}},
    "optim": {"batch_size": 16, "epochs": 2, "warmup_epochs": 1},
    "data": {"train": SHAPES, "val": SHAPES, "cache": "memory"},
    "eval": {"every_epochs": 1},
    "checkpoint": {"every_steps": 2, "every_minutes": None},
    "runtime": {"device": "cpu", "workers": 0, "precision": "fp32", "log_every": 2},
}
TINY_MASKS: dict[str, Any] = {
    "extends": "demo-bgmask",
    "model": {"size": 32},
    "labels": {"size": 32},
    "rounds": {"count": 1, "epochs": 1},
    "optim": {"epochs": 1, "batch_size": 8, "warmup_epochs": 0.5},
    "loss": {"f": 1.0},
    "data": {"train": SHAPES, "images": 24},
    "checkpoint": {"every_steps": 2, "every_minutes": None},
    "runtime": {"device": "cpu", "workers": 0, "precision": "fp32", "log_every": 1},
}


def make_inputs(work: Path, renames: Renames) -> None:
    """Fill ``work/data`` and ``work/configs``."""
    data, configs = work / "data", work / "configs"
    make_photos(data / "photos", count=12)
    pack_folder(data / "photos", data / "photos.zip", inside="all/")
    make_photos(data / "alpha", count=8, alpha=True)
    make_photos(data / "flawed", count=8)
    for name in ("cats/00.png", "owls/03.png"):
        (data / "flawed" / name).write_bytes(b"no picture")
    make_photos(data / "unreadable", count=4)
    for path in (data / "unreadable").rglob("*.*"):
        path.write_bytes(b"no picture")
    for seed, split in enumerate(("train", "val", "test"), 1):
        make_photos(data / "sets" / split, count=6, seed=seed)
        pack_folder(data / "sets" / split, data / f"sets-{split}.zip")
    make_segmentation(data / "segmentation")
    make_voc(data / "voc")
    make_coco(data / "coco")
    make_table(data / "table")
    (data / "empty").mkdir()
    (data / "note.txt").write_text("no images\n")
    (data / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    (data / "broken.safetensors").write_bytes(b"no weights")
    make_photos(data / "single", count=1, classes=("cats",))
    configs.mkdir()
    write_config(configs / "tiny.yaml", "pretrain", TINY, renames)
    write_config(configs / "masks.yaml", "train-bgmask", TINY_MASKS, renames)
    (configs / "broken.yaml").write_text("loss: {beta: 1\n")
    (configs / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (configs / "other.yaml").write_text("command: transfer\nseed: 1\n")


def write_config(path: Path, command: str, config: dict[str, Any], renames: Renames) -> None:
    """A config file of ``command`` under the keys of the tree that is recorded."""
    path.write_text(yaml.safe_dump(renames.translate_config(command, config), sort_keys=False))


def paint_photo(seed: int, kind: int, width: int = 44, height: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """A disc of the colour of its kind before noise, uint8 ``[H, W, 3]``, and where it is, bool ``[H, W]``."""
    random = np.random.default_rng([seed, kind])
    pixels = random.integers(0, 110, (height, width, 3), np.uint8)
    x, y, radius = random.integers(14, width - 14), random.integers(14, height - 14), random.integers(7, 13)
    rows, columns = np.ogrid[:height, :width]
    disc = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
    pixels[disc] = pixels[disc] // 3
    pixels[disc, kind] += 170
    return pixels, disc


def make_photos(
    folder: Path, *, count: int, seed: int = 0, alpha: bool = False, classes: tuple[str, ...] = CLASSES
) -> None:
    """``count`` images of each class, PNG and JPEG in turn; with ``alpha``, PNG whose alpha channel is the mask."""
    for kind, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels, disc = paint_photo(1000 * seed + number, kind, 44 + number)
            if alpha:
                pixels = np.dstack([pixels, disc.astype(np.uint8) * 255])
            ending = "png" if alpha or number % 2 == 0 else "jpg"
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.{ending}")


def pack_folder(folder: Path, archive: Path, inside: str = "") -> None:
    """A .zip of a folder's files, in the order of their names."""
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(folder.rglob("*.*")):
            entry = zipfile.ZipInfo(inside + path.relative_to(folder).as_posix())
            packed.writestr(entry, path.read_bytes())


def make_segmentation(folder: Path) -> None:
    """Images and masks of two splits, the disc's class being its kind."""
    for offset, split in enumerate(("train", "val")):
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True)
        for number in range(8 - 4 * offset):
            kind = number % 3
            pixels, disc = paint_photo(100 + 50 * offset + number, kind)
            Image.fromarray(pixels).save(folder / split / "images" / f"{number:02d}.jpg")
            Image.fromarray(disc.astype(np.uint8) * (kind + 1)).save(folder / split / "masks" / f"{number:02d}.png")


def find_box(disc: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a mask."""
    rows, columns = np.flatnonzero(disc.any(1)), np.flatnonzero(disc.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def make_voc(folder: Path) -> None:
    """VOC's layout: images with one or two named objects, some of them difficult."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for offset, (split, count) in enumerate({"train": 10, "val": 6, "test": 6}.items()):
        names = [f"{offset}{number:05d}" for number in range(count)]
        (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for number, name in enumerate(names):
            pixels, disc = paint_photo(200 + 50 * offset + number, number % 2)
            Image.fromarray(pixels).save(folder / f"JPEGImages/{name}.jpg")
            left, top, right, bottom = find_box(disc)
            box = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
            kinds = [(CLASSES[number % 2], 0)] + [(CLASSES[2], int(number == 3))] * (number % 3 == 0)
            objects = "".join(
                f"<object><name>{kind}</name><difficult>{hard}</difficult><bndbox>{box}</bndbox></object>"
                for kind, hard in kinds
            )
            size = f"<size><width>{pixels.shape[1]}</width><height>{pixels.shape[0]}</height></size>"
            (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")


def make_coco(folder: Path) -> None:
    """COCO's layout: one JSON for each split, images in a folder of its name."""
    (folder / "annotations").mkdir(parents=True)
    for offset, (split, count) in enumerate({"train": 8, "val": 4}.items()):
        (folder / split).mkdir()
        images, boxes = [], []
        for number in range(count):
            pixels, disc = paint_photo(300 + 50 * offset + number, number % 3)
            Image.fromarray(pixels).save(folder / split / f"{number:02d}.jpg")
            height, width = disc.shape
            left, top, right, bottom = find_box(disc)
            box = [left, top, right - left, bottom - top]
            images.append({"id": number, "file_name": f"{number:02d}.jpg", "width": width, "height": height})
            entry = {"id": number, "image_id": number, "category_id": number % 3 + 1, "bbox": box}
            boxes.append(entry | {"area": box[2] * box[3], "iscrowd": 0})
        categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (folder / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))


def make_table(folder: Path) -> None:
    """Images of any number of classes, told by labels.csv in each split."""
    for offset, (split, count) in enumerate({"train": 12, "val": 6, "test": 6}.items()):
        (folder / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            pixels, _ = paint_photo(400 + 50 * offset + number, number % 3)
            Image.fromarray(pixels).save(folder / split / f"{number:02d}.png")
            second = f";{CLASSES[(number + 1) % 3]}" if number % 2 else ""
            lines.append(f"{number:02d}.png,{CLASSES[number % 3]}{second}\n")
        (folder / split / "labels.csv").write_text("".join(lines))
