"""True masks: found beside their images, checked before anything is measured, refused with a reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relicctl.bgmask.data import open_ground_truth
from relicctl.data.datasets.open import open_dataset
from relicctl.errors import DataError


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Five photos of different sizes, and their masks in the formats that data sets use."""
    root, generator = tmp_path / "pairs", np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(5):
        shape = 10 + number, 16
        Image.fromarray(generator.integers(0, 256, (*shape, 3), np.uint8)).save(root / "images" / f"{number}.png")
        mask = np.zeros(shape, dtype=np.uint8)
        mask[2 : 4 + number, 3:9] = 255
        if number == 1:
            Image.fromarray(mask).convert("1").save(root / "masks" / "1.bmp")
        elif number == 2:
            Image.fromarray(mask).save(root / "masks" / "2.jpg", quality=95)
        elif number == 3:
            Image.fromarray(mask // 255).save(root / "masks" / "3.png")  # class numbers 0 and 1
        else:
            Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return root


@pytest.mark.parametrize("packed", [False, True])
def test_every_image_has_the_mask_of_its_name(pairs, packed):
    spec = shutil.make_archive(str(pairs), "zip", pairs) if packed else str(pairs)
    truth = open_ground_truth(spec, 100, 0)
    assert len(truth.images) == 5
    for index in range(5):
        number = int(truth.images.get_name(index)[0])
        mask = truth.load_mask(index)
        assert mask.dtype == bool
        assert mask.shape == truth.images.load(index).shape[:2] == (10 + number, 16)
        expected = np.zeros_like(mask)
        expected[2 : 4 + number, 3:9] = True
        np.testing.assert_array_equal(mask, expected)


def test_a_folder_inside_is_named_as_everywhere(pairs, tmp_path):
    spec = shutil.make_archive(str(tmp_path / "outer"), "zip", tmp_path, "pairs")
    assert len(open_ground_truth(f"{spec}#pairs", 100, 0).images) == 5


def test_the_sample_has_the_given_size_and_depends_on_the_seed_alone(pairs):
    few = open_ground_truth(str(pairs), 2, 3)
    names = [few.images.get_name(index) for index in range(2)]
    assert names == sorted(names)
    assert names == [open_ground_truth(str(pairs), 2, 3).images.get_name(index) for index in range(2)]
    for index, name in enumerate(names):
        assert few.load_mask(index).shape[0] == 10 + int(name[0])


def test_the_demo_data_bring_the_masks_of_their_test_split():
    truth = open_ground_truth("shapes:size=24,val=30", 12, 0)
    everything = open_dataset("shapes:size=24,val=30", split="val")
    rows = {everything.get_name(index): index for index in range(30)}
    assert len(truth.images) == 12
    for index in range(12):
        row = rows[truth.images.get_name(index)]
        np.testing.assert_array_equal(truth.load_mask(index), everything.load_mask(row))


def refusal(spec: Path | str) -> str:
    with pytest.raises(DataError) as refused:
        open_ground_truth(str(spec), 100, 0)
    assert refused.value.fix.endswith(".")
    return refused.value.what


def test_what_cannot_be_measured_on_is_refused_with_a_reason(pairs):
    assert "has no folder images" in refusal(pairs / "images")
    mask = pairs / "masks" / "0.png"
    whole = mask.read_bytes()

    Image.new("L", (5, 5)).save(mask)
    assert refusal(pairs) == "The true mask of 0.png has 5 x 5 pixels, its image 16 x 10."
    mask.write_bytes(whole[:60])
    assert "true mask 0.png" in refusal(pairs)
    mask.write_bytes(whole)

    (pairs / "masks" / "spare.png").write_bytes(whole)
    assert "1 masks" in refusal(pairs)
    assert "spare" in refusal(pairs)
    (pairs / "masks" / "spare.png").unlink()

    (pairs / "images" / "0.png").write_bytes(b"no picture")
    assert "image 0.png" in refusal(pairs)

    mask.unlink()
    assert "1 of 5 images" in refusal(pairs)
    assert "0.png" in refusal(pairs)
    shutil.rmtree(pairs / "masks")
    assert "has no folder masks" in refusal(pairs)
    assert "There is no" in refusal(pairs / "nowhere")


@pytest.mark.realdata
def test_real_pairs_are_whole(realdata_dir):
    truth = open_ground_truth(str(realdata_dir / "ecssd-dev.zip"), 1000, 0)
    assert len(truth.images) == 200
    shares = [truth.load_mask(index).mean() for index in range(200)]
    assert 0.15 < np.mean(shares) < 0.35
