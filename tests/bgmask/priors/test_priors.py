"""Priors: each against its formula written out literally, symmetries, objects that must be found, hopeless images."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from skimage.color import rgb2lab

from relicctl.bgmask.priors import dsr, mc, mr, rbd
from relicctl.bgmask.priors.maps import (
    MAX_LONG_SIDE,
    PRIOR_NAMES,
    PRIORS,
    compute_prior_maps,
    make_centre_prior,
    shrink_image,
)
from relicctl.bgmask.priors.superpixels import (
    Superpixels,
    build_superpixels,
    compute_pairwise_distances,
    get_num_superpixels,
    normalize_min_max,
    segment_superpixels,
)
from relicctl.data.datasets.open import open_dataset

each_prior = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIOR_NAMES)


def picture(height=60, width=80, middle=(30, 40), radius=14, seed=0):
    """A reddish disc of ``radius`` pixels on a bluish ground, both with grain; and where it is."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((height, width))
    disc = np.hypot(rows - middle[0], columns - middle[1]) < radius
    colour = np.where(disc[..., None], [190, 80, 60], [60, 90, 130])
    return np.clip(colour + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8), disc


def grid(image, cells=(6, 7)):
    """Square cells instead of SLIC's: labels that a test can mirror and renumber."""
    height, width = image.shape[:2]
    rows, columns = np.arange(height) * cells[0] // height, np.arange(width) * cells[1] // width
    return (rows[:, None] * cells[1] + columns).astype(np.int32)


def described(image, labels):
    return build_superpixels(labels, image, rgb2lab(image))


@pytest.fixture(scope="module")
def small():
    image, _ = picture(middle=(26, 47))
    return described(image, grid(image))


# -- superpixels --


def test_description_is_the_literal_one():
    image, _ = picture(24, 30)
    labels = segment_superpixels(image).labels
    lab, found = rgb2lab(image), described(image, labels)
    assert sorted(set(labels.ravel())) == list(range(len(found)))
    assert found.area.sum() == pytest.approx(1.0)
    edges = set()
    for r, c in itertools.product(range(24), range(30)):
        for r2, c2 in ((r + 1, c), (r, c + 1)):
            if r2 < 24 and c2 < 30 and labels[r, c] != labels[r2, c2]:
                edges.add(tuple(sorted((int(labels[r, c]), int(labels[r2, c2])))))
    assert edges == set(map(tuple, found.edges.tolist()))
    assert len(edges) == len(found.edges)
    for k in range(len(found)):
        r, c = np.nonzero(labels == k)
        np.testing.assert_allclose(found.lab[k], lab[r, c].mean(axis=0), atol=1e-9)
        np.testing.assert_allclose(found.rgb[k], image[r, c].mean(axis=0) / 255, atol=1e-12)
        np.testing.assert_allclose(found.centre[k], [(r + 0.5).mean() / 24, (c + 0.5).mean() / 30], atol=1e-12)
        assert found.area[k] == pytest.approx(len(r) / 720)
        assert found.sides[:, k].tolist() == [0 in r, 23 in r, 0 in c, 29 in c]


def test_linked_are_neighbours_their_neighbours_and_the_border(small):
    for i, j in itertools.product(range(len(small)), repeat=2):
        near = small.adjacency[i, j] or (small.adjacency[i] & small.adjacency[j]).any()
        assert small.linked[i, j] == (i != j and (near or (small.border[i] and small.border[j])))


def test_superpixels_follow_outlines_and_small_images_have_fewer():
    image, disc = picture(200, 300, (90, 140), 50)
    labels = segment_superpixels(image).labels
    inside = np.bincount(labels.ravel(), weights=disc.ravel()) / np.bincount(labels.ravel())
    assert np.abs(inside[labels] - disc).mean() < 0.01
    assert (
        get_num_superpixels(1)
        == get_num_superpixels(20)
        == 1
        < get_num_superpixels(48 * 48)
        < get_num_superpixels(128 * 128)
        == get_num_superpixels(300 * 300)
    )


def test_noise_does_not_merge_superpixels():
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    assert len(segment_superpixels(noise)) > 100


# -- laws of all priors --


@each_prior
def test_saliency_goes_from_0_to_1(prior, small):
    saliency = prior(small)
    assert saliency.shape == (len(small),)
    assert saliency.dtype == np.float64
    assert saliency.min() == 0.0
    assert saliency.max() == 1.0


