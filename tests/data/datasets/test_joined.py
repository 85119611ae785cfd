"""Several data sets as one: nothing of any is lost, classes go by name, and one alone is what it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relicctl.data.datasets.joined import list_unlabelled_specs, open_joined_dataset
from relicctl.data.datasets.open import check_data_exists, open_dataset
from relicctl.errors import DataError, UsageError

SHAPES = "shapes:size=16,train=12,val=4"


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders ``one`` of the classes a and b, ``two`` of b and c, and ``flat`` of none."""
    for number, name in enumerate(("one/b/0", "one/a/1", "two/c/2", "two/b/3", "two/b/4", "flat/5")):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_data_set_is_opened_as_ever(photos: Path) -> None:
    joined, alone = open_joined_dataset(["one"]), open_dataset("one")
    assert joined.compute_fingerprint() == alone.compute_fingerprint()
    assert [joined.get_name(row) for row in range(2)] == ["a/1.png", "b/0.png"]


def test_every_image_is_there_with_its_class(photos: Path) -> None:
    joined = open_joined_dataset(["two", "one"])
    assert joined.labels is not None
    found = [(int(joined.load(row)[0, 0, 0]), joined.classes[joined.labels[row]]) for row in range(len(joined))]
    assert sorted(found) == [(0, "b"), (1, "a"), (2, "c"), (3, "b"), (4, "b")]
    assert joined.classes == ("a", "b", "c")
    assert joined.specs == joined.select([0]).specs == ("two", "one")


def test_names_are_unique_and_do_not_depend_on_where_the_data_are(photos: Path) -> None:
    def open_at(root: Path) -> tuple[str, list[str]]:
        joined = open_joined_dataset([f"{root}/one", f"{root}/two"])
        return joined.compute_fingerprint(), [joined.get_name(row) for row in range(len(joined))]

    shutil.copytree(photos, photos / "elsewhere")
    before = open_at(photos)
    assert before == open_at(photos / "elsewhere")
    assert len(set(before[1])) == 5


def test_one_unlabelled_set_makes_all_unlabelled(photos: Path) -> None:
    joined = open_joined_dataset(["one", "flat"])
    assert (joined.labels, joined.classes) == (None, ())
    assert list_unlabelled_specs(joined) == ["flat"]
    assert list_unlabelled_specs(open_joined_dataset(["one", "two"])) == []


def test_data_of_all_kinds_are_joined(photos: Path) -> None:
    joined, shapes = open_joined_dataset([SHAPES, "one"]), open_dataset(SHAPES)
    assert joined.labels is not None
    assert shapes.labels is not None
    assert np.array_equal(joined.load(3), shapes.load(3))
    assert [joined.classes[label] for label in joined.labels[:12]] == [shapes.classes[i] for i in shapes.labels]
    assert joined.namespace == shapes.namespace


def test_the_same_data_set_twice_is_refused(photos: Path) -> None:
    with pytest.raises(UsageError, match="one is given twice"):
        open_joined_dataset(["one", "two", "one"])


def test_a_path_that_is_not_there_is_told_before_anything_is_opened(photos: Path) -> None:
    (photos / "part-val.zip").touch()
    for spec in ("one", "one#a", "{one,two}", "part-{split}.zip", "shapes", "torchvision:CIFAR10"):
        check_data_exists(spec)
    for spec in ("three", "{one,three}", "three#a", "x-{split}.zip"):
        with pytest.raises(DataError, match="There is no folder"):
            check_data_exists(spec)
