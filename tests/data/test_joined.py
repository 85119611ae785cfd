"""Several data sets as one: every sample of each, under names that stay unique wherever the data lie."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from relicctl.data.joined import Joined
from relicctl.data.sources import Source, open_source


@pytest.fixture
def sources(tmp_path) -> list[Source]:
    """Two folders with equal names, and drawn images."""
    for folder, count in (("a", 3), ("b", 2)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            colour = (number, ord(folder), 7)
            Image.new("RGB", (4, 5), colour).save(tmp_path / folder / f"{number}.png")
    return [*(open_source(str(tmp_path / folder)) for folder in "ab"), open_source("shapes:size=16,train=4")]


def test_samples_are_those_of_the_sources_in_their_order(sources):
    joined = Joined(sources)
    assert len(joined) == 3 + 2 + 4
    assert joined.labels is None
    assert joined.classes == ()
    number = 0
    for place, source in enumerate(sources):
        for index in range(len(source)):
            assert joined.key(number) == f"{place}/{source.key(index)}"
            assert joined.size(number) == source.size(index)
            np.testing.assert_array_equal(joined.load(number), source.load(index))
            number += 1
    assert len({joined.key(index) for index in range(len(joined))}) == len(joined)
    for outside in (-1, len(joined)):
        with pytest.raises(IndexError):
            joined.key(outside)


def test_a_selection_and_a_pickled_copy_are_the_same_samples(sources):
    joined = Joined(sources)
    some = joined.select([8, 0, 4])
    assert [some.key(k) for k in range(3)] == [joined.key(i) for i in (8, 0, 4)]
    copy = pickle.loads(pickle.dumps(joined))
    assert copy.fingerprint() == joined.fingerprint()
    np.testing.assert_array_equal(copy.load(4), joined.load(4))


def test_the_fingerprint_depends_on_order_and_content_but_not_on_the_place(sources, tmp_path):
    joined = Joined(sources)
    assert Joined(sources[::-1]).fingerprint() != joined.fingerprint()
    assert Joined(sources[:2]).fingerprint() != joined.fingerprint()
    for folder in "ab":
        shutil.move(tmp_path / folder, tmp_path / f"moved-{folder}")
    moved = [open_source(str(tmp_path / f"moved-{folder}")) for folder in "ab"]
    again = Joined([*moved, sources[2]])
    assert again.fingerprint() == joined.fingerprint()
    assert [again.key(i) for i in range(9)] == [joined.key(i) for i in range(9)]
