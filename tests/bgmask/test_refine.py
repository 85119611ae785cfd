"""Maps drawn to the edges of their images: the filter, the cut, and labels from several priors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relicctl.bgmask.refine import apply_grabcut, apply_guided_filter, fuse_priors, normalize_maps, refine_maps
from relicctl.config.bgmask import RefineConfig

SIDE = 32


def scene(inside=(220, 40, 30), outside=(20, 90, 160)):
    """A disc with a little noise: image uint8 [1, 3, S, S], and where the disc is, bool [1, S, S]."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    disc = (rows - 15) ** 2 + (columns - 13) ** 2 < 81
    pixels = np.where(disc[..., None], inside, outside) + np.random.default_rng(0).integers(-9, 10, (SIDE, SIDE, 3))
    image = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)[None]
    return image, torch.from_numpy(disc)[None]


def blurred(disc):
    """A hint of where the disc is: float [1, S, S]."""
    blob = torch.nn.functional.avg_pool2d(disc.float()[None], 11, 1, 5, count_include_pad=False)
    return normalize_maps(blob[0])


def overlap(a, b):
    return float((a & b).sum() / (a | b).sum())


# The filter


def literal_filter(image, saliency, radius, eps):
    """He, Sun and Tang's equations, window by window, in float64."""
    colours = image.numpy().astype(np.float64).transpose(1, 2, 0) / 255
    values = saliency.numpy().astype(np.float64)
    height, width = values.shape

    def window(array, row, column):
        top, left = max(0, row - radius), max(0, column - radius)
        return array[top : row + radius + 1, left : column + radius + 1]

    slopes, offsets = np.empty((height, width, 3)), np.empty((height, width))
    for row in range(height):
        for column in range(width):
            x, y = window(colours, row, column).reshape(-1, 3), window(values, row, column).ravel()
            covariance = np.cov(x.T, bias=True) + eps * np.eye(3)
            slopes[row, column] = np.linalg.solve(covariance, ((x * y[:, None]).mean(0) - x.mean(0) * y.mean()))
            offsets[row, column] = y.mean() - slopes[row, column] @ x.mean(0)
    smooth = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            slope = window(slopes, row, column).reshape(-1, 3).mean(0)
            smooth[row, column] = slope @ colours[row, column] + window(offsets, row, column).mean()
    return smooth.clip(0, 1)


def test_the_filter_is_the_literal_one():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 9, 12), dtype=torch.uint8, generator=generator)
    maps = torch.rand(2, 2, 9, 12, generator=generator)
    found = apply_guided_filter(images, maps, 2, 0.01)
    for one in range(2):
        for prior in range(2):
            expected = literal_filter(images[one], maps[one, prior], 2, 0.01)
            np.testing.assert_allclose(found[one, prior].numpy(), expected, atol=2e-4)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(1, 40), st.sampled_from(["noise", "flat"]))
