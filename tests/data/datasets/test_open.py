from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from relicctl.data.datasets.archives import FileReader, normalize_file_name
from relicctl.data.datasets.base import PackedNames
from relicctl.data.datasets.open import (
    decode_text,
    list_folders,
    open_dataset,
    parse_first_words,
)
from relicctl.errors import DataError


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_packed_names_are_a_list_of_names(names):
    packed = PackedNames(names)
    assert list(packed) == names
    assert list(pickle.loads(pickle.dumps(packed))) == names
    with pytest.raises(IndexError):
        packed[len(names)]


@given(st.text(alphabet="ab./\\:C", max_size=12))
def test_no_name_leads_out_of_its_root(name):
    usable = normalize_file_name(name + ".jpg")
    if usable is not None:
        assert not os.path.isabs(usable)
        assert os.path.normpath(os.path.join("/root", usable)).startswith("/root/")
        assert normalize_file_name(usable) == usable


# ---------------------------------------------------------------- what is not read is said


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(path, names):
    for number, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(png(number))
    return str(path)


def make_zip(path, names):
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(name, png(number))
    return str(path.with_suffix(".zip"))


def make_tar(path, names):
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(png(number))
            archive.addfile(member, io.BytesIO(png(number)))
    return str(path.with_suffix(".tar"))


MAKERS = [make_folder, make_zip, make_tar]
NFC, NFD = "café", "cafe\u0301"


def opened(spec):
    warnings: list[str] = []
    return open_dataset(spec, warn=warnings.append), warnings


def get_names(source):
    return [source.get_name(row) for row in range(len(source))]


@pytest.mark.parametrize("make", MAKERS)
def test_pictures_of_other_kinds_are_counted_in_one_line(tmp_path, make):
    names = ["a/1.png", "b/2.PNG", "a/3.xcf", "b/4.CR2", "b/5.cr2", "a/readme.txt", "b/labels.json"]
    source, warnings = opened(make(tmp_path / "photos", names))
    assert get_names(source) == ["a/1.png", "b/2.PNG"]
    assert len(warnings) == 1
    assert "not read: 2 .cr2, 1 .xcf" in warnings[0]


@pytest.mark.parametrize(
    ("extension", "form"), [("jpe", "JPEG"), ("jfif", "JPEG"), ("ppm", "PPM"), ("jp2", "JPEG2000"), ("avif", "AVIF")]
)
def test_what_pillow_reads_is_read(tmp_path, extension, form):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    Image.new("RGB", (32, 16), (200, 0, 0)).save(tmp_path / f"1.{extension}", form)
    source, warnings = opened(str(tmp_path))
    pixels = source.load(0)
    assert pixels.shape == (16, 32, 3)
    assert abs(int(pixels[8, 8, 0]) - 200) < 4
    assert not warnings


def test_heic_is_read_or_named_with_what_reads_it(tmp_path):
    (tmp_path / "1.heic").write_bytes(b"\0\0\0\x18ftypheic")
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        with pytest.raises(DataError, match=r"\.heic \(1\).*relicctl\[heif\]"):
            open_dataset(str(tmp_path))
        (tmp_path / "2.png").write_bytes(png())
        assert "1 .heic; pip install 'relicctl[heif]'" in opened(str(tmp_path))[1][0]
    else:
        Image.new("RGB", (32, 16), (200, 0, 0)).save(tmp_path / "1.heic", "HEIF")
        assert opened(str(tmp_path))[0].load(0).shape == (16, 32, 3)


@pytest.mark.parametrize("make", MAKERS)
def test_a_stray_image_beside_class_folders_is_named(tmp_path, make):
    source, warnings = opened(make(tmp_path / "photos", ["a/1.png", "b/2.png", "cover.png"]))
    assert source.labels is None
    assert len(warnings) == 1
    assert "cover.png" in warnings[0]
    assert "unlabelled" in warnings[0]


def test_labels_in_cls_files_are_not_read_and_said_so(tmp_path):
    source, warnings = opened(make_tar(tmp_path / "shard", ["0.png", "0.cls", "1.png", "1.cls"]))
    assert source.labels is None
    assert warnings == [f"{source.spec} counts as unlabelled: the labels in its 2 .cls files are not read"]


@pytest.mark.parametrize("inner", ["x.tar", "x.zip"])
@pytest.mark.parametrize("make", MAKERS)
def test_archives_within_are_named(tmp_path, make, inner):
    spec = make(tmp_path / "outer", [inner])
    with pytest.raises(DataError, match="holds no images, but files that end in") as refused:
        open_dataset(spec)
    assert inner[1:] in refused.value.what
    assert ("Unpack" in refused.value.fix) == (make is not make_folder)
    assert spec in refused.value.fix


def test_other_files_than_archives_are_named(tmp_path):
    for magic, name in ((b"7z\xbc\xaf\x27\x1c", "7-Zip"), (b"PAR1", "Parquet"), (png(), "single image")):
        (tmp_path / "data").write_bytes(magic + bytes(99))
        with pytest.raises(DataError, match=name):
            open_dataset(str(tmp_path / "data"))


