"""Braces stand for what a shell makes of them, and a spec for every folder that it names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relicctl.data.datasets.specs import expand_braces, find_data_folders
from relicctl.errors import DataError

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


def test_the_folders_of_data_are_those_of_every_split_and_shard(tmp_path):
    for name in ("x-train", "x-Test", "a1", "a2"):
        (tmp_path / name).mkdir()
    assert find_data_folders(f"{tmp_path}/x-{{split}}") == [f"{tmp_path}/x-train", f"{tmp_path}/x-Test"]
    assert find_data_folders(f"{tmp_path}/a{{1..2}}#in") == [f"{tmp_path}/a1/in", f"{tmp_path}/a2/in"]
    (tmp_path / "a.zip").touch()
    assert find_data_folders("shapes") == find_data_folders(f"{tmp_path}/a.zip") == []
