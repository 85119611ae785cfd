"""Background removal: a masked view is the crop of the filled image, drawn independently, the same on every road."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from relicctl.core.counter_rng import Stream, draw_uniform
from relicctl.core.distributed import World
from relicctl.data.background_removal import (
    FILL_COLORS,
    AlphaMasks,
    BackgroundFill,
    BackgroundRemoval,
    BankMasks,
    resize_mask,
)
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.crops import crop_on_host
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.datasets.open import open_dataset
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.decoding import BadImages, decode_rgb
from relicctl.data.loader import LoaderConfig, ViewLoader, resolve_cache
from relicctl.data.mask_bank import MaskBank, MaskBankWriter
from relicctl.data.photometric import AugmentConfig
from relicctl.data.sampler import DrawKey, Sampler
from relicctl.data.views import CropSpec, ViewSpec, draw_view_boxes

LIMITS = (0.01, 0.99)
COUNT, BATCH = 24, 8
STILL = AugmentConfig(hflip_prob=0, color_jitter_prob=0, grayscale_prob=0, blur_prob=(0, 0), solarize_prob=(0, 0))
PLAN = ViewSpec((CropSpec(3, 24, (0.3, 1.0)), CropSpec(2, 16, (0.05, 0.3))), (3 / 4, 4 / 3), STILL)


class Photos(ImageDataset):
    """Noise of many sizes, or of one; sample 5 is broken if so wished."""

    spec = "photos"

    def __init__(self, one_size: bool = False, broken: bool = False) -> None:
        self._one_size, self._broken = one_size, broken

    def __len__(self) -> int:
        return COUNT

    def get_name(self, index: int) -> str:
        return f"{index}.png"

    def read(self, index: int) -> bytes | np.ndarray:
        if self._broken and index == 5:
            return b"broken"
        rng = np.random.default_rng(index)
        shape = (60, 44) if self._one_size else rng.integers(24, 90, 2).tolist()
        return rng.integers(0, 256, (*shape, 3), dtype=np.uint8)


def mask_of(index: int) -> np.ndarray:
    """Of sample 3 empty, of sample 4 full, else blocks: neighbouring crops see different backgrounds."""
    if index in (3, 4):
        return np.full((128, 128), index == 4)
    blocks = np.random.default_rng(1000 + index).random((16, 16)) < 0.5
    return blocks.repeat(8, 0).repeat(8, 1)


def usable(index: int) -> bool:
    return index not in (3, 4)


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> MaskBank:
    path = tmp_path_factory.mktemp("run") / "masks.bank"
    with MaskBankWriter(path, Photos(), made_by="a test") as writer:
        for index in range(COUNT):
            writer.write_mask(index, mask_of(index))
    return MaskBank.open(path)


def masking_of(
    bank: MaskBank, probability: float = 0.4, fill: str = "mean", source: ImageDataset | None = None
) -> BackgroundRemoval:
    return BackgroundRemoval(BankMasks(bank, bank.find_rows(source or Photos()), LIMITS), probability, fill)  # type: ignore[arg-type]


def feed_of(
    source: ImageDataset, masking: BackgroundRemoval | None, cache: str = "none", workers: int = 0, **more
) -> ViewLoader:
    config = LoaderConfig(7, torch.device("cpu"), cache=cache, workers=workers, **more)
    return ViewLoader(source, Sampler(7, len(source), BATCH), PLAN, config, BadImages(len(source), 0.5), masking)


def views_of(feed: ViewLoader, step: int = 0, stop: int = 6) -> list[torch.Tensor]:
    """In [0, 255], per size [steps, V, B, 3, s, s]."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    batches = [batch.views for batch in feed.iter_from_step(step, stop)]
    return [255 * (torch.stack(size) * std + mean) for size in zip(*batches, strict=True)]


# The law: fill the background of the whole image, then crop.


