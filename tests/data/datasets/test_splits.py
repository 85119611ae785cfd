"""Folders that are splits by their names are not taken for classes, whatever lies beside them."""

from __future__ import annotations

import pytest

from relicctl.data.datasets.open import check_splits, infer_classes
from relicctl.data.datasets.splits import SPLIT_FOLDERS, find_mixed_splits, get_split, spell_split
from relicctl.errors import DataError


def infer(folders, stray=()):
    warnings: list[str] = []
    names = [*(f"{folder}/1.jpg" for folder in folders), *stray]
    check_splits(names, "photos", warnings.append)
    return infer_classes(names), warnings


@pytest.mark.parametrize("split", SPLIT_FOLDERS)
def test_a_split_is_known_by_all_its_names_in_any_case(split):
    for name in SPLIT_FOLDERS[split]:
        assert {get_split(spelling) for spelling in spell_split(name)} == {split}


@pytest.mark.parametrize(
    ("folders", "stray"),
    [
        (["train", "val", "extra"], []),
        (["train/cat", "train/dog", "val/cat", "extra/cat"], []),
        (["Train", "TEST"], []),
        (["training", "validation"], []),
        (["train", "val"], ["cover.jpg"]),
        (["train2017", "val2017", "annotations"], []),
        (["training_set", "test_set"], []),
        (["in/train", "in/test", "in/other"], []),
        (["val", "validation"], []),
    ],
)
def test_splits_beside_anything_are_refused_with_one_to_name(folders, stray):
    with pytest.raises(DataError, match="are splits, not classes") as refused:
        infer(folders, stray)
    named = refused.value.fix.removeprefix("Name one of them, for example photos#").partition(";")[0].rstrip(".")
    assert any(f"{folder}/".startswith(f"{named}/") for folder in folders)


@pytest.mark.parametrize(
    "folders", [["train", "bus", "plane"], ["test1", "test2"], ["train2016", "train2017"], ["training", "sleeping"]]
)
def test_a_single_split_name_among_classes_is_a_class(folders):
    (classes, labels), warnings = infer(folders)
    assert classes == tuple(sorted(folders))
    assert len(labels) == len(folders)
    assert not warnings


def test_splits_within_classes_are_told_once():
    (classes, _), warnings = infer(["cat/train", "cat/test", "dog/train", "dog/test"])
    assert classes == ("cat", "dog")
    assert len(warnings) == 1
    assert "test and train in cat" in warnings[0]


def test_splits_are_found_at_any_depth():
    assert find_mixed_splits(["a/b/train/x", "a/b/val", "c", ""]) == {"a/b": ["train", "val"]}
