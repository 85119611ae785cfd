"""Where the splits of a data set come from, and that no image is in two of them."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
from PIL import Image

from relicctl.errors import DataError
from relicctl.evaluation.parts import divide, open_data_set


@pytest.fixture
def photos(tmp_path):
    def make(splits: dict[str, str], each: int = 5, root: str = "photos"):
        for split, classes in splits.items():
            for name in classes:
                for number in range(each):
                    path = tmp_path / root / split / name / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (8, 8), (number, ord(name), len(split))).save(path)
        return tmp_path / root

    return make


def opened(spec, warnings=None):
    return open_data_set("x", str(spec), download=False, warn=(warnings if warnings is not None else []).append)


def test_folder_archive_and_pattern_are_the_same(photos, tmp_path):
    folder = photos({"train": "abc", "val": "abc", "test": "abc"})
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path))
    found = [opened(spec) for spec in (folder, f"{folder}/{{split}}", f"{tmp_path / 'one.zip'}#photos")]
    for data in found:
        assert (data.trained, len(data.known.labels), len(data.test.labels)) == (15, 30, 15)
        assert data.known.source.fingerprint() == found[0].known.source.fingerprint()
        assert data.known.source.load(20)[0, 0].tolist() == [0, ord("b"), 3]  # of val, whose name is three long
    division = divide(found[0], "all", 0.2, 0)
    assert (division.fit.tolist(), division.chosen_on.tolist()) == (list(range(15)), list(range(15, 30)))


def test_without_val_a_part_of_train_is_cut_and_said_so(photos):
    data = opened(photos({"train": "abc", "test": "abc"}))
    division = divide(data, "all", 0.2, 0)
    assert np.bincount(data.known.labels[division.chosen_on]).tolist() == [1, 1, 1]
    assert sorted([*division.fit, *division.chosen_on]) == list(range(15))
    assert "cut" in division.validation


def test_few_labels_are_of_train_alone(photos):
    data = opened(photos({"train": "abc", "val": "abc", "test": "abc"}))
    division = divide(data, "2-per-class", 0.2, 0)
    assert max(*division.fit, *division.chosen_on) < data.trained
    assert (len(division.fit), len(division.chosen_on)) == (3, 3)
    with pytest.raises(DataError, match="too few labels"):
        divide(data, "1-per-class", 0.2, 0)


def test_classes_that_val_lacks_are_told(photos):
    warnings: list[str] = []
    opened(photos({"train": "abc", "val": "ab", "test": "abc"}), warnings)
    assert len(warnings) == 1
    assert "'c'" in warnings[0]
    assert "val" in warnings[0]


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ({"train": "abc"}, "no test split"),
        ({"test": "abc"}, "no folder train"),
        ({"train": "a", "test": "a"}, "two classes"),
        ({"train": "ab", "test": "abc"}, "not in train"),
    ],
)
def test_what_makes_no_data_set_is_refused(photos, splits, says):
    with pytest.raises(DataError, match=says):
        opened(photos(splits))