def literal(image: np.ndarray, mask: np.ndarray, fill: tuple[int, ...] | np.ndarray) -> np.ndarray:
    """Pixel by pixel: its background is what the mask says at the pixel's centre."""
    height, width = image.shape[:2]
    filled = image.copy()
    for y in range(height):
        for x in range(width):
            row, column = int((y + 0.5) * mask.shape[0] / height), int((x + 0.5) * mask.shape[1] / width)
            if not mask[row, column]:
                filled[y, x] = fill[y, x] if isinstance(fill, np.ndarray) else fill
    return filled


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([(128, 128), (5, 9)]), st.randoms())
def test_a_crop_edited_is_the_crop_of_the_filled_image(height, width, shape, random):
    rng = np.random.default_rng(random.randrange(2**32))
    image, mask = rng.integers(0, 256, (height, width, 3), dtype=np.uint8), rng.random(shape) < 0.6
    left, top = random.randrange(width), random.randrange(height)
    w, h = random.randint(1, width - left), random.randint(1, height - top)
    for fill in ((124, 116, 104), rng.integers(0, 256, image.shape, dtype=np.uint8)):
        filled = literal(image, mask, fill)
        crop = image[top : top + h, left : left + w].copy()
        BackgroundFill(mask, height, width, np.array(fill, dtype=np.uint8))(crop, left, top)
        assert np.array_equal(crop, filled[top : top + h, left : left + w])
    assert np.array_equal(resize_mask(mask, height, width), (literal(0 * image + 1, mask, (0, 0, 0)) == 1)[..., 0])


@pytest.mark.parametrize("fill", ["mean", "gray", "noise"])
def test_a_batch_is_a_literal_loop_over_samples_and_views(bank, fill):
    """Large views that drew a mask are cut from the filled image, all others and all small ones from the image."""
    source, masking = Photos(), masking_of(bank, fill=fill)
    large, small = views_of(feed_of(source, masking))
    sampler, masked = Sampler(7, COUNT, BATCH), 0
    for step in range(6):
        epoch, samples = sampler.get_epoch(step), sampler.get_batch_indices(step)
        for row, sample in enumerate(samples.tolist()):
            image = source.load(sample)
            height, width = image.shape[:2]
            key = DrawKey(7, epoch, np.array([sample]))
            boxes = draw_view_boxes(PLAN, key, np.array([[height, width]]))
            for view in range(3):
                shown = image
                if draw_uniform(7, Stream.MASK, epoch, sample, view, n=1)[0] < 0.4 and usable(sample):
                    colour = masking.make_fill_values(key[0], view, height, width)
                    shown = literal(image, mask_of(sample), colour if fill == "noise" else tuple(colour))
                    masked += 1
                expected = crop_on_host(shown, boxes[0][0, view][None], 24)[0]
                np.testing.assert_allclose(large[step, view, row].permute(1, 2, 0), expected, atol=1e-3)
            expected = crop_on_host(image, boxes[1][0], 16)
            np.testing.assert_allclose(small[step, :, row].permute(0, 2, 3, 1), expected, atol=1e-3)
    assert 20 < masked < 6 * BATCH * 3 * 0.6


def test_what_the_background_becomes():
    assert FILL_COLORS["mean"].tolist() == [124, 116, 104]
    assert (
        np.abs((FILL_COLORS["mean"] / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)).max() < 0.01
    )  # 0 after normalising
    assert FILL_COLORS["gray"].tolist() == [128] * 3
    masking = BackgroundRemoval(AlphaMasks(LIMITS), 0.5, "noise")
    noise = masking.make_fill_values(DrawKey(0, 0, np.array(1)), 0, 101, 203)
    assert noise.shape == (101, 203, 3)
    assert np.array_equal(noise, masking.make_fill_values(DrawKey(0, 0, np.array(1)), 0, 101, 203))
    assert np.abs(np.bincount(noise.ravel(), minlength=256) / noise.size * 256 - 1).max() < 0.3
    for seed, epoch, sample, view in ((1, 0, 1, 0), (0, 1, 1, 0), (0, 0, 2, 0), (0, 0, 1, 1)):
        other = DrawKey(seed, epoch, np.array(sample))
        assert (noise == masking.make_fill_values(other, view, 101, 203)).mean() < 0.02


# The draws.


def test_each_large_view_draws_by_itself_with_the_probability():
    masking = BackgroundRemoval(AlphaMasks(LIMITS), 0.1, "mean")
    drawn = masking.draw_masked_views(DrawKey(3, 2, np.arange(50_000)), 4)
    assert abs(drawn.mean() - 0.1) < 0.002
    assert np.abs(drawn.mean(0) - 0.1).max() < 0.005
    both = (drawn[:, 0] & drawn[:, 1]).mean()
    assert abs(both - 0.01) < 0.002
    assert (
        drawn != masking.draw_masked_views(DrawKey(3, 3, np.arange(50_000)), 4)
    ).mean() > 0.1  # another epoch, other draws
    some = np.array([77, 3, 40_000])
    assert np.array_equal(
        masking.draw_masked_views(DrawKey(3, 2, some), 4), drawn[some]
    )  # whoever else is in the batch
    assert np.array_equal(masking.draw_masked_views(DrawKey(3, 2, some), 2), drawn[some, :2])


