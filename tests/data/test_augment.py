"""Photometric operations against plain loops over pixels in float64, and the law of their draws."""

from __future__ import annotations

import colorsys
import itertools
import math
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch

from relicctl.config.pretrain import AugmentationConfig
from relicctl.data.augment import JITTER_OPS, apply_augmentations
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.crops import make_gaussian_matrices
from relicctl.data.photometric import AugmentConfig, AugmentParams, compute_blur_radius, draw_augment_params

ORDERS = np.array(list(itertools.permutations(range(4))))
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


# -- the plain references: image is float64 [H, W, 3] in [0, 1] --


def through_hsv(image, change):
    out = np.empty_like(image)
    for place in np.ndindex(image.shape[:2]):
        out[place] = colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*image[place].tolist())))
    return out


def brightness(image, added):
    return np.clip(image + added, 0, 1)


def contrast(image, factor):
    mean = image.mean(axis=(0, 1))
    return np.clip((image - mean) * factor + mean, 0, 1)


def saturation(image, factor):
    return through_hsv(image, lambda h, s, v: (h, min(1.0, s * factor), v))


def hue(image, turns):
    return through_hsv(image, lambda h, s, v: ((h + turns) % 1.0, s, v))


def blur(image, sigma):
    height, width, _ = image.shape
    radius = int(height / 10 / 2)
    taps = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-radius, radius + 1)]
    taps = [tap / sum(taps) for tap in taps]
    rows, out = np.zeros_like(image), np.zeros_like(image)
    for d, tap in enumerate(taps, start=-radius):
        for x in range(width):
            if 0 <= x + d < width:
                rows[:, x] += tap * image[:, x + d]
    for d, tap in enumerate(taps, start=-radius):
        for y in range(height):
            if 0 <= y + d < height:
                out[y] += tap * rows[y + d]
    return out


REFERENCES = (brightness, contrast, saturation, hue)


def literal_chain(image, draw):
    """One image with its own draws: METHOD's order, written out."""
    if draw.flip:
        image = image[:, ::-1]
    if draw.jitter:
        strengths = (draw.brightness, draw.contrast, draw.saturation, draw.hue)
        for operation in draw.order:
            image = np.clip(REFERENCES[operation](image, float(strengths[operation])), 0, 1)
    if draw.grayscale:
        image = np.repeat((image @ [0.2989, 0.5870, 0.1140])[..., None], 3, axis=-1)
    if draw.blur:
        image = blur(image, float(draw.sigma))
    if draw.solarize:
        image = np.where(image < 0.5, image, 1 - image)
    return (np.clip(image, 0, 1) - IMAGENET_MEAN) / IMAGENET_STD


# -- the images: noise, a photo's smoothness, greys, pure colours, black and white --


