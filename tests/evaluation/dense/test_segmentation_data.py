"""Masks as they come: VOC's layout, folders, archives; and what is refused."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from relicctl.config.transfer import SegmentationDataConfig
from relicctl.console import Console
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.errors import DataError
from relicctl.evaluation.dense.segmentation_data import open_segmentation_data

PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [9] * 759


def mask(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 3, (20, 24)).astype(np.uint8)


def put(root: Path, images: str, masks: str, number: int, palette: bool = True) -> None:
    for folder in (images, masks):
        (root / folder).mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(root / images / f"{number:02d}.jpg")
    picture = Image.fromarray(mask(number))
    if palette:
        picture.putpalette(PALETTE)
    picture.save(root / masks / f"{number:02d}.png")


@pytest.fixture
def folders(tmp_path):
    root = tmp_path / "streets"
    for number in range(6):
        part = "val" if number > 3 else "train"
        put(root, f"{part}/images", f"{part}/masks", number, palette=number % 2 == 0)
    return root


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOC2012"
    for number in range(6):
        put(root, "JPEGImages", "SegmentationClass", number)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("03\n00\n\n01\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("05\n")
    return root


def opened(spec, **config):
    return open_segmentation_data("x", str(spec), SegmentationDataConfig(**config), Console(quiet=True))


def test_folders_with_palette_and_grey_masks(folders):
    train, val = opened(folders)
    assert (len(train), len(val)) == (4, 2)
    assert train.classes == ("0", "1", "2")
    for samples, first in ((train, 0), (val, 4)):
        for index in range(len(samples)):
            np.testing.assert_array_equal(samples.load_target(index), mask(first + index))
            assert samples.load(index).shape == (20, 24, 3)


def test_vocs_layout_with_its_lists_in_an_archive(voc, tmp_path):
    with zipfile.ZipFile(tmp_path / "voc.zip", "w") as archive:
        for path in voc.rglob("*.*"):
            archive.write(path, Path("dev") / path.relative_to(voc.parent))
    with tarfile.open(tmp_path / "voc.tar", "w") as archive:
        archive.add(voc, "./dev/VOC2012")
    for spec in (voc, f"{tmp_path}#VOC2012", *(f"{tmp_path}/voc.{kind}#dev/VOC2012" for kind in ("zip", "tar"))):
        train, val = opened(spec)
        assert train.classes[:2] == ("background", "aeroplane")
        assert len(train.classes) == 21
        assert [train.source.get_name(i) for i in range(len(train))] == ["03.jpg", "00.jpg", "01.jpg"]
        np.testing.assert_array_equal(train.load_target(0), mask(3))
        np.testing.assert_array_equal(val.load_target(0), mask(5))


def test_the_demo_data_have_a_class_where_the_object_is():
    train, val = opened("shapes:size=32,train=20,val=10")
    source = ShapesDataset.from_spec("shapes:size=32,train=20,val=10", "val")
    assert (len(train), len(val), len(val.classes)) == (20, 10, 11)
    for index in range(10):
        found = val.load_target(index)
        assert set(np.unique(found)) == {0, source.labels[index] + 1}
        np.testing.assert_array_equal(found > 0, source.load_mask(index))


def test_another_mask_is_another_fingerprint(folders):
    before = opened(folders)[0].compute_fingerprint()
    assert opened(folders)[0].compute_fingerprint() == before
    Image.fromarray(np.zeros((20, 24), np.uint8)).save(folders / "train/masks/00.png")
    assert opened(folders)[0].compute_fingerprint() != before


def spoilt(folders, what):
    train, val = folders / "train/masks/01.png", folders / "val/masks/04.png"
    if what == "missing":
        train.unlink()
    elif what == "size":
        Image.fromarray(np.zeros((24, 20), np.uint8)).save(train)
    elif what == "colour":
        Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(train)
    elif what == "beyond":
        Image.fromarray(np.full((20, 24), 3, np.uint8)).save(val)
    elif what == "wide":
        Image.fromarray(np.full((20, 24), 300, np.uint16)).save(train)
    elif what == "broken":
        train.write_bytes(train.read_bytes()[:40])
    elif what == "jpeg":
        train.unlink()
        Image.fromarray(mask(1)).save(train.with_suffix(".jpg"))
    elif what == "single":
        for path in folders.rglob("masks/*.png"):
            Image.fromarray(np.where(mask(0) > 1, 255, 0).astype(np.uint8)).save(path)
    elif what == "no val":
        (folders / "val").rename(folders / "other")
    else:
        (folders / "train/masks").rename(folders / "train/labels")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("missing", "lacks the mask of 01"),
        ("size", "20 x 24, image 24 x 20"),
        ("colour", "image of 3 channels"),
        ("beyond", "beyond its 3 classes: 04.png with 3"),
        ("wide", "class index 300"),
        ("broken", "01.png cannot be read"),
        ("jpeg", "01.jpg cannot be read"),
        ("single", "hold only the values 0 and 255"),
        ("no val", "no val split"),
        ("no masks", "has no folder train/masks"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(folders, what, says):
    spoilt(folders, what)
    with pytest.raises(DataError) as refused:
        opened(folders)
    assert says in refused.value.what


def test_255_is_no_class_and_a_given_number_is_held_to(folders):
    Image.fromarray(np.full((20, 24), 255, np.uint8)).save(folders / "train/masks/01.png")
    assert len(opened(folders)[0].classes) == 3
    with pytest.raises(DataError, match="beyond its 2 classes"):
        opened(folders, classes={"x": 2})
    assert len(opened(folders, classes={"x": 5, "y": 2})[0].classes) == 5


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_an_image_turned_by_its_exif_goes_with_an_upright_mask(folders, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    (folders / "train/images/00.jpg").unlink()
    Image.fromarray(np.zeros((24, 20, 3), np.uint8)).save(folders / f"train/images/00.{suffix}", exif=exif)
    train, _ = opened(folders)
    assert train.load(0).shape[:2] == train.load_target(0).shape


def test_a_mask_turned_by_its_exif_stands_upright(folders):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(mask(0)).copy()).save(folders / "train/masks/00.png", exif=exif)
    np.testing.assert_array_equal(opened(folders)[0].load_target(0), mask(0))


@pytest.mark.parametrize("largest", [2, 20, 255, 4000, 65535])
def test_a_pgm_has_the_indices_of_its_file_whatever_it_calls_white(folders, largest):
    kind = ">u2" if largest > 255 else "u1"
    (folders / "train/masks/00.png").unlink()
    header = f"P5 24 20 {largest}\n".encode()
    (folders / "train/masks/00.pgm").write_bytes(header + mask(0).astype(kind).tobytes())
    np.testing.assert_array_equal(opened(folders)[0].load_target(0), mask(0))


def draw_masks(folders, draw) -> None:
    """Draw every mask anew from a disc: bool [20, 24]."""
    y, x = np.mgrid[:20, :24]
    for number, path in enumerate(sorted(folders.rglob("masks/*.png"))):
        Image.fromarray(draw((y - 10) ** 2 + (x - 12) ** 2 < (5 + number) ** 2)).save(path)


def blur(disc: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(disc.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(1)))


def to_255(disc: np.ndarray) -> np.ndarray:
    return disc.astype(np.uint8) * 255


@pytest.mark.parametrize("config", [{}, {"classes": {"x": 2}}, {"classes": {"x": 256}}])
def test_masks_of_0_and_255_are_recognised_and_their_key_is_named(folders, config):
    draw_masks(folders, to_255)
    with pytest.raises(DataError, match="0 and 255") as refused:
        opened(folders, **config)
    assert "data.mask_values={x: {0: 0, 255: 1}}" in refused.value.fix


def test_vocs_masks_of_0_and_255_are_recognised_too(voc):
    for path in (voc / "SegmentationClass").iterdir():
        Image.fromarray(to_255(mask(0) > 1)).save(path)
    with pytest.raises(DataError, match="0 and 255"):
        opened(voc)
    train, _ = opened(voc, mask_values={"x": {0: 0, 255: 1}}, classes={"x": 2})
    np.testing.assert_array_equal(train.load_target(0), mask(0) > 1)


def test_shades_between_0_and_255_are_not_taken_for_classes(folders):
    draw_masks(folders, blur)
    with pytest.raises(DataError, match="shades") as refused:
        opened(folders)
    assert "data.mask_values={x: {0: 0, 255: 1}}" in refused.value.fix
    with pytest.raises(DataError, match="beyond its 2 classes") as beyond:
        opened(folders, classes={"x": 2})
    assert "data.mask_values" in beyond.value.fix
    train, val = opened(folders, mask_values={"x": {0: 0, 255: 1}})
    assert train.classes == val.classes == ("0", "1")
    disc, ignored = train.load_target(0) == 1, train.load_target(0) == 255
    assert 0 < disc.sum() < (disc | ignored).sum() < 240


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_mask_values_are_mapped_to_classes(folders, kind):
    before = opened(folders)[0].compute_fingerprint()
    draw_masks(folders, lambda disc: np.where(disc, 128, 200).astype(kind))
    values = {200: 0, 128: 1}
    train, val = opened(folders, mask_values={"x": values, "y": {}})
    assert train.classes == ("0", "1")
    assert set(np.unique(train.load_target(0))) == set(np.unique(val.load_target(0))) == {0, 1}
    assert train.load_target(0)[10, 12] == 1
    other = opened(folders, mask_values={"x": {200: 1, 128: 0}})[0]
    assert other.load_target(0)[10, 12] == 0
    assert len({before, train.compute_fingerprint(), other.compute_fingerprint()}) == 3
    assert len(opened(folders, mask_values={"x": values}, classes={"x": 7})[0].classes) == 7


def find_warnings(folders, **config) -> list[str]:
    console = Console(quiet=True)
    warnings: list[str] = []
    console.warn = warnings.append  # type: ignore[method-assign]
    open_segmentation_data("x", str(folders), SegmentationDataConfig(**config), console)
    return warnings


def test_values_that_may_be_no_classes_are_told_once_and_usual_masks_are_not(folders):
    assert not find_warnings(folders)
    draw_masks(folders, lambda disc: disc.astype(np.uint8) * 128)
    (told,) = find_warnings(folders)
    assert "129 classes" in told
    assert "data.mask_values" in told
    assert not find_warnings(folders, classes={"x": 150})
    draw_masks(folders, lambda disc: np.where(np.roll(disc, 2, 1) & disc, 255, disc).astype(np.uint8))
    (told,) = find_warnings(folders)
    assert "255, which is ignored" in told
    assert "data.mask_values" in told


def test_splits_in_any_case_and_names_composed_otherwise_are_found(folders):
    for part, other in (("train", "Training"), ("val", "Validation")):
        (folders / part).rename(folders / other)
        first = min((folders / other / "images").iterdir())
        mask = next((folders / other / "masks").glob(f"{first.stem}.*"))
        first.rename(first.with_name(f"café{first.suffix}"))
        mask.rename(mask.with_name(f"cafe\u0301{mask.suffix}"))
    train, val = opened(folders)
    assert (len(train), len(val.masks)) == (4, 2)