@pytest.mark.parametrize("cache", ["none", "memory", "device"])
def test_probability_0_is_no_masks_bit_for_bit_and_1_masks_every_usable_image(bank, cache):
    source = Photos(one_size=True)
    plain = views_of(feed_of(source, None, cache))
    assert all(map(torch.equal, plain, views_of(feed_of(source, masking_of(bank, 0.0), cache))))
    large, small = views_of(feed_of(source, masking_of(bank, 1.0), cache))
    assert torch.equal(small, plain[1])
    sampler = Sampler(7, COUNT, BATCH)
    for step in range(6):
        for row, sample in enumerate(sampler.get_batch_indices(step).tolist()):
            for view in range(3):
                assert torch.equal(large[step, view, row], plain[0][step, view, row]) != usable(sample)


def test_limits_are_of_the_foregrounds_share(tmp_path):
    source, masks = Photos(), {}
    for index in range(COUNT):
        mask = np.zeros(128 * 128, bool)
        mask[: [0, 163, 164, 8000, 16220, 16221, 16384][index % 7]] = True
        masks[index] = mask.reshape(128, 128)
    with MaskBankWriter(tmp_path / "masks.bank", source, made_by="a test") as writer:
        for index, mask in masks.items():
            writer.write_mask(index, mask)
    bank = MaskBank.open(tmp_path)
    of_bank = BankMasks(bank, bank.find_rows(source), LIMITS)
    expected = [index % 7 in (2, 3, 4) for index in range(COUNT)]
    image = np.zeros((128, 128, 3), np.uint8)
    assert of_bank.is_usable().tolist() == expected
    assert [of_bank.read(index, image) is not None for index in range(COUNT)] == expected
    alpha = AlphaMasks(LIMITS)
    pictures = [np.dstack([image, 255 * masks[index].astype(np.uint8)]) for index in range(COUNT)]
    assert [alpha.read(index, picture) is not None for index, picture in enumerate(pictures)] == expected


# All roads are one.


def test_any_number_of_workers_gives_the_same_views(bank):
    source = Photos(broken=True)
    alone = views_of(feed_of(source, masking_of(bank)))
    for cache, workers in (("none", 1), ("none", 2), ("memory", 0), ("memory", 1)):
        others = views_of(feed_of(source, masking_of(bank), cache, workers))
        assert all(map(torch.equal, alone, others)), (cache, workers)


@pytest.mark.parametrize("fill", ["mean", "noise"])
@pytest.mark.parametrize("broken", [False, True])
def test_the_device_cuts_what_the_host_cuts_but_for_rounding(bank, fill, broken):
    source = Photos(one_size=True, broken=broken)
    host, device = (views_of(feed_of(source, masking_of(bank, fill=fill), cache)) for cache in ("none", "device"))
    for one, other in zip(host, device, strict=True):
        assert (one - other).abs().max() < 2.6
        assert (one - other).abs().mean() < 0.3


@pytest.mark.parametrize("cache", ["none", "device"])
def test_processes_share_a_batch_and_a_later_start_changes_nothing(bank, cache):
    source = Photos(one_size=True)
    whole = views_of(feed_of(source, masking_of(bank), cache))
    parts = [views_of(feed_of(source, masking_of(bank), cache, world=World(rank, 2))) for rank in (0, 1)]
    late = views_of(feed_of(source, masking_of(bank), cache), 4, 6)
    for size in (0, 1):
        torch.testing.assert_close(torch.cat([part[size] for part in parts], 2), whole[size], rtol=0, atol=1e-3)
        assert torch.equal(late[size], whole[size][4:])


def test_a_subset_finds_its_own_masks(bank):
    """The same images and draws, in another order of a larger set: masks go by name."""
    chosen = np.array([20, 3, 9, 17, 0, 5, 11, 8])
    part = Photos().select(chosen)
    masks = masking_of(bank, source=part).masks
    for place, index in enumerate(chosen.tolist()):
        mask = masks.read(place, part.load(place))
        assert (mask is None) != usable(index)
        assert mask is None or np.array_equal(mask, mask_of(index))


