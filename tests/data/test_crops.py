"""Crops: where the boxes lie, and that both ways of resizing them do what Pillow does."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from relicctl.core.counter_rng import Stream, draw_uniform
from relicctl.data.crops import crop_on_device, crop_on_host, draw_crop_boxes, make_eval_box
from relicctl.data.sampler import DrawKey

LARGE, SMALL, ASPECT = (0.14, 1.0), (0.05, 0.14), (3 / 4, 4 / 3)


def boxes_of(
    indices, heights, widths, *, seed=3, epoch=5, first_view=0, count=4, area=LARGE, aspect=ASPECT, oversized="redraw"
):
    sizes = np.stack([heights, widths], axis=-1)
    key, views = DrawKey(seed, epoch, np.asarray(indices)), range(first_view, first_view + count)
    return draw_crop_boxes(key, sizes, views, area, aspect, oversized)


def literal_box(seed, epoch, index, height, width, view, area, aspect):
    """torchvision's RandomResizedCrop.get_params, fed with the counted draws."""
    u = draw_uniform(seed, Stream.GEOMETRY, epoch, index, view, n=22)
    for k in range(10):
        target = height * width * (area[0] + (area[1] - area[0]) * u[k])
        ratio = math.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * u[10 + k])
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1)), w, h
    w, h = width, height
    if width / height < min(aspect):
        h = round(width / min(aspect))
    elif width / height > max(aspect):
        w = round(height * max(aspect))
    return (width - w) // 2, (height - h) // 2, w, h


def literal_clamped_box(seed, epoch, index, height, width, view, area, aspect):
    """The crop of BYOL's and ReLICv2's public code, fed with the counted draws: one draw, cut to the image's sides."""
    u = draw_uniform(seed, Stream.GEOMETRY, epoch, index, view, n=22)
    target = height * width * (area[0] + (area[1] - area[0]) * u[0])
    ratio = math.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * u[10])
    w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
    w, h = max(1, min(w, width)), max(1, min(h, height))
    return int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1)), w, h


def two_pass_pillow(image, boxes, size):
    """Crop, resize the rows, resize the columns. (From version 13 on Pillow may choose the other order.)"""
    crops = []
    for left, top, w, h in boxes.tolist():
        crop = Image.fromarray(image).crop((left, top, left + w, top + h))
        crop = crop.resize((size, h), Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)
        crops.append(np.asarray(crop))
    return np.stack(crops).astype(int)


