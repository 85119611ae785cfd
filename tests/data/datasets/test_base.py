from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relicctl.data.datasets.base import find_by_name
from relicctl.data.datasets.open import open_dataset
from relicctl.data.decoding import BadImageError
from relicctl.errors import DataError


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


TREE = {"cat/1.png": png(1), "cat/deep/er/2.png": png(2), "dog/3.png": png(3), "Ant/4.png": png(4)}


def make_folder(path: Path, tree: dict[str, bytes]) -> Path:
    for name, data in tree.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def make_zip(path: Path, tree: dict[str, bytes]) -> Path:
    path = path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in reversed(tree.items()):
            archive.writestr(name, data)
    return path


def make_tar(path: Path, tree: dict[str, bytes]) -> Path:
    path = path.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        for name, data in reversed(tree.items()):
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


MAKERS = [make_folder, make_zip, make_tar]


def keys(source) -> list[str]:
    return [source.get_name(index) for index in range(len(source))]


def classes(source) -> list[str]:
    return [source.classes[label] for label in source.labels]


def refused(spec: object, **options) -> DataError:
    with pytest.raises(DataError) as error:
        open_dataset(str(spec), **options)
    assert error.value.what.endswith(".")
    assert error.value.fix.endswith(".")
    return error.value


# ---------------------------------------------------------------- laws


def test_packing_does_not_matter(tmp_path):
    """A folder, a zip and a tar of the same files are the same data."""
    sources = [open_dataset(str(make(tmp_path / "data", TREE))) for make in MAKERS]
    for source in sources:
        assert keys(source) == sorted(TREE)
        assert [source.read(index) for index in range(4)] == [TREE[name] for name in sorted(TREE)]
        assert source.classes == ("Ant", "cat", "dog")
        assert classes(source) == ["Ant", "cat", "cat", "dog"]
        assert source.labels.dtype == np.int64
        assert [source.load(index)[0, 0, 0] for index in range(4)] == [4, 1, 2, 3]
    assert len({source.compute_fingerprint() for source in sources}) == 1


@pytest.mark.parametrize("make", MAKERS)
def test_the_mount_point_does_not_matter(tmp_path, make, monkeypatch):
    here = open_dataset(str(make(tmp_path / "here", TREE)))
    (tmp_path / "elsewhere").mkdir()
    there = make(tmp_path / "elsewhere/data", TREE)
    monkeypatch.chdir(there.parent)
    relative = open_dataset(there.name)
    assert (
        relative.compute_fingerprint() == here.compute_fingerprint() == open_dataset(str(there)).compute_fingerprint()
    )
    assert keys(relative) == keys(here)


@pytest.mark.parametrize("change", ["name", "size", "label", "order", "number"])
def test_the_fingerprint_tells_data_apart(tmp_path, change):
    original = open_dataset(str(make_zip(tmp_path / "a", TREE)))
    tree = dict(TREE)
    if change == "name":
        tree["cat/0.png"] = tree.pop("cat/1.png")
    elif change == "size":
        tree["cat/1.png"] += b" "
    elif change == "label":
        tree = {name.replace("cat/", "cat/cat/"): data for name, data in tree.items()}
    elif change == "number":
        del tree["cat/1.png"]
    other = open_dataset(str(make_zip(tmp_path / "b", tree)))
    if change == "order":
        other = other.select([3, 2, 1, 0])
    assert other.compute_fingerprint() != original.compute_fingerprint()
    assert original.select(range(4)).compute_fingerprint() == original.compute_fingerprint()


@pytest.mark.parametrize("make", MAKERS)
def test_a_selection_is_a_source_of_those_samples(tmp_path, make):
    source = open_dataset(str(make(tmp_path / "data", TREE)))
    some = source.select(np.array([3, 1, 2]))
    assert keys(some) == ["dog/3.png", "cat/1.png", "cat/deep/er/2.png"]
    assert classes(some) == ["dog", "cat", "cat"]
    assert some.classes == source.classes
    assert some.spec == source.spec
    assert [some.load(index)[0, 0, 0] for index in range(3)] == [3, 1, 2]
    again = some.select([2, 0])
    assert keys(again) == ["cat/deep/er/2.png", "dog/3.png"]
    assert again.read(1) == TREE["dog/3.png"]


