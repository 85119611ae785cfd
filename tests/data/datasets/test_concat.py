"""Several data sets as one: every sample of each, under names that stay unique wherever the data lie."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from relicctl.data.datasets.base import ConcatDataset, ImageDataset
from relicctl.data.datasets.open import open_dataset


@pytest.fixture
def sources(tmp_path) -> list[ImageDataset]:
    """Two folders with equal names, and drawn images."""
    for folder, count in (("a", 3), ("b", 2)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            colour = (number, ord(folder), 7)
            Image.new("RGB", (4, 5), colour).save(tmp_path / folder / f"{number}.png")
    return [*(open_dataset(str(tmp_path / folder)) for folder in "ab"), open_dataset("shapes:size=16,train=4")]


def test_samples_are_those_of_the_sources_in_their_order(sources):
    joined = ConcatDataset(sources)
    assert len(joined) == 3 + 2 + 4
    assert joined.labels is None
    assert joined.classes == ()
    number = 0
    for place, source in enumerate(sources):
        for index in range(len(source)):
            assert joined.get_name(number) == f"{place}/{source.get_name(index)}"
            assert joined.size(number) == source.size(index)
            np.testing.assert_array_equal(joined.load(number), source.load(index))
            number += 1
    assert len({joined.get_name(index) for index in range(len(joined))}) == len(joined)
    for outside in (-1, len(joined)):
        with pytest.raises(IndexError):
            joined.get_name(outside)


def test_a_selection_and_a_pickled_copy_are_the_same_samples(sources):
    joined = ConcatDataset(sources)
    some = joined.select([8, 0, 4])
    assert [some.get_name(k) for k in range(3)] == [joined.get_name(i) for i in (8, 0, 4)]
    copy = pickle.loads(pickle.dumps(joined))
    assert copy.compute_fingerprint() == joined.compute_fingerprint()
    np.testing.assert_array_equal(copy.load(4), joined.load(4))


def test_the_fingerprint_depends_on_order_and_content_but_not_on_the_place(sources, tmp_path):
    joined = ConcatDataset(sources)
    assert ConcatDataset(sources[::-1]).compute_fingerprint() != joined.compute_fingerprint()
    assert ConcatDataset(sources[:2]).compute_fingerprint() != joined.compute_fingerprint()
    for folder in "ab":
        shutil.move(tmp_path / folder, tmp_path / f"moved-{folder}")
    moved = [open_dataset(str(tmp_path / f"moved-{folder}")) for folder in "ab"]
    again = ConcatDataset([*moved, sources[2]])
    assert again.compute_fingerprint() == joined.compute_fingerprint()
    assert [again.get_name(i) for i in range(9)] == [joined.get_name(i) for i in range(9)]