def noise(height, width, seed=0):
    """Harsher than any photo: every resize of it over- and undershoots."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# -- boxes --


def test_a_box_depends_on_nothing_but_its_own_sample_and_view():
    indices, heights, widths = (
        np.array([7, 0, 123_456, 8]),
        np.array([375, 32, 90, 1]),
        np.array([500, 32, 33, 9]),
    )
    together = boxes_of(indices, heights, widths, count=6)
    for row in range(4):
        for view in range(6):
            alone = boxes_of(indices[[row]], heights[[row]], widths[[row]], first_view=view, count=1)
            assert (alone[0, 0] == together[row, view]).all()
    assert (boxes_of(indices[::-1], heights[::-1], widths[::-1], count=6) == together[::-1]).all()


@pytest.mark.parametrize("other", [{"seed": 4}, {"epoch": 6}, {"first_view": 4}])
def test_seed_epoch_and_view_each_give_other_boxes(other):
    sizes = np.full(50, 300)
    same = (boxes_of(np.arange(50), sizes, sizes) == boxes_of(np.arange(50), sizes, sizes, **other)).all(-1)
    assert same.mean() < 0.05


@pytest.mark.parametrize(("oversized", "literal"), [("redraw", literal_box), ("clamp", literal_clamped_box)])
@pytest.mark.parametrize(("area", "aspect"), [(LARGE, ASPECT), (SMALL, ASPECT), ((0.9, 1.0), (1.9, 2.1))])
def test_boxes_follow_their_reference(area, aspect, oversized, literal):
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 600, (2, 200))
    boxes = boxes_of(
        np.arange(200), heights, widths, count=3, first_view=2, area=area, aspect=aspect, oversized=oversized
    )
    assert boxes.dtype == np.int32
    assert boxes.shape == (200, 3, 4)
    for row in range(200):
        for k in range(3):
            expected = literal(3, 5, row, int(heights[row]), int(widths[row]), 2 + k, area, aspect)
            assert tuple(boxes[row, k]) == expected


@given(
    height=st.integers(1, 5000), width=st.integers(1, 5000), index=st.integers(0, 2**40),
    low=st.floats(1e-4, 1.0), aspect=st.tuples(st.floats(0.1, 1.0), st.floats(1.0, 10.0)),
    oversized=st.sampled_from(["redraw", "clamp"]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_boxes_lie_inside_any_image(height, width, index, low, aspect, oversized):
    boxes = boxes_of([index], [height], [width], area=(low, 1.0), aspect=aspect, oversized=oversized)[0]
    left, top, w, h = boxes.T
    assert min(left.min(), top.min()) >= 0
    assert min(w.min(), h.min()) >= 1
    assert (left + w).max() <= width
    assert (top + h).max() <= height


def test_area_and_log_aspect_and_place_are_uniform():
    count = 20_000
    side = np.full(count, 2000)
    left, top, w, h = boxes_of(np.arange(count), side, side, count=1, area=SMALL)[:, 0].T.astype(float)
    shares = (w * h / 2000**2 - SMALL[0]) / (SMALL[1] - SMALL[0])
    aspects = (np.log(w / h) - np.log(ASPECT[0])) / (np.log(ASPECT[1]) - np.log(ASPECT[0]))
    for uniform in (shares, aspects, left / (2000 - w), top / (2000 - h)):
        distance = np.abs(np.sort(uniform) - (np.arange(count) + 0.5) / count).max()
        assert distance < 1.63 / math.sqrt(count)  # Kolmogorov-Smirnov at 1 %


@pytest.mark.parametrize(("oversized", "mean_area"), [("redraw", 0.464), ("clamp", 0.547)])
def test_clamped_boxes_cover_more_of_a_photo(oversized, mean_area):
    count = 20_000
    boxes = boxes_of(np.arange(count), np.full(count, 375), np.full(count, 500), count=1, oversized=oversized)[:, 0]
    assert (boxes[:, 2] * boxes[:, 3] / (375 * 500)).mean() == pytest.approx(mean_area, abs=0.005)


def test_an_evaluation_box_is_the_centre_of_the_resized_image():
    image = np.asarray(Image.fromarray(noise(40, 60)).resize((640, 448), Image.Resampling.BICUBIC))
    resized = Image.fromarray(image).resize((366, 256), Image.Resampling.BICUBIC)
    usual = np.asarray(resized.crop((71, 16, 295, 240))).astype(int)
    box = make_eval_box(448, 640, 0.875)
    assert box.tolist() == [124, 28, 392, 392]
    ours = crop_on_host(image, box[None], 224)[0].astype(int)
    assert np.abs(ours - usual)[4:-4, 4:-4].mean() < 1.0  # 640 / 448 * 256 is no whole number of pixels


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 1000), (33, 32), (375, 500)])
def test_an_evaluation_box_is_a_centred_square_inside(height, width):
    left, top, w, h = make_eval_box(height, width, 0.875)
    assert w == h == max(1, round(0.875 * min(height, width)))
    assert 0 <= (width - w - left) - left <= 1
    assert 0 <= (height - h - top) - top <= 1


# -- pixels --


@pytest.mark.parametrize(("size", "area"), [(224, LARGE), (96, SMALL), (32, LARGE)])
def test_host_crops_are_pillows(size, area):
    image = noise(375, 500)
    boxes = boxes_of([1], [375], [500], count=12, area=area)[0]
    crops = crop_on_host(image, boxes, size)
    assert crops.dtype == np.uint8
    assert crops.shape == (12, size, size, 3)
    off = np.abs(crops - two_pass_pillow(image, boxes, size))
    assert off.max() <= 2
    assert (off > 1).mean() < 1e-4
    assert (off > 0).mean() < 0.01


@pytest.mark.parametrize(("size", "area"), [(224, LARGE), (96, SMALL), (32, LARGE)])
def test_device_crops_are_pillows_but_for_rounding(size, area):
    images = np.stack([noise(120, 160, seed) for seed in range(8)])
    boxes = boxes_of(np.arange(8), np.full(8, 120), np.full(8, 160), area=area)
    crops = crop_on_device(torch.from_numpy(images).movedim(-1, 1), boxes, size)
    assert crops.dtype == torch.float32
    assert crops.shape == (4, 8, 3, size, size)
    assert crops.min() >= 0
    assert crops.max() <= 1
    for row in range(8):
        pillow = two_pass_pillow(images[row], boxes[row], size)
        ours = crops[:, row].movedim(1, -1).double().numpy() * 255
        assert np.abs(ours - pillow).max() <= 1.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (2, 3)])
def test_extreme_images_are_resized_too(shape):
    image = noise(*shape)
    box = np.array([[0, 0, shape[1], shape[0]]], dtype=np.int32)
    pillow = two_pass_pillow(image, box, 32)
    assert np.abs(crop_on_host(image, box, 32) - pillow).max() <= 2
    ours = crop_on_device(torch.from_numpy(image).movedim(-1, 0)[None], box[None], 32)
    assert np.abs(ours[:, 0].movedim(1, -1).double().numpy() * 255 - pillow).max() <= 1.5


def test_pixels_outside_the_box_do_not_matter():
    image = noise(60, 60)
    box = np.array([[20, 10, 25, 30]], dtype=np.int32)
    alone = np.zeros_like(image)
    alone[10:40, 20:45] = image[10:40, 20:45]
    assert (crop_on_host(image, box, 24) == crop_on_host(alone, box, 24)).all()
    planes = torch.from_numpy(np.stack([image, alone])).movedim(-1, 1)
    both = crop_on_device(planes, np.stack([box, box]), 24)
    assert torch.equal(both[:, 0], both[:, 1])


def test_a_box_of_the_output_size_is_copied():
    image = noise(40, 50)
    box = np.array([[7, 3, 32, 32]], dtype=np.int32)
    cut = image[3:35, 7:39]
    assert (crop_on_host(image, box, 32)[0] == cut).all()
    ours = crop_on_device(torch.from_numpy(image).movedim(-1, 0)[None], box[None], 32)[0, 0]
    torch.testing.assert_close(ours * 255, torch.from_numpy(cut).movedim(-1, 0).float(), atol=1e-3, rtol=0)


def test_read_only_images_are_cropped_without_complaint():
    image = noise(40, 50)
    box = np.array([[0, 0, 50, 40]], dtype=np.int32)
    expected = crop_on_host(image, box, 16)
    image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (crop_on_host(image, box, 16) == expected).all()


def test_device_crops_stay_in_float32_under_autocast():
    images = torch.from_numpy(noise(32, 32)).movedim(-1, 0)[None]
    boxes = boxes_of([0], [32], [32])
    expected = crop_on_device(images, boxes, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(crop_on_device(images, boxes, 24), expected)
