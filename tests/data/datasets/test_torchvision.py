"""The data sets are laid out here as torchvision unpacks them; nothing is downloaded."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from relicctl.data.datasets.open import open_dataset
from relicctl.errors import DataError


def save(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (value, 0, 0)).save(path, "PNG")


@pytest.fixture
def dtd(tmp_path) -> Path:
    """Textures: listed by split, images apart."""
    for split, first in (("train", 1), ("val", 3), ("test", 5)):
        lines = []
        for number, kind in enumerate(("woven", "banded")):
            save(tmp_path / f"dtd/dtd/images/{kind}/{split}.jpg", first + number)
            lines.append(f"{kind}/{split}.jpg")
        labels = tmp_path / f"dtd/dtd/labels/{split}1.txt"
        labels.parent.mkdir(exist_ok=True)
        labels.write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def stl10(tmp_path, monkeypatch) -> Path:
    """Arrays with the channels first and, by STL-10's habit, columns before rows."""
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    base = tmp_path / "stl10_binary"
    base.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 96, 96), dtype=np.uint8)
    pixels[:3].tofile(base / "train_X.bin")
    pixels[3:].tofile(base / "unlabeled_X.bin")
    pixels[:2].tofile(base / "test_X.bin")
    np.array([1, 10, 3], dtype=np.uint8).tofile(base / "train_y.bin")
    np.array([2, 2], dtype=np.uint8).tofile(base / "test_y.bin")
    (base / "class_names.txt").write_text("\n".join("abcdefghij"))
    return tmp_path


def refused(spec: str, **options) -> DataError:
    with pytest.raises(DataError) as error:
        open_dataset(spec, **options)
    return error.value


def test_files_are_read_by_our_decoder_with_torchvisions_labels(dtd):
    source = open_dataset(f"torchvision:DTD:{dtd}")
    assert [source.get_name(index) for index in range(2)] == [
        "dtd/dtd/images/woven/train.jpg",
        "dtd/dtd/images/banded/train.jpg",
    ]
    assert source.classes == ("banded", "woven")
    assert source.labels.tolist() == [1, 0]
    assert isinstance(source.read(0), bytes)
    assert [source.load(index)[0, 0, 0] for index in range(2)] == [1, 2]
    assert pickle.loads(pickle.dumps(source)).compute_fingerprint() == source.compute_fingerprint()


def test_the_split_follows_the_use_unless_it_is_named(dtd):
    values = {
        "train": open_dataset(f"torchvision:DTD:{dtd}", split="train"),
        "val": open_dataset(f"torchvision:DTD:{dtd}", split="val"),
        "test": open_dataset(f"torchvision:DTD:{dtd}#test", split="train"),
    }
    assert {name: source.load(0)[0, 0, 0] for name, source in values.items()} == {
        "train": 1,
        "val": 3,
        "test": 5,
    }
    error = refused(f"torchvision:DTD:{dtd}#dev")
    assert "train" in error.what
    assert "dev" in error.what


def test_arrays_are_served_as_rows_columns_channels(stl10):
    source = open_dataset(f"torchvision:STL10:{stl10}")
    stored = np.fromfile(stl10 / "stl10_binary/train_X.bin", dtype=np.uint8).reshape(3, 3, 96, 96)
    image = source.load(2)
    assert np.array_equal(image, stored[2].transpose(2, 1, 0))
    assert image.flags.c_contiguous
    image[:] = 0  # a copy: the data set stays as it is
    assert source.load(2).any()
    assert source.classes == tuple("abcdefghij")
    assert source.labels.tolist() == [0, 9, 2]
    assert len(open_dataset(f"torchvision:STL10:{stl10}", split="val")) == 2
    assert len({source.get_name(index) for index in range(3)}) == 3


@pytest.mark.parametrize(("split", "count"), [("unlabeled", 2), ("train+unlabeled", 5)])
def test_samples_without_a_class_make_the_data_unlabelled(stl10, split, count):
    source = open_dataset(f"torchvision:STL10:{stl10}#{split}")
    assert len(source) == count
    assert source.labels is None
    assert source.classes == ()
    assert source.load(count - 1).shape == (96, 96, 3)


