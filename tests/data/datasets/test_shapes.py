"""The demo data: pure, honest about its backgrounds, and with masks that are the objects."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from relicctl.data.datasets.open import open_dataset
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.datasets.shapes_drawing import CLASSES, NUM_UNIFORMS, OBJECTS, TEXTURES, render_image
from relicctl.errors import DataError


def shapes(spec: str = "shapes", split: str = "train") -> ShapesDataset:
    source = open_dataset(spec, split=split)
    assert isinstance(source, ShapesDataset)
    return source


def eroded(mask: np.ndarray) -> np.ndarray:
    height, width = mask.shape
    padded = np.pad(mask, 1)
    return np.logical_and.reduce([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)])


# ---- laws


def test_a_picture_depends_on_seed_split_and_index_alone():
    few, many, test = shapes("shapes:train=20"), shapes(), shapes(split="val")
    for index in (19, 3, 7):  # in any order, whatever else was read
        np.testing.assert_array_equal(few.read(index), many.read(index))
        np.testing.assert_array_equal(few.load_mask(index), many.load_mask(index))
        assert (many.read(index) != test.read(index)).any()
        assert (many.read(index) != shapes("shapes:seed=1").read(index)).any()


def test_pickled_and_selected_sources_show_the_same_pictures():
    source = shapes()
    rows = np.array([311, 5, 42])
    chosen = source.select(rows)
    again = pickle.loads(pickle.dumps(chosen)).select([2, 0])
    assert [again.get_name(i) for i in range(2)] == [source.get_name(42), source.get_name(311)]
    assert again.labels.tolist() == source.labels[[42, 311]].tolist()
    np.testing.assert_array_equal(again.read(0), source.read(42))
    np.testing.assert_array_equal(again.load_mask(1), source.load_mask(311))


def test_training_backgrounds_follow_the_label_as_often_as_asked():
    for correlation in (0.0, 0.5, 0.8, 1.0):
        source = shapes(f"shapes:train=20000,correlation={correlation}")
        assert np.mean(source.background_ids == source.labels) == pytest.approx(correlation, abs=0.015)
        wrong = (source.background_ids - source.labels)[source.background_ids != source.labels] % 10
        if len(wrong):  # any other background is as likely as the next
            assert np.bincount(wrong, minlength=10)[1:] / len(wrong) == pytest.approx(1 / 9, abs=0.02)


def test_test_backgrounds_tell_nothing_about_the_label():
    source = shapes("shapes:val=50000", "val")
    table = np.histogram2d(source.labels, source.background_ids, bins=10)[0] / len(source)
    assert table == pytest.approx(0.01, abs=0.002)


@pytest.mark.parametrize("size", [48, 64])
def test_a_swapped_background_leaves_the_object_as_it_is(size):
    variants = [shapes(f"shapes:size={size},backgrounds={name}", "val") for name in ("random", "matched", "swapped")]
    assert (variants[1].background_ids == variants[1].labels).all()
    assert (variants[2].background_ids != variants[2].labels).all()
    for index in range(30):
        first, *others = (source.read(index).astype(int) for source in variants)
        mask = variants[0].load_mask(index)
        inner = eroded(eroded(mask))  # the rim is mixed with what lies behind it
        for source, other in zip(variants[1:], others, strict=True):
            np.testing.assert_array_equal(source.load_mask(index), mask)
            assert inner.any()
            same = (np.abs(first - other) <= 1).all(-1)  # float32 may round to the next grey level
            assert same[inner].mean() > 0.99  # in the notch between two parts a pixel may be mixed
        assert (others[0] != others[1])[~mask].mean() > 0.8


def test_classes_are_balanced_and_named_in_the_keys():
    source = shapes()
    assert source.classes == CLASSES == tuple(sorted(CLASSES))
    assert np.bincount(source.labels).tolist() == [400] * 10
    assert source.get_name(12) == "train/flower/00012"
    assert len({source.get_name(index) for index in range(len(source))}) == len(source)


# ---- details


def test_the_whole_default_set_has_its_shape():
    train, test = shapes(), shapes(split="val")
    assert (len(train), len(test)) == (4000, 1000)
    image, mask = train.load(0), train.load_mask(0)
    assert image.shape == (48, 48, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert mask.shape == (48, 48)
    assert mask.dtype == bool


def test_every_object_covers_a_fair_share_of_its_image():
    source = shapes("shapes:train=300")
    shares = np.array([source.load_mask(index).mean() for index in range(300)])
    assert shares.min() > 0.05
    assert shares.max() < 0.7
    for label in range(10):
        assert 0.12 < shares[source.labels == label].mean() < 0.5


def test_the_extremes_of_every_object_and_texture_can_be_drawn():
    for level in (0.0, np.nextafter(1.0, 0.0)):
        for kind, background in zip(range(len(OBJECTS)), range(len(TEXTURES)), strict=True):
            image, mask = render_image(np.full(NUM_UNIFORMS, level), kind, background, 16)
            assert image.std() > 0
            assert mask.any()
            assert not mask.all()


def test_the_fingerprint_knows_all_that_changes_a_picture():
    specs = [
        "shapes", "shapes:seed=1", "shapes:size=64", "shapes:train=3999", "shapes:correlation=0.7",
    ]  # fmt: skip
    prints = [shapes(spec).compute_fingerprint() for spec in specs] + [shapes(split="val").compute_fingerprint()]
    prints.append(shapes().select([1, 0]).compute_fingerprint())
    assert len(set(prints)) == len(prints)
    assert shapes("shapes:").compute_fingerprint() == shapes("shapes:seed=0,size=48").compute_fingerprint() == prints[0]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("shapes:sise=48", "size"),
        ("shapes:zzz=1", "correlation"),
        ("shapes:size", "pixels"),
        ("shapes:size=big", "pixels"),
        ("shapes:size=8", "16"),
        ("shapes:train=0", "from 1"),
        ("shapes:train=1e3", "from 1"),
        ("shapes:seed=-1", "from 0"),
        ("shapes:correlation=1.5", "from 0 to 1"),
        ("shapes:correlation=nan", "from 0 to 1"),
        ("shapes:backgrounds=none", "swapped"),
    ],
)
def test_a_setting_that_is_none_is_refused_with_what_would_do(spec, words):
    with pytest.raises(DataError) as refused:
        open_dataset(spec)
    assert words in refused.value.fix
    assert refused.value.code == 3