@pytest.mark.parametrize("make", MAKERS)
def test_sources_survive_pickling(tmp_path, make):
    source = open_dataset(str(make(tmp_path / "data", TREE)))
    source.load(0)
    for one in (source, source.select([1, 2])):
        copy = pickle.loads(pickle.dumps(one))
        assert keys(copy) == keys(one)
        assert copy.compute_fingerprint() == one.compute_fingerprint()
        assert np.array_equal(copy.load(1), one.load(1))


def test_sources_do_not_import_torch():
    code = "import sys, relicctl.data.datasets.base; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- what is a class

LAYOUTS = {
    "flat": (["1.png", "2.png"], None),
    "one folder": (["cat/1.png", "cat/2.png"], None),
    "two classes": (["cat/1.png", "dog/1.png"], ["cat", "dog"]),
    "enclosed": (["photos/all/cat/1.png", "photos/all/dog/1.png"], ["cat", "dog"]),
    "deep classes": (["cat/a/1.png", "dog/b/c/1.png"], ["cat", "dog"]),
    "one beside the folders": (["cat/1.png", "dog/1.png", "preview.png"], None),
    "numbers": (["10/1.png", "9/1.png"], ["10", "9"]),
    "a common beginning is no folder": (["cats/1.png", "catfish/1.png"], ["catfish", "cats"]),
    "a hidden file does not count": (["cat/1.png", "dog/1.png", ".thumb.png"], ["cat", "dog"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [make_folder, make_zip])
def test_the_class_is_the_first_folder_level(tmp_path, layout, make):
    names, expected = LAYOUTS[layout]
    source = open_dataset(str(make(tmp_path / "data", dict.fromkeys(names, png(0)))))
    if expected is None:
        assert source.labels is None
        assert source.classes == ()
    else:
        assert classes(source) == expected
        assert source.classes == tuple(sorted(set(expected)))


@pytest.mark.parametrize("wrapper", ["", "data/"])
def test_splits_are_not_taken_for_classes(tmp_path, wrapper):
    tree = {f"{wrapper}{split}/{kind}/1.png": png(0) for split in ("Train", "test") for kind in ("cat", "dog")}
    path = make_zip(tmp_path / "data", tree)
    error = refused(path)
    assert "Train, test" in error.what
    named = error.fix.removeprefix("Name one of them, for example ").removesuffix(".")
    assert classes(open_dataset(named)) == ["cat", "dog"]


# ---------------------------------------------------------------- folders within, and several at once


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("folder", ["in/train", "in/train/", "/in/train"])
def test_a_folder_within_can_be_named(tmp_path, make, folder):
    tree = {f"in/{split}/{name}": data for split in ("train", "trainer") for name, data in TREE.items()}
    inner = open_dataset(f"{make(tmp_path / 'data', tree)}#{folder}")
    assert keys(inner) == sorted(TREE)
    assert inner.classes == ("Ant", "cat", "dog")
    assert inner.read(0) == TREE["Ant/4.png"]


def test_a_path_may_hold_the_signs_of_the_notation(tmp_path):
    assert keys(open_dataset(str(make_zip(tmp_path / "a#b{1,2}", TREE)))) == sorted(TREE)
    assert keys(open_dataset(f"{make_zip(tmp_path / 'a#b', TREE)}#cat")) == ["1.png", "deep/er/2.png"]


def test_shards_are_one_source(tmp_path):
    for number in range(8, 12):
        make_tar(tmp_path / f"s-{number:02d}", {"cat/x.png": png(number), "dog/x.png": png(100 + number)})
    source = open_dataset(f"{tmp_path}/s-{{08..11}}.tar")
    assert keys(source)[:2] == ["s-08.tar/cat/x.png", "s-08.tar/dog/x.png"]
    assert classes(source) == ["cat", "dog"] * 4
    assert [source.load(index)[0, 0, 0] for index in range(8)] == [8, 108, 9, 109, 10, 110, 11, 111]
    cats = open_dataset(f"{tmp_path}/s-{{08,10}}.tar#cat")
    assert keys(cats) == ["s-08.tar/cat/x.png", "s-10.tar/cat/x.png"]
    assert [cats.load(index)[0, 0, 0] for index in range(2)] == [8, 10]
    assert cats.labels is None


def test_folders_and_archives_mix(tmp_path):
    make_folder(tmp_path / "a", {"cat/1.png": png(1)})
    make_zip(tmp_path / "b", {"dog/1.png": png(2)})
    source = open_dataset(f"{tmp_path}/{{a,b.zip}}")
    assert keys(source) == ["a/cat/1.png", "b.zip/dog/1.png"]
    assert [source.load(index)[0, 0, 0] for index in range(2)] == [1, 2]
    assert classes(source) == ["cat", "dog"]


# ---------------------------------------------------------------- what cannot be used


def test_a_missing_path_names_its_neighbours(tmp_path):
    make_zip(tmp_path / "imagenette", TREE)
    error = refused(tmp_path / "imagenete.zip")
    assert "There is no folder or archive" in error.what
    assert "imagenette.zip" in error.fix
    assert "no folder or archive" in refused(tmp_path / "no/where").what
    assert "s-3.tar" in refused(f"{tmp_path}/s-{{3..4}}.tar").what


@pytest.mark.parametrize("make", MAKERS)
def test_a_missing_folder_within_names_those_that_are_there(tmp_path, make):
    path = make(tmp_path / "data", {"train/cat/1.png": png(1), "val/cat/1.png": png(1)})
    error = refused(f"{path}#trian")
    assert "has no folder trian" in error.what
    assert "train" in error.fix


def test_an_empty_folder_is_called_empty(tmp_path):
    assert f"{tmp_path} is empty" in refused(tmp_path).what


@pytest.mark.parametrize("make", MAKERS)
def test_data_without_images_say_what_an_image_is(tmp_path, make):
    error = refused(make(tmp_path / "data", {"notes.txt": b"hello", "a/b.csv": b"1"}))
    assert "holds no images" in error.what
    assert ".jpg" in error.fix


def test_a_file_that_is_no_archive(tmp_path):
    assert "no zip or tar archive" in refused(make_folder(tmp_path, {"x.jpg": png(1)}) / "x.jpg").what


def test_what_must_not_be_read_is_said(tmp_path, monkeypatch):
    make_folder(tmp_path / "data", TREE)

    def forbid(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", forbid)
    error = refused(tmp_path / "data")
    assert "permission denied" in error.what
    assert "chmod" in error.fix


def test_a_bad_file_is_bad_alone(tmp_path):
    source = open_dataset(str(make_zip(tmp_path / "data", TREE | {"cat/0.png": b"broken"})))
    index = keys(source).index("cat/0.png")
    with pytest.raises(BadImageError):
        source.load(index)
    assert source.load(index + 1).shape == (3, 4, 3)


def test_names_in_any_encoding_are_read_and_can_be_printed(tmp_path):
    (tmp_path / "cat").mkdir()
    odd = os.path.join(os.fsencode(tmp_path), b"cat", b"\xff\xe4.png")
    try:
        Path(os.fsdecode(odd)).write_bytes(png(5))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    source = open_dataset(str(tmp_path))
    assert source.load(0)[0, 0, 0] == 5
    assert source.get_name(0) == "cat/\\xff\\xe4.png"


# ---------------------------------------------------------------- the real files


@pytest.mark.realdata
def test_the_real_archives_open(realdata_dir):
    source = open_dataset(str(realdata_dir / "cifar10-train.zip"))
    assert len(source) == 50_000
    assert len(source.classes) == 10
    assert np.bincount(source.labels).tolist() == [5000] * 10
    assert source.load(49_999).shape == (32, 32, 3)
    assert "splits" in refused(realdata_dir / "dtd10.zip").what
    assert len(open_dataset(f"{realdata_dir / 'dtd10.zip'}#test").classes) == 10
    assert open_dataset(f"{realdata_dir / 'ecssd-dev.zip'}#images").labels is None


# ---------------------------------------------------------------- names in lists


def test_names_are_found_exactly_first_and_then_alike():
    known = ["cafe\u0301.png", "a/b.png", "café/c.png", "cafe\u0301/c.png"]
    assert find_by_name(known, ["a/b.png", "nowhere.png"]) == [1, -1]
    assert find_by_name(known, ["café.png", "a\\b.png"]) == [0, 1]
    assert find_by_name(known, ["cafe\u0301/c.png", "café/c.png", "a\\b.png"]) == [3, 2, 1]
