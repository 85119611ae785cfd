"""Where the splits of a data set come from, and that no image is in two of them."""

from __future__ import annotations

import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from relicctl.config.transfer import TransferConfig
from relicctl.data.datasets.open import open_dataset
from relicctl.errors import DataError
from relicctl.evaluation import transfer_data
from relicctl.evaluation.transfer_data import open_transfer_dataset, split_trainval


@pytest.fixture
def photos(tmp_path):
    def make(splits: dict[str, str], each: int = 5, root: str = "photos"):
        for split, classes in splits.items():
            for name in classes:
                for number in range(each):
                    path = tmp_path / root / split / name / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (8, 8), (number, ord(name[0]), len(split))).save(path)
        return tmp_path / root

    return make


def opened(spec, warnings=None, *, seed=0, **by_name):
    """The data set ``x`` at ``spec``, with keys of section data such as draw or test_split."""
    data = {"datasets": {"x": str(spec)}} | {key: {"x": value} for key, value in by_name.items()}
    config = TransferConfig.model_validate({"data": data, "seed": seed})
    return open_transfer_dataset("x", config, download=False, warn=(warnings if warnings is not None else []).append)


def test_folder_archive_and_pattern_are_the_same(photos, tmp_path):
    folder = photos({"train": "abc", "val": "abc", "test": "abc"})
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path))
    found = [opened(spec) for spec in (folder, f"{folder}/{{split}}", f"{tmp_path / 'one.zip'}#photos")]
    for data in found:
        assert (data.num_train, len(data.trainval.labels), len(data.test.labels)) == (15, 30, 15)
        assert data.trainval.source.compute_fingerprint() == found[0].trainval.source.compute_fingerprint()
        assert data.trainval.source.load(20)[0, 0].tolist() == [0, ord("b"), 3]  # of val, whose name is three long
    division = split_trainval(found[0], "all", 0.2, 0)
    assert (division.train.tolist(), division.val.tolist()) == (list(range(15)), list(range(15, 30)))


def test_without_val_a_part_of_train_is_cut_and_said_so(photos):
    data = opened(photos({"train": "abc", "test": "abc"}))
    division = split_trainval(data, "all", 0.2, 0)
    assert np.bincount(data.trainval.labels[division.val]).tolist() == [1, 1, 1]
    assert sorted([*division.train, *division.val]) == list(range(15))
    assert "cut" in division.val_source


def test_val_can_be_what_is_tested_on(photos):
    folder = photos({"train": "abc", "val": "abc"})
    data = opened(folder, test_split="val")
    assert (data.num_train, len(data.trainval.labels), len(data.test.labels)) == (15, 15, 15)
    assert data.test.source.load(0)[0, 0].tolist() == [0, ord("a"), 3]
    with pytest.raises(DataError, match="no test split") as refused:
        opened(folder)
    assert "test_split={x: val}" in refused.value.fix


@pytest.mark.parametrize(("draw", "tested"), [((3,), 9), ((2, 2), 6)])
def test_without_splits_a_counted_draw_makes_them(photos, draw, tested):
    folder = photos({"": "abc"}, each=6)
    data = opened(folder, samples_per_class=draw)
    assert np.bincount(data.trainval.labels).tolist() == [draw[0]] * 3
    assert np.bincount(data.test.labels).tolist() == [tested // 3] * 3
    names = [{part.source.get_name(row) for row in range(len(part.labels))} for part in (data.trainval, data.test)]
    assert len(names[0] | names[1]) == len(data.trainval.labels) + tested
    again, other = opened(folder, samples_per_class=draw), opened(folder, samples_per_class=draw, seed=1)
    assert (
        again.trainval.source.compute_fingerprint()
        == data.trainval.source.compute_fingerprint()
        != other.trainval.source.compute_fingerprint()
    )
    division = split_trainval(data, "all", 0.3, 0)
    assert np.bincount(data.trainval.labels[division.val]).tolist() == [1, 1, 1]


@pytest.mark.parametrize("draw", [(6,), (7,), (4, 3)])
def test_no_more_is_drawn_than_there_is(photos, draw):
    with pytest.raises(DataError, match="only 6 images of"):
        opened(photos({"": "abc"}, each=6), samples_per_class=draw)


def test_fewer_images_than_classes_are_refused(photos, monkeypatch):
    def with_more_classes(*args, **kwargs):
        source = open_dataset(*args, **kwargs)
        source.classes = ("a", "b", *"cdefgh")  # as torchvision may name classes of which it lists no image
        return source

    monkeypatch.setattr(transfer_data, "open_dataset", with_more_classes)
    with pytest.raises(DataError, match="4 images to train on, fewer than its 8 classes"):
        opened(photos({"train": "ab", "test": "ab"}, each=2))


def test_few_labels_are_of_train_alone(photos):
    data = opened(photos({"train": "abc", "val": "abc", "test": "abc"}))
    division = split_trainval(data, "2-per-class", 0.2, 0)
    assert max(*division.train, *division.val) < data.num_train
    assert (len(division.train), len(division.val)) == (3, 3)
    with pytest.raises(DataError, match="too few labels"):
        split_trainval(data, "1-per-class", 0.2, 0)


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
        ({"test": "abc"}, "no train split"),
        ({"train": "a", "test": "a"}, "two classes"),
        ({"train": "ab", "test": "abc"}, "not in train"),
    ],
)
def test_what_makes_no_data_set_is_refused(photos, splits, says):
    with pytest.raises(DataError, match=says):
        opened(photos(splits))