@each_prior
def test_renumbered_superpixels_keep_their_saliency(prior, small):
    order = np.random.default_rng(1).permutation(len(small))  # the new number of each
    image, _ = picture(middle=(26, 47))
    renumbered = described(image, order[small.labels].astype(np.int32))
    np.testing.assert_allclose(prior(renumbered)[order], prior(small), atol=1e-8)


@each_prior
@pytest.mark.parametrize("turn", [np.fliplr, np.flipud, np.rot90])
def test_a_mirrored_or_turned_image_has_the_same_saliency(prior, small, turn):
    image, _ = picture(middle=(26, 47))
    turned = described(np.ascontiguousarray(turn(image)), np.ascontiguousarray(turn(small.labels)))
    np.testing.assert_allclose(prior(turned), prior(small), atol=1e-8)


@each_prior
@pytest.mark.parametrize(("side", "middle"), [(48, (24, 24)), (128, (45, 80)), (300, (200, 110))])
def test_an_object_is_found_wherever_it_stands(prior, side, middle):
    image, disc = picture(side, side, middle, side // 5)
    superpixels = segment_superpixels(image)
    found = prior(superpixels)[superpixels.labels]
    assert found[disc].mean() > 0.6
    assert found[~disc].mean() < 0.3


def test_an_image_without_contrast_is_degenerate():
    assert np.isnan(compute_prior_maps(np.full((64, 64, 3), 90, dtype=np.uint8), 24)).all()


def test_an_image_that_is_all_border_is_degenerate():
    strip = np.random.default_rng(0).integers(0, 256, (300, 1, 3), dtype=np.uint8)
    assert np.isnan(compute_prior_maps(strip, 24)).all()


# -- each prior's formula --


def test_mc_time_is_the_expected_number_of_steps(small):
    moves, leaves = mc.compute_transitions(small)
    np.testing.assert_allclose(moves.sum(axis=1) + leaves, 1.0)
    there, expected = np.eye(len(small)), np.zeros(len(small))
    for _ in range(60_000):  # sum over k of the chance to be on the way after k steps
        expected += there.sum(axis=1)
        if there.sum(axis=1).max() < 1e-14:
            break
        there = there @ moves
    np.testing.assert_allclose(mc.compute_absorption_time(moves, leaves), expected, rtol=1e-8)


def test_mc_chain_has_an_absorbing_copy_of_each_border_superpixel(small):
    n, border = len(small), np.flatnonzero(small.border).tolist()
    colours = [small.lab[k] for k in range(n)] + [small.lab[k] for k in border]
    strongest = max(np.linalg.norm(colours[i] - colours[j]) for i, j in np.argwhere(small.linked))
    weights = np.zeros((n, n + len(border)))
    for i in range(n):
        for j in range(n + len(border)):
            original = j if j < n else border[j - n]
            linked = small.linked[i, j] if j < n else small.adjacency[i, original]
            if linked or original == i:
                weights[i, j] = np.exp(-10 * np.linalg.norm(colours[i] - colours[j]) / strongest)
    chances = weights / weights.sum(axis=1, keepdims=True)
    time = np.linalg.inv(np.eye(n) - chances[:, :n]).sum(axis=1)
    np.testing.assert_allclose(mc.compute_mc(small), normalize_min_max(time), atol=1e-9)


def test_mr_ranks_are_the_fixed_point_of_propagation(small):
    query = small.sides[0].astype(float)
    affinity, ranks = small.affinity, np.zeros(len(small))
    degree = affinity.sum(axis=1)
    for _ in range(5000):
        ranks = (mr.ALPHA * affinity @ ranks + query) / degree
    own = np.diag(np.linalg.inv(np.diag(degree) - mr.ALPHA * affinity)) * query
    np.testing.assert_allclose(mr.compute_ranking_matrix(small) @ query, ranks - own, rtol=1e-8, atol=1e-12)


def test_rbd_optimum_has_the_least_cost(small):
    background = rbd.BACKGROUND_WEIGHT * rbd.compute_background_probability(small)
    foreground = normalize_min_max(rbd.compute_background_contrast(small, background))
    smooth = rbd.compute_smoothness_weights(small)

    def cost(s):
        total = sum(b * x**2 + f * (x - 1) ** 2 for b, f, x in zip(background, foreground, s, strict=True))
        return total + sum(smooth[i, j] * (s[i] - s[j]) ** 2 for i, j in itertools.combinations(range(len(s)), 2))

    best = rbd.optimize_saliency(background, foreground, smooth)
    rng = np.random.default_rng(0)
    for size in (1e-1, 1e-3):
        for _ in range(5):
            away = size * rng.standard_normal(len(best))
            up, down = cost(best + away) - cost(best), cost(best - away) - cost(best)
            assert up > 0
            assert up == pytest.approx(down, rel=1e-4)


def test_rbd_geodesic_distance_is_the_shortest_path(small):
    n, colour = len(small), small.colour_distance
    usual = np.mean([min(colour[i, j] for j in range(n) if small.adjacency[i, j]) for i in range(n)])
    path = np.full((n, n), np.inf)
    for i, j in itertools.product(range(n), repeat=2):
        if i == j or small.adjacency[i, j] or (small.border[i] and small.border[j]):
            path[i, j] = max(colour[i, j] - usual, 0) if i != j else 0
    for k in range(n):
        path = np.minimum(path, path[:, k, None] + path[k])
    np.testing.assert_allclose(rbd.compute_geodesic_distances(small), path, atol=1e-6)


def test_rbd_background_is_connected_to_the_border_and_the_object_is_not():
    image, disc = picture(middle=(10, 40), radius=14)  # the disc is cut by the border a little
    superpixels = segment_superpixels(image)
    inside = np.bincount(superpixels.labels.ravel(), weights=disc.ravel()) / np.bincount(superpixels.labels.ravel())
    connectivity = rbd.compute_boundary_connectivity(superpixels)
    assert connectivity[inside > 0.9].max() < connectivity[inside < 0.1].min()


def test_dsr_dense_error_is_the_distance_to_the_principal_plane():
    rng = np.random.default_rng(0)
    plane = rng.standard_normal((2, 5))
    templates = 3.0 + rng.standard_normal((40, 2)) @ plane
    on_it = 3.0 + rng.standard_normal((7, 2)) @ plane
    off = np.linalg.svd(plane)[2][-1]  # a unit vector across the plane
    np.testing.assert_allclose(dsr.compute_dense_error(on_it + 0.3 * off, templates), 0.09, atol=0.02)
    kept = np.linalg.eigh(np.cov(templates.T))[1][:, -2:]
    rest = (on_it + 0.3 * off - templates.mean(axis=0)) @ (np.eye(5) - kept @ kept.T)
    np.testing.assert_allclose(
        dsr.compute_dense_error(on_it + 0.3 * off, templates), np.square(rest).sum(axis=1), atol=1e-9
    )


def test_dsr_sparse_codes_are_optimal():
    rng = np.random.default_rng(0)
    templates, targets = rng.standard_normal((12, 8)), rng.standard_normal((5, 8))
    codes = dsr.solve_lasso(targets, templates, weight=0.5, steps=3000)
    slope = (targets - codes @ templates) @ templates.T  # of the fit, to be met by the norm's own
    zero = np.abs(codes) < 1e-9
    assert zero.any()
    assert not zero.all()
    assert np.abs(slope[zero]).max() <= 0.5 + 1e-6
    np.testing.assert_allclose(slope[~zero], 0.5 * np.sign(codes[~zero]), atol=1e-6)


def test_dsr_sparse_codes_have_converged_on_an_image(small):
    features = dsr.compute_superpixel_features(small)
    templates = features[small.border]
    settled = np.square(features - dsr.solve_lasso(features, templates, dsr.LASSO_WEIGHT, 5000) @ templates).sum(axis=1)
    assert np.corrcoef(dsr.compute_sparse_error(features, templates), settled)[0, 1] > 0.99


def test_dsr_errors_are_propagated_to_similar_superpixels(small):
    features, error = dsr.compute_superpixel_features(small), np.random.default_rng(0).random(len(small))
    context = dsr.compute_feature_affinity(features)
    np.testing.assert_allclose(context.sum(axis=1), 1.0)
    spread = error
    for _ in range(300):
        spread = dsr.CONTEXT_WEIGHT * context @ spread + (1 - dsr.CONTEXT_WEIGHT) * error
    np.testing.assert_allclose(dsr.propagate_error(error, context), spread, rtol=1e-9)


def test_distances_and_min_max_normalization():
    points = np.array([[0.0, 0.0], [3.0, 4.0]])
    assert compute_pairwise_distances(points).tolist() == [[0.0, 5.0], [5.0, 0.0]]
    assert normalize_min_max(np.array([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    for hopeless in ([5.0, 5.0], [0.0, 0.0], [1.0, np.nan], [1.0, np.inf]):
        assert np.isnan(normalize_min_max(np.array(hopeless))).all()


# -- maps --


def test_maps_are_squares_in_the_order_of_prior_names():
    image, disc = picture(60, 120, (30, 30), 15)
    maps = compute_prior_maps(image, 32)
    assert maps.shape == (len(PRIOR_NAMES), 32, 32)
    assert maps.dtype == np.float32
    assert maps.min() >= 0.0
    assert maps.max() <= 1.0
    for row in maps:
        r, c = np.unravel_index(row.argmax(), row.shape)
        assert disc[int((r + 0.5) * 60 / 32), int((c + 0.5) * 120 / 32)]
    superpixels = segment_superpixels(image)
    for name, row in zip(PRIOR_NAMES, maps, strict=True):
        assert abs(row.mean() - PRIORS[name](superpixels)[superpixels.labels].mean()) < 0.01


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 300), (300, 1), (1, 20_000), (20_000, 2), (7, 5), (16, 16)])
@pytest.mark.parametrize("plain", [True, False])
def test_any_image_gives_maps_that_are_finite_or_all_nan(shape, plain):
    rng = np.random.default_rng(0)
    image = np.full((*shape, 3), 77, np.uint8) if plain else rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = compute_prior_maps(image, 24)
    finite = np.isfinite(maps).mean(axis=(1, 2))
    assert set(finite.tolist()) <= {0.0, 1.0}
    assert not plain or not finite.any()


def test_large_images_are_shrunk_and_small_ones_left():
    assert shrink_image(np.zeros((600, 1200, 3), np.uint8)).shape == (MAX_LONG_SIDE // 2, MAX_LONG_SIDE, 3)
    assert shrink_image(np.zeros((1, 20_000, 3), np.uint8)).shape == (1, MAX_LONG_SIDE, 3)
    small = np.zeros((40, 30, 3), np.uint8)
    assert shrink_image(small) is small


def test_centre_prior_is_highest_in_the_middle_and_symmetric():
    prior = make_centre_prior(9)
    assert prior.shape == (9, 9)
    assert prior.dtype == np.float32
    assert prior.argmax() == 40
    assert prior.max() == 1.0
    np.testing.assert_array_equal(prior, prior[::-1])
    np.testing.assert_array_equal(prior, prior.T)


def max_f(maps, truths):
    """Highest F (beta² 0.3) of the curve of precision and recall, each averaged over the images."""
    thresholds = np.linspace(0, 1, 101)[:, None, None]
    precision, recall = np.zeros(101), np.zeros(101)
    for row, truth in zip(maps, truths, strict=True):
        found = row >= thresholds * row.max()
        hits = (found & truth).sum(axis=(1, 2))
        precision += hits / found.sum(axis=(1, 2)) / len(maps)
        recall += hits / truth.sum() / len(maps)
    return (1.3 * precision * recall / (0.3 * precision + recall)).max()


@pytest.mark.realdata
def test_every_prior_beats_the_centre_and_their_mean_is_good(realdata_dir):
    images = open_dataset(f"{realdata_dir / 'ecssd-dev.zip'}#images")
    masks = open_dataset(f"{realdata_dir / 'ecssd-dev.zip'}#masks")
    every_eighth = range(0, len(images), 8)
    maps = np.stack([compute_prior_maps(images.load(k), 64) for k in every_eighth])
    truths = [masks.load(k)[..., 0] > 127 for k in every_eighth]
    truths = [truth[np.ix_(*(np.arange(64) * side // 64 for side in truth.shape))] for truth in truths]
    centre = max_f([make_centre_prior(64)] * len(truths), truths)
    for number, name in enumerate(PRIOR_NAMES):
        assert max_f(maps[:, number], truths) > centre + 0.03, name
    assert max_f(maps.mean(axis=1), truths) > 0.74


def test_superpixels_can_be_built_by_hand():
    """Two regions side by side, none within: all border, so nothing to tell an object by."""
    halves = Superpixels(
        labels=np.array([[0, 1]], dtype=np.int32),
        lab=np.array([[20.0, 0, 0], [80.0, 0, 0]]),
        rgb=np.array([[0.2] * 3, [0.8] * 3]),
        centre=np.array([[0.5, 0.25], [0.5, 0.75]]),
        area=np.array([0.5, 0.5]),
        sides=np.ones((4, 2), dtype=bool),
        edges=np.array([[0, 1]]),
    )
    assert halves.is_featureless
