from __future__ import annotations

import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relicctl.data.datasets.archives import normalize_image_name
from relicctl.data.datasets.base import PackedNames
from relicctl.data.datasets.open import expand_braces
from relicctl.errors import DataError


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_packed_names_are_a_list_of_names(names):
    packed = PackedNames(names)
    assert list(packed) == names
    assert list(pickle.loads(pickle.dumps(packed))) == names
    with pytest.raises(IndexError):
        packed[len(names)]


BRACES = {
    "plain": ["plain"],
    "{0..2}": ["0", "1", "2"],
    "a{08..11}b": ["a08b", "a09b", "a10b", "a11b"],
    "{8..11}": ["8", "9", "10", "11"],
    "{2..0}": ["2", "1", "0"],
    "{5..5}": ["5"],
    "{x,y}-{0..1}": ["x-0", "x-1", "y-0", "y-1"],
    "{a,}": ["a", ""],
    "{a}{}{0...2}{-1..2}": ["{a}{}{0...2}{-1..2}"],
    "{": ["{"],
    "}{": ["}{"],
}


@pytest.mark.parametrize("text", BRACES)
def test_braces_expand_as_in_a_shell(text):
    assert expand_braces(text) == BRACES[text]


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 5))
def test_a_range_counts_every_number_once(first, last, width):
    names = expand_braces(f"{{{first:0{width}d}..{last:0{width}d}}}")
    assert sorted(map(int, names)) == list(range(min(first, last), max(first, last) + 1))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("text", ["{0..99999999999999999999999}", "{0..999}{0..999}"])
def test_a_mistyped_range_is_refused(text):
    with pytest.raises(DataError, match="more than"):
        expand_braces(text)


@given(st.text(alphabet="ab./\\:C", max_size=12))
def test_no_name_leads_out_of_its_root(name):
    usable = normalize_image_name(name + ".jpg")
    if usable is not None:
        assert not os.path.isabs(usable)
        assert os.path.normpath(os.path.join("/root", usable)).startswith("/root/")
        assert normalize_image_name(usable) == usable