def test_a_set_of_torchvision_without_val_is_never_chosen_on_its_test(tmp_path, monkeypatch):
    from torchvision import datasets

    class USPS(datasets.VisionDataset):
        def __init__(self, root, train=True, download=False):
            self.data = np.full((10, 16, 16), 7 if train else 8, dtype=np.uint8)
            self.targets = [0, 1] * 5

    monkeypatch.setattr(datasets, "USPS", USPS)
    data = opened(f"torchvision:USPS:{tmp_path}")
    assert data.num_train == len(data.trainval.labels) == 10
    division = split_trainval(data, "all", 0.2, 0)
    assert all(data.trainval.source.load(int(row)).max() == 7 for row in (*division.train, *division.val))
    assert data.test.source.load(0).max() == 8


@pytest.mark.parametrize("lacking", ["val", "test"])
def test_a_split_of_a_single_class_is_one(photos, lacking):
    warnings: list[str] = []
    data = opened(photos({"train": "abc", "val": "abc", "test": "abc"} | {lacking: "b"}), warnings)
    assert "2 classes have no image" in warnings[0]
    labels = data.test.labels if lacking == "test" else data.trainval.labels[data.num_train :]
    assert labels.tolist() == [1] * 5


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", "Valid", "Test"),
        ("training", "validation", "testing"),
        ("TRAIN", "VAL", "TEST"),
        ("trainval", "", "test"),
    ],
)
def test_splits_are_found_by_their_usual_names_in_any_case(photos, tmp_path, train, val, test):
    folder = photos({name: "abc" for name in (train, val, test) if name})
    make_zip = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "photos")  # photos/ encloses everything
    for split in (train, val, test):
        if split:
            shutil.copytree(folder / split, tmp_path / f"x-{split}")
    for spec in (folder, make_zip, f"{tmp_path}/x-{{split}}"):
        data = opened(spec)
        assert (data.num_train, len(data.trainval.labels), len(data.test.labels)) == (15, 30 if val else 15, 15)
        assert data.test.source.load(0)[0, 0, 2] == len(test)


def test_to_test_on_val_means_val_by_any_of_its_names(photos):
    folder = photos({"Training": "abc", "Validation": "abc"})
    with pytest.raises(DataError, match="no test split"):
        opened(folder)
    data = opened(folder, test_split="val")
    assert (data.num_train, len(data.trainval.labels), len(data.test.labels)) == (15, 15, 15)
    assert data.test.source.load(0)[0, 0, 2] == len("Validation")


@pytest.mark.parametrize("packed", [False, True])
def test_class_folders_without_splits_are_divided_and_said_so(photos, tmp_path, packed):
    spec = photos({"": ["a", "b"]}, each=10)
    if packed:
        spec = shutil.make_archive(str(tmp_path / "packed"), "zip", spec)
    warnings: list[str] = []
    data = opened(spec, warnings)
    assert len(warnings) == 1
    assert "4 of its 20 images" in warnings[0]
    assert "seed 0" in warnings[0]
    assert "20% of each class" in data.draw
    assert np.bincount(data.trainval.labels).tolist() == [8, 8]
    assert np.bincount(data.test.labels).tolist() == [2, 2]
    names = [{part.source.get_name(row) for row in range(len(part.labels))} for part in (data.trainval, data.test)]
    assert len(names[0] | names[1]) == 20
    assert opened(spec).test.source.compute_fingerprint() == data.test.source.compute_fingerprint()
    assert opened(spec, seed=1).test.source.compute_fingerprint() != data.test.source.compute_fingerprint()
    with pytest.raises(DataError, match="no train split"):  # what is asked for is not there
        opened(spec, test_split="val")


def test_trains_are_a_class_where_nothing_is_a_split(photos):
    data = opened(photos({"": ["train", "bus", "plane"]}))
    assert data.trainval.classes == ("bus", "plane", "train")
    assert data.draw


def test_a_stray_image_in_train_makes_no_classes_of_the_splits(photos):
    folder = photos({"train": "ab", "extra": "ab"})
    Image.new("RGB", (8, 8)).save(folder / "train/cover.png")
    warnings: list[str] = []
    with pytest.raises(DataError, match="no test split"):
        opened(folder, warnings)
    assert "cover.png" in warnings[0]


def test_folders_of_another_task_are_no_classes(photos):
    with pytest.raises(DataError, match="no train split"):
        opened(photos({"": ["images", "masks"]}))


def test_composed_and_decomposed_classes_are_the_same(photos):
    folder = photos({"train": ["café", "tea"], "val": ["cafe\u0301", "tea"], "test": ["cafe\u0301", "tea"]})
    warnings: list[str] = []
    data = opened(folder, warnings)
    assert not warnings
    assert sorted(np.bincount(data.test.labels).tolist()) == [5, 5]
    assert data.trainval.classes == ("café", "tea")


def test_a_set_of_torchvision_without_splits_is_divided_and_said_so(tmp_path, monkeypatch):
    from torchvision import datasets

    class USPS(datasets.VisionDataset):
        def __init__(self, root, download=False):
            self.data = np.zeros((20, 16, 16), dtype=np.uint8)
            self.targets = [0, 1] * 10

    monkeypatch.setattr(datasets, "USPS", USPS)
    warnings: list[str] = []
    data = opened(f"torchvision:USPS:{tmp_path}", warnings)
    assert (len(data.trainval.labels), len(data.test.labels)) == (16, 4)
    assert "has no splits" in warnings[0]
    with pytest.raises(DataError, match="no image data set 'USP'"):
        opened(f"torchvision:USP:{tmp_path}")
