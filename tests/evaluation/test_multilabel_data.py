"""Several classes an image: VOC's objects and tables of names become one matrix, and its rows go with their images."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from relicctl.config.transfer import TransferConfig
from relicctl.data.datasets.voc import VOC_CLASSES
from relicctl.errors import DataError, UsageError
from relicctl.evaluation.transfer import resolve_metric
from relicctl.evaluation.transfer_data import open_transfer_dataset, split_trainval
from tests.helpers.voc import write_voc

CAT, DOG = VOC_CLASSES.index("cat"), VOC_CLASSES.index("dog")
LISTS = {
    "train": {"1": ["cat", "dog", "dog?"], "2": ["dog?"], "3": [], "4": ["dog"]},
    "val": {"5": ["cat"], "6": ["dog"]},
    "test": {"7": ["cat", "dog"], "8": ["dog?", "cat"]},
}


def opened(spec, warnings=None, *, seed=0, **by_name):
    """The data set ``x`` at ``spec``, with keys of section data such as draw or test_split."""
    data = {"datasets": {"x": str(spec)}} | {key: {"x": value} for key, value in by_name.items()}
    config = TransferConfig.model_validate({"data": data, "seed": seed})
    return open_transfer_dataset("x", config, download=False, warn=(warnings if warnings is not None else []).append)


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path / "VOCdevkit/VOC2007", LISTS)


@pytest.fixture
def table(tmp_path):
    """Writes ``labels.csv`` and the images that it names, in the folder of a split."""

    def write(split: str, text: str, images: str = "abc"):
        folder = tmp_path / "photos" / split
        folder.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(images):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{name}.png")
        (folder / "labels.csv").write_text(text)
        return tmp_path / "photos"

    return write


def test_vocs_objects_are_there_not_there_or_do_not_count(voc):
    data = opened(voc)
    assert data.trainval.classes == VOC_CLASSES
    wanted = np.full((6, 20), -1)
    wanted[[0, 4], CAT] = 1
    wanted[[0, 3, 5], DOG] = 1
    wanted[1, DOG] = 0  # difficult alone; the first image has an easy one beside it
    assert data.trainval.labels.tolist() == wanted.tolist()
    assert data.test.labels[:, [CAT, DOG]].tolist() == [[1, 1], [1, 0]]
    assert [data.trainval.source.get_name(row) for row in (0, 4)] == ["train/1.jpg", "val/5.jpg"]
    division = split_trainval(data, "all", 0.2, 0)
    assert (division.train.tolist(), division.val.tolist(), division.val_source) == ([0, 1, 2, 3], [4, 5], "val")


def test_folder_archive_and_torchvision_are_the_same(voc, tmp_path):
    write_voc(voc, {"trainval": LISTS["train"] | LISTS["val"]})
    with zipfile.ZipFile(tmp_path / "voc.zip", "w") as archive:
        for path in voc.rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path))
    specs = (voc, f"{tmp_path / 'voc.zip'}#VOCdevkit/VOC2007", f"torchvision:VOCDetection:{tmp_path}#2007")
    prints = {
        (data.trainval.source.compute_fingerprint(), data.test.source.compute_fingerprint())
        for data in map(opened, specs)
    }
    assert len(prints) == 1


def test_vocs_images_may_be_of_any_format(voc):
    labels = opened(voc).trainval.labels
    for number, path in enumerate(sorted((voc / "JPEGImages").glob("*.jpg"))):
        Image.open(path).save(path.with_suffix((".png", ".JPEG", ".tif")[number % 3]))
        path.unlink()
    data = opened(voc)
    assert data.trainval.labels.tolist() == labels.tolist()
    assert [data.trainval.source.get_name(row) for row in (0, 4)] == ["train/1.png", "val/5.JPEG"]
    (voc / "JPEGImages/1.png").unlink()
    with pytest.raises(DataError, match=r"1\.jpg"):
        opened(voc)


def test_rows_go_with_their_images_and_other_labels_are_other_data(voc):
    source = opened(voc).trainval.source
    some = source.select([5, 0]).select(np.array([1]))
    assert some.get_name(0) == source.get_name(0)
    assert some.labels.tolist() == source.labels[:1].tolist()
    assert (
        pickle.loads(pickle.dumps(some)).compute_fingerprint()
        == some.compute_fingerprint()
        != source.select([5]).compute_fingerprint()
    )
    write_voc(voc, {"val": LISTS["val"] | {"6": ["dog", "cat"]}})
    assert opened(voc).trainval.source.compute_fingerprint() != source.compute_fingerprint()


def test_few_labels_are_a_share_of_the_images(voc):
    write_voc(voc, {"train": {str(n): [("cat", "dog")[n % 2]] for n in range(10, 50)}})
    data = opened(voc)
    division = split_trainval(data, "0.5", 0.2, 0)
    assert (len(division.train), len(division.val)) == (16, 4)
    assert max(*division.train, *division.val) < data.num_train
    assert set(division.train).isdisjoint(division.val)
    assert not np.array_equal(division.train, split_trainval(data, "0.5", 0.2, 1).train)
    with pytest.raises(UsageError, match="multi-label"):
        split_trainval(data, "2-per-class", 0.2, 0)
    with pytest.raises(DataError, match="too few labels"):
        split_trainval(data, "0.01", 0.2, 0)


def test_a_table_names_images_and_their_classes(table):
    table("train", "b.png, sea ;sun\na.png,sun\n\nc.png,\n")
    table("val", "a.png,sea\n")
    spec = table("test", '"c.png","sun;sea"\n')
    data = opened(spec)
    assert data.trainval.classes == ("sea", "sun")
    assert data.trainval.labels.tolist() == [[1, 1], [-1, 1], [-1, -1], [1, -1]]
    assert [data.trainval.source.load(row)[0, 0, 0] for row in range(4)] == [1, 0, 2, 0]
    assert (
        opened(f"{spec}/{{split}}").trainval.source.compute_fingerprint() == data.trainval.source.compute_fingerprint()
    )


def test_a_table_of_one_class_an_image_is_single_label(table):
    table("train", "a.png,sea\nb.png,sun\nc.png,sea\n")
    table("val", "a.png,sun\nb.png,sea\n")
    spec = table("test", "b.png,sun\n")
    data = opened(spec)
    assert data.trainval.labels.tolist() == [0, 1, 0, 1, 0]
    assert data.test.labels.tolist() == [1]
    assert data.trainval.source.labels.tolist() == [0, 1, 0, 1, 0]
    assert resolve_metric(data, TransferConfig()) == "top1"
    assert opened(spec, metrics="map11").trainval.labels.tolist() == [[1, -1], [-1, 1], [1, -1], [-1, 1], [1, -1]]
    table("test", "b.png,sun;sea\n")  # a single image of several classes, and all are multi-label
    assert opened(spec).trainval.labels.ndim == 2


@pytest.mark.parametrize("text", ["é.png,sea;sun\nb.png,sun\n", "é.png\tsea;sun\nb.png\tsun\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_are_read_as_spreadsheets_save_them(table, text, encoding):
    spec = table("train", "", images=["é", "b"])
    table("test", "", images=["e\u0301", "b"])  # as macOS spells the same name
    for split in ("train", "test"):
        (spec / split / "labels.csv").write_bytes(text.encode(encoding))
    data = opened(spec)
    assert data.trainval.labels.tolist() == data.test.labels.tolist() == [[1, 1], [-1, 1]]


def test_a_table_in_another_encoding_is_refused_with_the_one_to_save_it_in(table):
    spec = table("train", "")
    (spec / "train/labels.csv").write_bytes("é.png,sea\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"labels\.csv.* is no text in UTF-8") as refused:
        opened(table("test", "a.png,sea\n"))
    assert "UTF-8" in refused.value.fix


def test_classes_without_an_image_are_told(voc):
    warnings: list[str] = []
    opened(voc, warnings)
    assert [text.split(" in ")[1].split(",")[0] for text in warnings] == ["train", "test", "val"]
    assert "18 classes" in warnings[0]


@pytest.mark.parametrize(
    ("train", "test", "says"),
    [
        ("a.png,sea\nb.png,sun\n", "a.png,sky\n", "'sky'"),
        ("a.png,sea\nb.png,sun\n", "a.png,\n", "No image"),
        ("a.png,sea\nb.png,sun\n", "", "is empty"),
        ("a.png,sea\nb.png,sea\n", "a.png,sea\n", "only 1 class"),
        ("name,classes\na.png,sea\n", "a.png,sea\n", "lacks listed images: name"),
        ("a.png,sea\na.png,sun\n", "a.png,sea\n", "twice"),
        ("a.png\n", "a.png,sea\n", "cannot be read"),
        ('a.png,"sea\n', "a.png,sea\n", "cannot be read"),
    ],
)
def test_tables_that_make_no_data_set_are_refused(table, train, test, says):
    table("train", train)
    with pytest.raises(DataError, match=says):
        opened(table("test", test))


def test_damaged_annotations_of_val_are_no_missing_val(voc):
    (voc / "Annotations/5.xml").write_text("<annotation>")
    with pytest.raises(DataError, match=r"5\.xml"):
        opened(voc)
    (voc / "Annotations/5.xml").unlink()
    with pytest.raises(DataError, match=r"5\.xml"):
        opened(voc)


def test_listed_images_must_be_there(voc):
    (voc / "JPEGImages/7.jpg").unlink()
    with pytest.raises(DataError, match=r"7\.jpg"):
        opened(voc)
    (voc / "ImageSets/Main/test.txt").unlink()
    with pytest.raises(DataError, match="no test split"):
        opened(voc)
