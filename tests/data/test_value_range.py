"""A white point reaches every command's pixels, and where one is missing it is said."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from relicctl.bgmask.data import open_bgmask_data
from relicctl.config.base import DecodingConfig
from relicctl.config.bgmask import BgmaskConfig
from relicctl.config.linear_eval import LinearEvalConfig
from relicctl.config.pretrain import PretrainConfig
from relicctl.config.transfer import SegmentationConfig, TransferConfig
from relicctl.console import Console
from relicctl.data.background_removal import AlphaMasks
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.datasets.open import open_dataset
from relicctl.data.value_range import warn_unused_range
from relicctl.evaluation.dense.segmentation_data import open_segmentation_data
from relicctl.evaluation.labelled_data import open_train_test
from relicctl.evaluation.transfer_data import open_transfer_dataset
from relicctl.pretraining.data import open_pretrain_data

WHITE = {"decoding": {"white_point": 4095.0}}
QUIET = Console(quiet=True)


@pytest.fixture
def photos(tmp_path):
    """Labelled photos of 12 bits in files of 16, with the splits and masks that the commands look for."""
    values = np.linspace(0, 4095, 256).reshape(16, 16).astype(np.uint16)
    for split in ("train", "test", "val"):
        for folder in ("a", "b", "images", "masks"):
            (tmp_path / split / folder).mkdir(parents=True)
            for number in range(3):
                file = tmp_path / split / folder / f"{number}.png"
                Image.fromarray((values > 2000).astype(np.uint8) if folder == "masks" else values).save(file)
    return tmp_path


def open_everywhere(root) -> dict[str, ImageDataset]:
    """The images of every command by its name."""
    train, test, named = f"{root}/train", f"{root}/test", {"datasets": {"x": str(root)}}
    pretrain = open_pretrain_data(PretrainConfig(data={"train": train, "val": test} | WHITE), False, QUIET)
    linear = open_train_test(LinearEvalConfig(data={"train": train, "val": test} | WHITE), False, QUIET)
    config = TransferConfig(data=named | WHITE)
    transfer = open_transfer_dataset("x", config, download=False, warn=QUIET.warn)
    masks = BgmaskConfig(data={"train": train, "mask_data": test, "eval": f"{root}/val"} | WHITE)
    bgmask = open_bgmask_data(masks, False)
    assert bgmask.truth is not None
    dense = open_segmentation_data("x", str(root), SegmentationConfig(data=named | WHITE).data, QUIET)
    return {
        "pretrain": pretrain.train, "pretrain --val": pretrain.val or pretrain.train, "linear-eval": linear[0].source,
        "linear-eval --val": linear[1].source, "transfer": transfer.trainval.source,
        "transfer test": transfer.test.source, "train-bgmask": bgmask.train,
        "--masks-for": bgmask.masks_for, "--eval-data": bgmask.truth.images,
        "segmentation": dense[0].source, "segmentation val": dense[1].source,
    }  # fmt: skip


def test_a_white_point_reaches_the_images_of_every_command(photos):
    for name, images in open_everywhere(photos).items():
        for source in (images, images.select([1]), AlphaMasks((0, 1)).get_image_source(images)):
            assert len(np.unique(source.load(0))) == 256, name


def test_other_pixels_of_the_same_files_are_another_data_set(photos):
    plain, white = open_dataset(f"{photos}/train"), open_everywhere(photos)["pretrain"]
    assert plain.load(0).max() == 16
    assert white.compute_fingerprint() != plain.compute_fingerprint()
    larger = open_dataset(f"{photos}/train", decoding=DecodingConfig(max_pixels=10**9))
    assert larger.compute_fingerprint() == plain.compute_fingerprint()


def find_warnings(images: ImageDataset) -> list[str]:
    warnings: list[str] = []
    warn_unused_range(images, warnings.append)
    return warnings


def save(folder, values) -> str:
    folder.mkdir(exist_ok=True)
    for number in range(3):
        Image.fromarray(values).save(folder / f"{number}.tif")
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "top", "said"),
    [
        (np.uint16, 4095, "white_point=4095"), (np.uint16, 1000, "white_point=1023"), (np.uint16, 60000, ""),
        (np.float32, 3000.5, "white_point=4095"), (np.float32, 1, ""), (np.int32, 16000, "white_point=16383"),
        (np.uint8, 3, ""), (np.uint16, 0, ""),
    ],
)  # fmt: skip
def test_a_range_that_is_hardly_used_is_said(tmp_path, kind, top, said):
    found = find_warnings(open_dataset(save(tmp_path / "photos", np.full((8, 8), top, kind))))
    assert len(found) == bool(said)
    assert all(said in text and "\n" not in text for text in found)


def test_a_white_point_that_is_too_low_is_said_and_a_right_one_is_not(photos):
    images = open_everywhere(photos)["pretrain"]
    assert not find_warnings(images)
    low = open_pretrain_data(
        PretrainConfig(data={"train": f"{photos}/train", "decoding": {"white_point": 99.0}}), False, QUIET
    )
    assert "becomes white" in find_warnings(low.train)[0]