def test_training_is_told_from_test_by_a_flag_and_grey_becomes_rgb(tmp_path, monkeypatch):
    class USPS(datasets.VisionDataset):
        def __init__(self, root, train=True, download=False):
            print("torchvision talks")
            self.data = np.full((2, 16, 16), 7 if train else 8, dtype=np.uint8)
            self.targets = [3, 1]

    monkeypatch.setattr(datasets, "USPS", USPS)
    train, val = (open_dataset(f"torchvision:USPS:{tmp_path}", split=split) for split in ("train", "val"))
    assert np.array_equal(train.load(0), np.full((16, 16, 3), 7))
    assert np.array_equal(val.load(0), np.full((16, 16, 3), 8))
    assert train.classes == ("0", "1", "2", "3")
    assert np.array_equal(open_dataset(f"torchvision:USPS:{tmp_path}#test").load(0), val.load(0))
    for foreign in ("unlabeled", "val"):  # whoever names val wants images to choose on, and gets none of the test's
        assert foreign in refused(f"torchvision:USPS:{tmp_path}#{foreign}").what


def test_stdout_is_left_for_results(tmp_path, monkeypatch, capsys):
    test_training_is_told_from_test_by_a_flag_and_grey_becomes_rgb(tmp_path, monkeypatch)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "torchvision talks" in captured.err


def test_data_without_splits_are_not_used_twice(tmp_path):
    for kind in ("Forest", "River"):
        save(tmp_path / f"eurosat/2750/{kind}/1.jpg", 1)
    assert open_dataset(f"torchvision:EuroSAT:{tmp_path}").classes == ("Forest", "River")
    error = refused(f"torchvision:EuroSAT:{tmp_path}", split="val")
    assert "eval.val_fraction" in error.fix


def test_caltech101s_files_are_numbered_by_class_and_its_background_is_none(tmp_path):
    base = tmp_path / "caltech101/101_ObjectCategories"
    for number, path in enumerate(
        ["BACKGROUND_Google/image_0001", "ant/image_0001", "ant/image_0002", "bee/image_0001"]
    ):
        save(base / f"{path}.jpg", number)
    source = open_dataset(f"torchvision:Caltech101:{tmp_path}")
    assert (source.classes, source.labels.tolist()) == (("ant", "bee"), [0, 0, 1])
    assert [source.load(index)[0, 0, 0] for index in range(3)] == [1, 2, 3]


def test_sun397_is_in_one_order_whatever_the_file_system_lists(tmp_path, monkeypatch):
    base = tmp_path / "SUN397"
    for number, path in enumerate(["a/abbey/sun_b", "b/balcony/exterior/sun_a", "a/abbey/sun_a"]):
        save(base / f"{path}.jpg", number)
    (base / "ClassName.txt").write_text("/a/abbey\n/b/balcony/exterior\n")
    source = open_dataset(f"torchvision:SUN397:{tmp_path}")
    assert source.classes == ("abbey", "balcony/exterior")
    assert source.labels.tolist() == [0, 0, 1]
    assert [source.load(index)[0, 0, 0] for index in range(3)] == [2, 0, 1]
    listing = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(listing(self, pattern))))
    assert open_dataset(f"torchvision:SUN397:{tmp_path}").compute_fingerprint() == source.compute_fingerprint()


@pytest.mark.parametrize("wrong", ["CIFAR11", "cifar10", "Cifar-10"])
def test_an_unknown_name_brings_the_closest(wrong):
    error = refused(f"torchvision:{wrong}")
    assert "CIFAR10" in error.fix


@pytest.mark.parametrize("name", ["ImageFolder", "FakeData", "", "wrap_dataset_for_transforms_v2"])
def test_what_is_no_data_set_is_unknown(name):
    assert "no image data set" in refused(f"torchvision:{name}").what


@pytest.mark.parametrize("name", ["CIFAR10", "STL10", "Imagenette", "Food101", "OxfordIIITPet", "DTD"])
def test_what_is_not_there_names_the_download(tmp_path, name):
    error = refused(f"torchvision:{name}:{tmp_path}")
    assert name in error.what
    assert "--download" in error.fix


def test_a_failed_download_is_told(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    error = refused(f"torchvision:CIFAR10:{tmp_path}", download=True)
    assert "no route to host" in error.what
    assert str(tmp_path) in error.fix


def test_what_can_no_longer_be_downloaded_is_to_be_fetched_by_hand(tmp_path):
    error = refused(f"torchvision:StanfordCars:{tmp_path}", download=True)
    assert "cannot be downloaded" in error.what
    assert "by hand" in error.fix


@pytest.mark.parametrize("name", ["Kinetics", "PhotoTour"])
def test_other_kinds_of_data_are_refused(tmp_path, name):
    assert "not a list of images" in refused(f"torchvision:{name}:{tmp_path}").what