def test_a_zip_that_cannot_be_unpacked_is_refused_as_a_whole(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("1.png", png())
    with pytest.raises(DataError, match="packed with LZMA"):
        open_dataset(str(tmp_path / "a.zip"))


# ---------------------------------------------------------------- one name, several spellings


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_backslashes_separate_folders_where_nothing_else_does(tmp_path, make):
    names = ["cat/1.png", "cat/deep/2.png", "dog/3.png"]
    plain = open_dataset(make(tmp_path / "plain", names))
    windows = open_dataset(make(tmp_path / "windows", [name.replace("/", "\\") for name in names]))
    assert windows.compute_fingerprint() == plain.compute_fingerprint()
    assert windows.classes == ("cat", "dog")
    assert windows.load(1)[0, 0, 0] == 1
    assert get_names(open_dataset(f"{windows.spec}#cat")) == ["1.png", "deep/2.png"]
    mixed = open_dataset(make(tmp_path / "mixed", ["a/b\\c.png", "b/1.png"]))
    assert get_names(mixed) == ["a/b\\c.png", "b/1.png"]  # a name of its own, as on Linux


def test_a_mixed_zip_made_on_windows_has_one_separator(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("cat/1.png", "cat\\2.png"):
            member = zipfile.ZipInfo(name)
            member.create_system = 0
            archive.writestr(member, png())
    assert get_names(open_dataset(str(tmp_path / "a.zip"))) == ["cat/1.png", "cat/2.png"]
    assert FileReader(str(tmp_path / "a.zip")).read("cat/2.png") == png()


@pytest.mark.parametrize("name", ["..\\up.png", "\\abs.png", "C:\\x.png", "a\\..\\..\\up.png"])
def test_backslashes_lead_nowhere(tmp_path, name):
    spec = make_zip(tmp_path / "a", [name, "ok.png"])
    assert get_names(open_dataset(spec)) == ["ok.png"]


@pytest.mark.parametrize("make", MAKERS)
def test_composed_and_decomposed_names_are_one_class(tmp_path, make):
    source = open_dataset(make(tmp_path / "photos", [f"{NFC}/1.png", f"{NFD}/2.png", "tea/3.png"]))
    assert len(source.classes) == 2
    assert sorted(source.labels.tolist()) == [0, 0, 1]
    pure = open_dataset(make(tmp_path / "pure", [f"{NFD}/2.png", "tea/3.png"]))
    assert pure.classes == (NFD, "tea")  # as it is spelled: the fingerprint depends on it


@pytest.mark.parametrize("make", MAKERS)
def test_a_folder_is_found_in_either_composition(tmp_path, make):
    spec = make(tmp_path / "photos", [f"in/{NFD}/1.png", "in/tea/2.png"])
    assert get_names(open_dataset(f"{spec}#in/{NFC}")) == get_names(open_dataset(f"{spec}#in/{NFD}")) == ["1.png"]


@pytest.mark.parametrize("make", MAKERS)
def test_thumbnails_of_a_system_are_no_images(tmp_path, make):
    thumbnails = ["@eaDir/1.png", "a/@eaDir/1.png/thumb.png", ".thumbnails/1.png", "__MACOSX/a/1.png", "#recycle/1.png"]
    source, _ = opened(make(tmp_path / "photos", ["a/1.png", "b/2.png", *thumbnails]))
    assert get_names(source) == ["a/1.png", "b/2.png"]
    assert source.classes == ("a", "b")


@pytest.mark.parametrize("name", ["shapes", "torchvision"])
def test_a_folder_of_a_reserved_name_is_not_mixed_up_in_silence(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / name, ["a/1.png", "b/2.png"])
    folder, warnings = opened(f"./{name}")
    assert (len(folder), warnings) == (2, [])
    source, warnings = opened(name)
    assert (len(source) == 2) == (name == "torchvision")
    assert ["./shapes" in text for text in warnings] == [True] * (name == "shapes")
    monkeypatch.chdir("/")
    assert not opened("shapes")[1]


# ---------------------------------------------------------------- folders of a spec


def test_folders_are_listed_below_what_encloses_them(tmp_path):
    names = ["in/photos/train/a/1.png", "in/photos/test/a/1.png", "in/photos/a.txt"]
    for make in MAKERS:
        assert list_folders(make(tmp_path / "data", names)) == ["in/photos/test", "in/photos/train"]
        assert list_folders(f"{tmp_path / 'data'}#in") == ["photos/test", "photos/train"]
        assert list_folders(make(tmp_path / "one", ["test/a/1.png", "test/b/1.png"])) == ["test"]
    assert list_folders(str(tmp_path / "nowhere")) == []


def test_text_is_decoded_by_its_mark():
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert decode_text("é.png,a\n".encode(encoding)) == "é.png,a\n"
        assert parse_first_words("é.png 1\n\nb\n".encode(encoding)) == ["é.png", "b"]
    with pytest.raises(UnicodeDecodeError):
        decode_text(b"\xe9")


def test_nothing_is_said_of_classes_where_folders_are_none(tmp_path):
    spec = make_folder(tmp_path / "photos", ["train/1.png", "test/2.png", "a/3.png", "4.png", "5.cls", "6.xcf"])
    warnings: list[str] = []
    source = open_dataset(spec, warn=warnings.append, class_folders=False)
    assert len(source) == 4
    assert len(warnings) == 1
    assert "1 .xcf" in warnings[0]