def test_the_demo_datas_own_masks_leave_the_object(tmp_path):
    source = ShapesDataset.from_spec("shapes:train=16", "train")
    with MaskBankWriter(tmp_path / "masks.bank", source, made_by="a test") as writer:
        for index in range(16):
            squashed = Image.fromarray(source.load_mask(index)).resize((128, 128), Image.Resampling.NEAREST)
            writer.write_mask(index, np.asarray(squashed))
    bank = MaskBank.open(tmp_path)
    for index in range(16):
        assert np.array_equal(resize_mask(bank.load_mask(index), 48, 48), source.load_mask(index))


def test_masks_count_when_it_is_settled_what_is_kept_decoded(monkeypatch):
    source, cpu = Photos(one_size=True), torch.device("cpu")
    decoded = COUNT * 60 * 44 * 3
    monkeypatch.setattr("relicctl.data.loader.get_free_host_memory", lambda: 4 * decoded)
    assert resolve_cache("auto", source, cpu) == "device"
    assert resolve_cache("auto", source, cpu, True) == "none"


# Alpha channels.


def encoded(image: Image.Image, form: str = "PNG", **more) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **more)
    return buffer.getvalue()


def disc(height: int, width: int) -> np.ndarray:
    """uint8 alpha: opaque in the left half, half transparent around it."""
    alpha = np.zeros((height, width), np.uint8)
    alpha[:, : width // 2] = 255
    alpha[: height // 2, width // 2 :] = 127
    alpha[height // 2 :, width // 2 :] = 128
    return alpha


@pytest.mark.parametrize("form", ["PNG", "WEBP", "grey", "palette"])
def test_alpha_is_decoded_beside_the_same_colours(form):
    rng = np.random.default_rng(0)
    pixels, alpha = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), disc(20, 30)
    if form == "grey":
        data = encoded(Image.fromarray(np.dstack([pixels[..., 0], alpha]), "LA"))
    elif form == "palette":
        data = encoded(Image.fromarray(pixels[..., 0] // 128 * 10, "P"), transparency=0)
        alpha = np.where(pixels[..., 0] // 128 == 0, 0, 255)
    else:
        data = encoded(
            Image.fromarray(np.dstack([pixels, alpha])), form, **{"lossless": True} if form == "WEBP" else {}
        )
    decoded = decode_rgb(data, keep_alpha=True)
    assert np.array_equal(decoded[..., :3], decode_rgb(data))
    assert np.array_equal(decoded[..., 3], alpha)
    mask = AlphaMasks(LIMITS).read(0, decoded)
    assert mask is not None
    assert np.array_equal(mask, alpha >= 128)


def test_alpha_stands_upright_with_its_image():
    pixels = np.dstack([np.zeros((20, 30, 3), np.uint8), disc(20, 30)])
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_rgb(encoded(Image.fromarray(pixels), exif=exif), keep_alpha=True)
    assert np.array_equal(decoded[..., 3], np.rot90(disc(20, 30), -1))


def test_images_without_alpha_have_no_mask():
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    for picture in (image, image.convert("L"), image.convert("P")):
        assert decode_rgb(encoded(picture), keep_alpha=True).shape == (20, 30, 3)
    assert AlphaMasks(LIMITS).read(0, decode_rgb(encoded(image), keep_alpha=True)) is None


@pytest.fixture
def cutouts(tmp_path) -> Path:
    """Photos with alpha, without, and fully opaque, in turn."""
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 256, (60, 44, 3), dtype=np.uint8)
        alpha = disc(60, 44) if number % 3 == 0 else np.full((60, 44), 255, np.uint8)
        picture = Image.fromarray(pixels if number % 3 == 1 else np.dstack([pixels, alpha]))
        picture.save(tmp_path / f"{number:02d}.png")
    return tmp_path


def test_alpha_masks_are_the_same_on_every_road(cutouts):
    source, masking = open_dataset(str(cutouts)), BackgroundRemoval(AlphaMasks(LIMITS), 1.0, "gray")
    plain, host = views_of(feed_of(source, None)), views_of(feed_of(source, masking))
    for cache, workers in (("none", 1), ("memory", 0), ("memory", 1)):
        assert all(map(torch.equal, host, views_of(feed_of(source, masking, cache, workers)))), (cache, workers)
    device = views_of(feed_of(source, masking, "device"))
    assert all((one - other).abs().max() < 2.6 for one, other in zip(host, device, strict=True))
    assert torch.equal(plain[1], host[1])
    sampler = Sampler(7, 12, BATCH)
    for step in range(6):
        for row, sample in enumerate(sampler.get_batch_indices(step).tolist()):
            assert torch.equal(plain[0][step, :, row], host[0][step, :, row]) == (sample % 3 != 0)