def pictures(count, side, seed=0):
    """uint8 [count, side, side, 3]; every fifth of a kind."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, side, side, 3))
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(9 * x + 4 * y), np.cos(5 * x - 7 * y), np.sin(3 * x * y + 1)]
    images[1::5] = 127.5 + 127 * np.stack(waves, axis=-1)
    images[2::5] = images[2::5, ..., :1]
    images[3::5] = 255 * (images[3::5] > 127)
    images[4::5] = images[4::5] // 64
    return images.astype(np.uint8)


def planes(images):
    return torch.from_numpy(images).movedim(-1, -3).float().div(255)


def pixels(tensor):
    return tensor.movedim(-3, -1).double().numpy()


def draw(views=4, batch=30, *, step=1, seed=0, spec=AugmentConfig(), rows=None):  # noqa: B008
    return draw_augment_params(spec, seed, step, np.arange(batch) if rows is None else rows, views)


def nothing(drawn, **but):
    off = np.zeros_like(drawn.flip)
    return replace(drawn, **{"flip": off, "jitter": off, "grayscale": off, "blur": off, "solarize": off, **but})


# -- laws --


def test_the_whole_chain_is_the_plain_one_for_every_order_of_the_jitter():
    drawn = draw(
        views=4, batch=24, spec=AugmentConfig(color_jitter_prob=0.9, blur_prob=(0.7, 0.5), solarize_prob=(0.2, 0.5))
    )
    drawn = replace(drawn, order=np.stack([np.roll(ORDERS, 6 * view, axis=0) for view in range(4)]))
    images = pictures(96, 24).reshape(4, 24, 24, 24, 3)
    ours = pixels(apply_augmentations(torch.from_numpy(images), drawn))
    for place in np.ndindex(4, 24):
        np.testing.assert_allclose(ours[place], literal_chain(images[place] / 255, drawn[place]), atol=1e-5)


@pytest.mark.parametrize("operation", range(4))
@pytest.mark.parametrize("strong", [1.0, 2.4])  # the stronger ones reach beyond the defaults' ranges
def test_every_jitter_operation_is_the_plain_one(operation, strong):
    images = pictures(20, 16, seed=operation)
    reach = (0.4, 0.4, 0.2, 0.2)[operation] * strong
    strengths = np.random.default_rng(1).uniform(-reach, reach, 20) + (operation in (CONTRAST, SATURATION))
    ours = JITTER_OPS[operation](planes(images), torch.from_numpy(strengths).float()[:, None, None, None])
    for image, strength, result in zip(images, strengths, pixels(ours), strict=True):
        np.testing.assert_allclose(result, REFERENCES[operation](image / 255, strength), atol=2e-6)


def test_neutral_strengths_change_nothing():
    images = planes(pictures(20, 16))
    for operation, neutral in ((BRIGHTNESS, 0.0), (CONTRAST, 1.0), (SATURATION, 1.0), (HUE, 0.0), (HUE, 1.0)):
        ours = JITTER_OPS[operation](images.clone(), torch.full((20, 1, 1, 1), neutral))
        torch.testing.assert_close(ours, images, atol=1e-6, rtol=0)


def test_a_third_of_a_turn_exchanges_the_channels():
    images = planes(pictures(20, 16))
    turned = JITTER_OPS[HUE](images.clone(), torch.full((20, 1, 1, 1), 1 / 3))
    torch.testing.assert_close(turned, images.roll(1, dims=1), atol=1e-6, rtol=0)


def test_images_that_drew_nothing_are_only_normalised():
    drawn = draw()
    images = torch.from_numpy(pictures(120, 24)).view(4, 30, 24, 24, 3)
    plain = pixels(apply_augmentations(images, nothing(drawn)))
    np.testing.assert_allclose(plain, (images.double().numpy() / 255 - IMAGENET_MEAN) / IMAGENET_STD, atol=1e-6)
    for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
        gate = getattr(drawn, name)
        touched = pixels(apply_augmentations(images, nothing(drawn, **{name: gate})))
        assert (touched[~gate] == plain[~gate]).all()
        assert (touched[gate] != plain[gate]).any(axis=(1, 2, 3)).mean() > 0.5


def test_the_rows_of_a_batch_do_not_know_each_other():
    drawn, images = draw(views=2, batch=12), torch.from_numpy(pictures(24, 24)).view(2, 12, 24, 24, 3)
    together = apply_augmentations(images, drawn)
    for first, last in ((0, 5), (5, 12)):
        apart = apply_augmentations(images[:, first:last], drawn[:, first:last])
        torch.testing.assert_close(apart, together[:, first:last], atol=1e-6, rtol=0)


def test_every_layout_and_type_gives_the_same_float32():
    drawn, images = draw(views=2, batch=10), torch.from_numpy(pictures(20, 24)).view(2, 10, 24, 24, 3)
    expected = apply_augmentations(images, drawn)
    assert expected.dtype == torch.float32
    assert expected.shape == (2, 10, 3, 24, 24)
    assert expected.is_contiguous()
    upright = images.movedim(-1, 2)
    for same in (upright, upright.contiguous(), images.float() / 255, upright.contiguous().float() / 255):
        assert torch.equal(apply_augmentations(same, drawn), expected)
    coarse = (images.float() / 255).half()
    assert torch.equal(apply_augmentations(coarse, drawn), apply_augmentations(coarse.float(), drawn))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(apply_augmentations(images, drawn), expected)


def test_float_planes_are_overwritten_and_uint8_is_kept():
    images = torch.from_numpy(pictures(20, 24)).view(2, 10, 24, 24, 3)
    before, floats = images.clone(), images.movedim(-1, 2).contiguous().float() / 255
    assert apply_augmentations(floats, draw(views=2, batch=10)).data_ptr() == floats.data_ptr()
    apply_augmentations(images, draw(views=2, batch=10))
    assert torch.equal(images, before)


# -- blur --


@pytest.mark.parametrize(("side", "taps"), [(224, 23), (96, 9), (32, 3)])
def test_the_blur_has_byols_taps(side, taps):
    assert 2 * compute_blur_radius(side) + 1 == taps
    middle = make_gaussian_matrices(torch.tensor([2.0]), side, compute_blur_radius(side))[0, side // 2]
    assert int((middle > 0).sum()) == taps
    assert middle.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("side", [32, 96])
def test_the_blur_is_the_plain_one(side):
    images, sigmas = pictures(5, side), np.array([[0.1, 0.5, 1.0, 1.5, 2.0]])
    drawn = draw(views=1, batch=5)
    drawn = nothing(drawn, blur=np.ones_like(drawn.blur), sigma=sigmas)
    ours = pixels(apply_augmentations(torch.from_numpy(images)[None], drawn, mean=(0, 0, 0), std=(1, 1, 1)))[0]
    for image, sigma, result in zip(images, sigmas[0], ours, strict=True):
        np.testing.assert_allclose(result, blur(image / 255, sigma), atol=2e-6)


def test_beyond_the_border_the_blur_sees_zeros():
    drawn = draw(views=1, batch=1)
    drawn = nothing(drawn, blur=np.ones_like(drawn.blur), sigma=np.full((1, 1), 2.0))
    white = apply_augmentations(torch.ones(1, 1, 3, 40, 40), drawn, mean=(0, 0, 0), std=(1, 1, 1))[0, 0, 0]
    torch.testing.assert_close(white[2:-2, 2:-2], torch.ones(36, 36), atol=1e-6, rtol=0)
    assert white[0, 20].item() == pytest.approx(white[20, -1].item())
    assert white[0, 20].item() < 0.65


# -- draws --


def test_draws_of_some_rows_are_those_rows_of_the_global_draw():
    whole = draw(views=6, batch=64)
    for rows in (np.arange(16, 32), np.array([5]), np.array([63, 0, 7])):
        part = draw(views=6, rows=rows)
        for field in fields(AugmentParams):
            assert (getattr(part, field.name) == getattr(whole, field.name)[:, rows]).all(), field.name


def test_draws_of_a_view_do_not_depend_on_how_many_there_are():
    few, many = draw(views=2), draw(views=6)
    for field in fields(AugmentParams):
        assert (getattr(few, field.name) == getattr(many[:2], field.name)).all(), field.name


def test_seed_and_step_give_other_draws():
    for other in (draw(step=2), draw(seed=1)):
        assert not (other.hue == draw().hue).any()


def test_draws_keep_the_probabilities_of_sets_t_and_t_prime():
    count = 20_000
    drawn = draw(views=4, batch=count, seed=7)
    expected = {
        "flip": (0.5, 0.5),
        "jitter": (0.8, 0.8),
        "grayscale": (0.2, 0.2),
        "blur": (1.0, 0.1),
        "solarize": (0.0, 0.2),
    }
    for name, sets in expected.items():
        for view, share in enumerate(getattr(drawn, name).mean(axis=1)):
            p = sets[view % 2]
            assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / count), (name, view)


def test_strengths_are_uniform_in_their_ranges():
    drawn = draw(views=2, batch=10_000, seed=7)
    ranges = {
        "brightness": (-0.4, 0.4),
        "contrast": (0.6, 1.4),
        "saturation": (0.8, 1.2),
        "hue": (-0.1, 0.1),
        "sigma": (0.1, 2.0),
    }
    for name, (low, high) in ranges.items():
        uniform = np.sort((getattr(drawn, name).ravel() - low) / (high - low))
        distance = np.abs(uniform - (np.arange(20_000) + 0.5) / 20_000).max()
        assert distance < 1.63 / math.sqrt(20_000), name  # Kolmogorov-Smirnov at 1 %


def test_all_orders_of_the_jitter_are_equally_likely():
    orders = draw(views=2, batch=12_000, seed=7).order.reshape(-1, 4)
    counts = (orders[:, None] == ORDERS).all(-1).sum(0)
    assert counts.sum() == 24_000
    assert ((counts - 1000) ** 2 / 1000).sum() < 41.6  # chi-square of 23 degrees at 1 %


def test_the_draws_of_one_image_are_independent():
    drawn = draw(views=1, batch=20_000, seed=7)
    columns = [getattr(drawn, f.name)[0] for f in fields(AugmentParams) if f.name not in ("order", "blur", "solarize")]
    off_diagonal = np.corrcoef(np.stack(columns).astype(float)) - np.eye(len(columns))
    assert np.abs(off_diagonal).max() < 4.5 / math.sqrt(20_000)


def test_the_defaults_are_the_configs():
    assert asdict(AugmentConfig()) == AugmentationConfig().model_dump()


# -- CUDA --


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_result_is_the_same_and_the_host_never_waits():
    drawn, images = draw(), torch.from_numpy(pictures(120, 32)).view(4, 30, 32, 32, 3)
    expected, there = apply_augmentations(images, drawn), images.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = apply_augmentations(there, drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(ours.cpu(), expected, atol=1e-4, rtol=0)
