"""The script that pastes foregrounds onto other images' backgrounds: what stays, what changes, which classes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from relicctl.data.datasets.open import open_dataset
from relicctl.data.mask_bank import MASK_SIDE, MaskBankWriter
from tests.helpers.scripts import load_benchmark

BACKGROUNDS = {"cat": (200, 40, 40), "dog": (40, 40, 200)}
SIDE, LEFT, RIGHT = 96, 36, 60  # the foreground is the square from LEFT to RIGHT


@pytest.fixture(scope="module")
def mixed_backgrounds() -> ModuleType:
    return load_benchmark("mixed_backgrounds")


def make_photos(folder: Path, per_class: int) -> None:
    """Two classes, told apart by their background; each image has a foreground of its own grey level."""
    for number, (name, background) in enumerate(BACKGROUNDS.items()):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            photo = np.full((SIDE, SIDE, 3), background, dtype=np.uint8)
            photo[LEFT:RIGHT, LEFT:RIGHT] = 20 + 60 * index + 20 * number
            Image.fromarray(photo).save(folder / name / f"{index}.png")


def make_bank(path: Path, photos: Path, empty: int | None = None) -> None:
    """The true masks, that of image ``empty`` without foreground."""
    images = open_dataset(str(photos))
    mask = np.zeros((MASK_SIDE, MASK_SIDE), dtype=bool)
    low, high = (round(edge * MASK_SIDE / SIDE) for edge in (LEFT, RIGHT))
    mask[low:high, low:high] = True
    with MaskBankWriter(path, images, made_by="test") as bank:
        for index in range(len(images)):
            bank.write_mask(index, mask & (index != empty))


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["mixed_backgrounds.py", *arguments])
    module.main()


def test_foregrounds_stay_and_backgrounds_change(
    mixed_backgrounds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_photos(tmp_path / "photos", per_class=3)
    make_bank(tmp_path / "masks.bank", tmp_path / "photos", empty=4)
    out = tmp_path / "mixed"
    run(
        mixed_backgrounds,
        monkeypatch,
        str(tmp_path / "photos"),
        "--masks",
        str(tmp_path / "masks.bank"),
        "--out",
        str(out),
    )

    assert json.loads((out / "summary.json").read_text())["written"] == 5, "the image without a mask is left out"
    for kind, own_background in (("original", True), ("same", True), ("random", False)):
        for name, background in BACKGROUNDS.items():
            other = next(colour for key, colour in BACKGROUNDS.items() if key != name)
            for path in (out / kind / name).iterdir():
                photo = np.asarray(Image.open(path)).astype(int)
                original = np.asarray(Image.open(out / "original" / name / path.name)).astype(int)
                expected = np.array(background if own_background else other)
                assert np.abs(photo[4:20, 4:20] - expected).max() < 6, f"{path}: the corner"
                assert np.abs(photo[44:52, 44:52] - original[44:52, 44:52]).max() < 6, f"{path}: the object"
                assert np.abs(photo[:, 20:30] - expected).max() < 6, f"{path}: no trace of the background's own object"


def test_data_without_classes_are_refused(
    mixed_backgrounds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_photos(tmp_path / "photos", per_class=2)
    (tmp_path / "flat").mkdir()
    for index, path in enumerate(sorted((tmp_path / "photos").rglob("*.png"))):
        path.rename(tmp_path / "flat" / f"{index}.png")
    make_bank(tmp_path / "masks.bank", tmp_path / "flat")
    with pytest.raises(SystemExit, match="has no classes"):
        run(
            mixed_backgrounds, monkeypatch,
            str(tmp_path / "flat"), "--masks", str(tmp_path / "masks.bank"), "--out", str(tmp_path / "mixed"),
        )  # fmt: skip
    assert not (tmp_path / "mixed").exists()