def test_a_constant_map_stays_as_it_is_whatever_the_image(level, radius, kind):
    image = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    if kind == "noise":
        image = torch.randint(0, 256, image.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    maps = torch.full((1, 1, 16, 16), level)
    torch.testing.assert_close(apply_guided_filter(image, maps, radius, 1e-3), maps, atol=1e-4, rtol=0)


def test_a_shifted_map_is_moved_to_the_edge_of_the_object():
    image, disc = scene()
    hint = blurred(disc.roll(4, 2))
    filtered = normalize_maps(apply_guided_filter(image, hint[:, None], 6, 1e-3)[:, 0])
    assert overlap(filtered > 0.5, disc) > overlap(hint > 0.5, disc) + 0.1


def test_maps_are_normalized_one_by_one_and_a_constant_one_becomes_zero():
    maps = torch.stack([torch.linspace(0.4, 0.5, 9).view(3, 3), torch.full((3, 3), 0.7)])
    found = normalize_maps(maps)
    assert found[0].min() == 0
    assert found[0].max() == pytest.approx(1, abs=1e-4)
    assert bool((found[1] == 0).all())


# The cut


def test_the_cut_segments_the_object_from_a_blurred_map():
    image, disc = scene()
    found = apply_grabcut(image.permute(0, 2, 3, 1).numpy(), blurred(disc).numpy(), background=0.1, foreground=0.9)
    assert overlap(torch.from_numpy(found), disc) > 0.97


def test_certain_pixels_are_fixed_in_the_cut():
    image, _ = scene()
    hint = np.full((1, SIDE, SIDE), 0.5, dtype=np.float32)
    hint[0, :6], hint[0, -6:] = 0.0, 1.0
    found = apply_grabcut(image.permute(0, 2, 3, 1).numpy(), hint, background=0.2, foreground=0.8)
    assert not found[0, :6].any()
    assert found[0, -6:].all()


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_a_constant_map_is_no_error(level):
    image, _ = scene()
    flat = np.full((1, SIDE, SIDE), level, dtype=np.float32)
    found = apply_grabcut(image.permute(0, 2, 3, 1).numpy(), flat, background=0.1, foreground=0.9)
    assert found.shape == flat.shape
    assert found.all() == found.any()


def test_an_image_of_one_colour_has_an_object_where_its_map_is_certain():
    _, disc = scene()
    hint = blurred(disc).numpy()
    found = apply_grabcut(np.full((1, SIDE, SIDE, 3), 90, np.uint8), hint, background=0.1, foreground=0.9)
    assert found[hint > 0.9].all()
    assert not found[hint < 0.1].any()


def test_the_cut_does_not_depend_on_the_batch_or_the_threads():
    image, disc = scene()
    many = np.concatenate([np.roll(image.permute(0, 2, 3, 1).numpy(), k, 2) for k in range(6)])
    maps = np.concatenate([np.roll(blurred(disc).numpy(), k, 2) for k in range(6)])
    together = apply_grabcut(many, maps, background=0.1, foreground=0.9, threads=3)
    alone = [
        apply_grabcut(many[k : k + 1], maps[k : k + 1], background=0.1, foreground=0.9)[0] for k in reversed(range(6))
    ]
    assert np.array_equal(together, np.stack(alone[::-1]))


def test_an_empty_batch_gives_no_masks():
    none = apply_grabcut(
        np.empty((0, 8, 8, 3), np.uint8), np.empty((0, 8, 8), np.float32), background=0.1, foreground=0.9
    )
    assert none.shape == (0, 8, 8)


# Labels


def test_an_invalid_prior_does_not_affect_the_label():
    image, disc = scene()
    hint, junk = blurred(disc), torch.rand(1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    one = fuse_priors(image, hint[:, None], torch.tensor([[True]]), RefineConfig())
    for spoilt in (junk, torch.full_like(junk, torch.nan)):
        two = fuse_priors(image, torch.stack([hint, spoilt], 1), torch.tensor([[True, False]]), RefineConfig())
        assert torch.equal(one.map, two.map)
        assert torch.equal(one.agreement, two.agreement)


def test_an_image_without_a_valid_prior_is_trusted_least():
    image, disc = scene()
    maps = torch.full((1, 2, SIDE, SIDE), torch.nan)
    found = fuse_priors(image, maps, torch.tensor([[False, False]]), RefineConfig())
    assert bool((found.map == 0).all())
    assert float(found.agreement) == 0
    assert float(fuse_priors(image, blurred(disc)[:, None], torch.tensor([[True]]), RefineConfig()).agreement) > 0.4


def test_a_map_that_the_image_contradicts_is_trusted_less():
    image, disc = scene()
    right, wrong = blurred(disc), blurred(disc.roll(12, 2))
    assert float(refine_maps(image, right, RefineConfig()).agreement) > float(
        refine_maps(image, wrong, RefineConfig()).agreement
    )


def test_the_labels_run_from_the_filtered_map_to_the_cut_one():
    image, disc = scene()
    hint = blurred(disc)
    soft, half, hard = (refine_maps(image, hint, RefineConfig(grabcut_weight=share)).map for share in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (soft + hard) / 2)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert soft.unique().numel() > 50
