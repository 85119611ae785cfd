"""True masks: found beside their images, checked before anything is measured, refused with a reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relicctl.bgmask.data import open_ground_truth
from relicctl.console import Console
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


def draw_true_masks(pairs: Path, draw) -> list[np.ndarray]:
    """Draw every true mask anew by ``draw`` from where the object is; return that, bool [H, W] each."""
    objects = []
    for number in range(5):
        inside = np.zeros((10 + number, 16), dtype=bool)
        inside[2 : 4 + number, 3:9] = True
        for old in (pairs / "masks").glob(f"{number}.*"):
            old.unlink()
        image = draw(inside)
        image.save(pairs / "masks" / f"{number}.{'tif' if image.mode == 'F' else 'png'}")
        objects.append(inside)
    return objects


def with_void(inside: np.ndarray, index: int) -> np.ndarray:
    """An object of a class index, with a strip at its border that is ignored."""
    values = inside.astype(np.uint8) * np.uint8(index)
    values[1] = 255
    return values


def to_palette(inside: np.ndarray) -> Image.Image:
    """VOC's colours: those of cat (8) are dark, those of ignored pixels (255) bright."""
    image = Image.fromarray(with_void(inside, 8))
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[8], palette[255] = (64, 0, 0), (224, 224, 192)
    image.putpalette(palette.ravel().tolist())
    return image


@pytest.mark.parametrize(
    "draw",
    [
        lambda inside: Image.fromarray(inside.astype(np.uint8) * 3),
        lambda inside: Image.fromarray(inside.astype(np.uint8) * np.where(np.arange(16) < 6, 7, 20).astype(np.uint8)),
        lambda inside: Image.fromarray(with_void(inside, 100)),
        lambda inside: Image.fromarray(inside.astype(np.uint16) * 3),
        lambda inside: Image.fromarray(inside.astype(np.uint16) * 255),
        lambda inside: Image.fromarray(inside.astype(np.uint16) * 65535),
        lambda inside: Image.fromarray(inside.astype(np.float32)),
        to_palette,
        lambda inside: to_palette(inside) if len(inside) % 2 else Image.fromarray(inside.astype(np.uint8) * 8),
        lambda inside: to_palette(inside) if len(inside) % 2 else Image.fromarray(inside),
    ],
    ids=[
        "index",
        "indices",
        "index and void",
        "16 bits",
        "255 of 16",
        "white of 16",
        "fraction",
        "palette",
        "palette and index",
        "palette and bits",
    ],
)
def test_class_indices_are_objects_whatever_they_are(pairs, draw):
    objects = draw_true_masks(pairs, draw)
    truth = open_ground_truth(str(pairs), 100, 0)
    for index, inside in enumerate(objects):
        np.testing.assert_array_equal(truth.load_mask(index), inside)


@pytest.mark.parametrize("largest", [1, 20, 255, 65535])
def test_a_pgm_of_class_indices_is_read_as_they_are(pairs, largest):
    objects = draw_true_masks(pairs, lambda inside: Image.fromarray(inside.astype(np.uint8)))
    kind, index = ">u2" if largest > 255 else "u1", min(largest, 3)
    for number, inside in enumerate(objects):
        (pairs / f"masks/{number}.png").unlink()
        header = f"P5 16 {len(inside)} {largest}\n".encode()
        (pairs / f"masks/{number}.pgm").write_bytes(header + (inside * index).astype(kind).tobytes())
    truth = open_ground_truth(str(pairs), 100, 0)
    for number, inside in enumerate(objects):
        np.testing.assert_array_equal(truth.load_mask(number), inside)


def test_soft_masks_are_cut_at_half(pairs):
    shades = np.arange(16, dtype=np.uint8) * 17
    draw_true_masks(pairs, lambda inside: Image.fromarray(np.tile(shades // 2 + 20, (len(inside), 1))))
    truth = open_ground_truth(str(pairs), 100, 0)
    np.testing.assert_array_equal(truth.load_mask(0), np.tile(shades // 2 + 20 > 127, (10, 1)))


def test_what_is_read_as_indices_or_empty_is_told_and_nothing_but_empty_masks_is_refused(pairs, capsys):
    draw_true_masks(pairs, lambda inside: Image.fromarray(inside.astype(np.uint8) * (len(inside) != 12) * 3))
    open_ground_truth(str(pairs), 100, 0, Console())
    told = capsys.readouterr().err
    assert "class indices (up to 3)" in told
    assert "1 of 5 true masks" in told
    assert "2.png" in told
    draw_true_masks(pairs, lambda inside: Image.fromarray(inside.astype(np.uint8) * 0))
    assert "are empty" in refusal(pairs)


def test_usual_true_masks_need_no_word(pairs, capsys):
    open_ground_truth(str(pairs), 100, 0, Console())
    assert capsys.readouterr().err == ""


@pytest.mark.realdata
def test_real_pairs_are_whole(realdata_dir):
    truth = open_ground_truth(str(realdata_dir / "ecssd-dev.zip"), 1000, 0)
    assert len(truth.images) == 200
    shares = [truth.load_mask(index).mean() for index in range(200)]
    assert 0.15 < np.mean(shares) < 0.35
