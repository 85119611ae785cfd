"""Boxes as they come: COCO's JSON, VOC's XML, the demo data; and what is refused."""

from __future__ import annotations

import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from relicctl.config.transfer import DetectionDataConfig
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.datasets.voc import VOC_CLASSES
from relicctl.data.decoding import BadImageError
from relicctl.errors import DataError
from relicctl.evaluation.dense.detection_data import open_detection_data

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]


def annotation(image: int, category: int, box: list[float], **more) -> dict:
    return {"id": 0, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], **more}


def tree(part: str) -> dict:
    """Three images of 30 x 20; the second has no box."""
    images = [{"id": 10 + n, "file_name": f"{part}-{n}.png", "width": 30, "height": 20} for n in range(3)]
    boxes = [annotation(12, 7, [1, 2, 10, 5]), annotation(10, 3, [20, 10, 15, 15]), annotation(12, 3, [0, 0, 9, 9])]
    boxes.append(annotation(12, 7, [3, 3, 4, 4], iscrowd=1))
    return {"images": images, "annotations": boxes, "categories": CATEGORIES}


@pytest.fixture
def coco(tmp_path):
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for part in ("train", "val"):
        (root / f"{part}2017").mkdir()
        for number in range(3):
            Image.fromarray(np.full((20, 30, 3), number, np.uint8)).save(root / f"{part}2017" / f"{part}-{number}.png")
        write(root, part, tree(part))
    return root


def write(root, part, content) -> None:
    (root / f"annotations/instances_{part}2017.json").write_text(json.dumps(content))


def opened(spec, warn=lambda text: None, **config):
    return open_detection_data("x", str(spec), DetectionDataConfig(**config), SimpleNamespace(warn=warn))


def test_boxes_go_with_their_images_and_are_clipped(coco):
    train, val = opened(coco)
    assert train.classes == ("dog", "cat")
    assert [train.source.get_name(i) for i in range(len(train))] == [
        "train-0.png",
        "train-2.png",
    ]  # no box, nothing to learn
    assert len(val) == 3
    assert train.load_target(0).corners.tolist() == [[20, 10, 30, 20]]
    found = train.load_target(1)
    assert found.corners.tolist() == [[1, 2, 11, 7], [0, 0, 9, 9], [3, 3, 7, 7]]
    assert found.labels.tolist() == [1, 0, 1]
    assert found.ignored.tolist() == [False, False, True]
    assert len(val.load_target(1).labels) == 0
    assert (train.load(1) == 2).all()


def test_archives_and_other_layouts_are_the_same(coco, tmp_path):
    with zipfile.ZipFile(tmp_path / "coco.zip", "w") as archive:
        for path in coco.rglob("*.*"):
            archive.write(path, path.relative_to(coco.parent))
    pictures = {path.name: path.read_bytes() for path in coco.rglob("*.png")}
    flat, rooted = tmp_path / "flat", tmp_path / "rooted"
    for part in ("train", "val"):
        (flat / part).mkdir(parents=True)
        (rooted / "pictures" / part).mkdir(parents=True)
        content = tree(part)
        (flat / part / "_annotations.coco.json").write_text(json.dumps(content))
        for image in content["images"]:
            name = image["file_name"]
            image["file_name"] = f"pictures/{part}/{name}"
            for place in (flat / part / name, rooted / image["file_name"]):
                place.write_bytes(pictures[name])
        (rooted / f"{part}.json").write_text(json.dumps(content))
    whole = opened(coco)
    for spec in (f"{tmp_path}/coco.zip#coco", flat, rooted):
        for ours, theirs in zip(whole, opened(spec), strict=True):
            assert [ours.source.get_name(i) for i in range(len(ours))] == [
                theirs.source.get_name(i) for i in range(len(theirs))
            ]
            np.testing.assert_array_equal(ours.boxes.corners, theirs.boxes.corners)
            np.testing.assert_array_equal(ours.load(1), theirs.load(1))


def test_vocs_xml_counts_from_one_and_difficult_ones_are_ignored(tmp_path):
    root = tmp_path / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for part, stem in (("train", "a"), ("val", "b")):
        (root / f"ImageSets/Main/{part}.txt").write_text(f"{stem}\n")
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(root / f"JPEGImages/{stem}.jpg")
        things = "".join(
            f"<object><name>{name}</name><difficult>{hard}</difficult><bndbox><xmin>1</xmin><ymin>3</ymin>"
            "<xmax>10</xmax><ymax>20</ymax></bndbox></object>"
            for name, hard in (("dog", 0), ("cat", 1))
        )
        size = "<size><width>30</width><height>20</height><depth>3</depth></size>"
        (root / f"Annotations/{stem}.xml").write_text(f"<annotation>{size}{things}</annotation>")
    train, val = opened(root)
    assert train.classes == VOC_CLASSES
    assert [VOC_CLASSES[label] for label in val.load_target(0).labels] == ["dog", "cat"]
    assert val.load_target(0).corners.tolist() == [[0, 2, 10, 20]] * 2
    assert val.load_target(0).ignored.tolist() == [False, True]
    (root / "Annotations/b.xml").write_text("<annotation>")
    with pytest.raises(DataError, match=r"b\.xml"):
        opened(root)


def write_voc_image(root, part: str, file: str, annotation: str) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / f"ImageSets/Main/{part}.txt").write_text(f"{part}\n")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(root / "JPEGImages" / file)
    box = "<bndbox><xmin>1</xmin><ymin>3</ymin><xmax>10</xmax><ymax>20</ymax></bndbox>"
    (root / f"Annotations/{part}.xml").write_text(
        f"<annotation>{annotation}<object><name>dog</name>{box}</object></annotation>"
    )


@pytest.mark.parametrize("filename", ["", "<filename>0001.jpg</filename>", "<filename>/home/me/train.png</filename>"])
@pytest.mark.parametrize("suffix", ["png", "jpeg", "JPG", "tif", "webp"])
def test_vocs_images_may_be_of_any_format(tmp_path, suffix, filename):
    for part in ("train", "val"):
        write_voc_image(
            tmp_path, part, f"{part}.{suffix}", filename + "<size><width>30</width><height>20</height></size>"
        )
    train, val = opened(tmp_path)
    assert train.source.get_name(0) == f"train.{suffix}"
    assert val.load_target(0).corners.tolist() == [[0, 2, 10, 20]]
    assert val.load(0).shape == (20, 30, 3)


def test_an_annotation_names_an_image_of_another_stem_or_one_of_several(tmp_path):
    size = "<size><width>30</width><height>20</height></size>"
    write_voc_image(tmp_path, "train", "photo.png", f"<filename>photo.png</filename>{size}")
    write_voc_image(tmp_path, "val", "val.bmp", f"<filename>val.tif</filename>{size}")
    Image.fromarray(np.full((20, 30, 3), 9, np.uint8)).save(tmp_path / "JPEGImages/val.tif")
    train, val = opened(tmp_path)
    assert (train.source.get_name(0), val.source.get_name(0)) == ("photo.png", "val.tif")
    Image.fromarray(np.full((20, 30, 3), 9, np.uint8)).save(tmp_path / "JPEGImages/val.jpg")
    assert opened(tmp_path)[1].source.get_name(0) == "val.jpg"  # as VOC itself has it
    (tmp_path / "JPEGImages/photo.png").unlink()
    with pytest.raises(DataError, match=r"train\.jpg"):
        opened(tmp_path)


@pytest.mark.parametrize("size", ["<size><width>0</width><height>0</height></size>", "<size/>", ""])
def test_boxes_of_an_annotation_without_a_size_are_within_the_image(tmp_path, size):
    for part in ("train", "val"):
        write_voc_image(tmp_path, part, f"{part}.png", size)
    train, val = opened(tmp_path)
    for samples in (train, val):
        assert samples.load_target(0).corners.tolist() == [[0, 2, 10, 20]]
        assert samples.load(0).shape == (20, 30, 3)


def test_cocos_images_without_a_size_have_that_of_their_file(coco):
    expected = opened(coco)[0]
    content = tree("train")
    content["images"][0].update(width=0, height=0)
    del content["images"][2]["width"]
    write(coco, "train", content)
    (coco / "train2017/train-1.png").write_bytes(b"no image")
    content["images"][1].update(width=None)
    write(coco, "train", content)
    found = opened(coco)[0]
    np.testing.assert_array_equal(found.boxes.corners, expected.boxes.corners)
    assert found.load(0).shape == (20, 30, 3)


def test_the_demo_datas_boxes_enclose_their_objects_closely():
    _, val = opened("shapes:size=32,train=20,val=20")
    source = ShapesDataset.from_spec("shapes:size=32,train=20,val=20", "val")
    for index in range(20):
        (left, top, right, bottom), mask = val.load_target(index).corners[0].astype(int), source.load_mask(index)
        inner = mask[top:bottom, left:right]
        assert inner.sum() == mask.sum()
        assert inner[0].any() and inner[-1].any() and inner[:, 0].any() and inner[:, -1].any()  # noqa: PT018
        assert val.load_target(index).labels.tolist() == [source.labels[index]]


def test_boxes_that_are_none_are_left_out_or_too_many(coco):
    content = tree("train")
    content["annotations"] += [annotation(10, 3, [4, 4, 0, 3]), annotation(10, 3, [40, 4, 3, 3])]
    write(coco, "train", content)
    told: list[str] = []
    train, _ = opened(coco, told.append, max_corrupt_fraction=0.5)
    assert len(train.boxes.labels) == 4
    assert "2 of 6 boxes" in told[0]
    with pytest.raises(DataError, match="2 of 6 boxes"):
        opened(coco)


def test_an_image_of_another_size_than_its_boxes_is_bad(coco):
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(coco / "train2017/train-0.png")
    with pytest.raises(BadImageError, match="20 x 30"):
        opened(coco)[0].load(0)


def spoil(coco, what) -> None:
    content, file = tree("train"), coco / "annotations/instances_train2017.json"
    if what == "json":
        file.write_text(file.read_text()[:50])
    elif what == "keys":
        write(coco, "train", {"images": []})
    elif what == "list":
        write(coco, "train", [1])
    elif what == "image id":
        content["annotations"][0]["image_id"] = 99
    elif what == "three numbers":
        content["annotations"][0]["bbox"] = [1, 2, 3]
    elif what == "nan":
        content["annotations"][0]["bbox"] = [1, 2, float("nan"), 4]
    elif what == "twice":
        content["images"][1]["id"] = 12
    elif what == "an image missing":
        (coco / "train2017/train-2.png").unlink()
    elif what == "images missing":
        (coco / "train2017").rename(coco / "elsewhere")
    elif what == "no boxes":
        content["annotations"] = []
    elif what == "no val":
        (coco / "annotations/instances_val2017.json").unlink()
    elif what == "foreign":
        other = tree("val")
        other["categories"] = [{"id": 7, "name": "cow"}, {"id": 3, "name": "dog"}]
        write(coco, "val", other)
    if what in ("image id", "three numbers", "nan", "twice", "no boxes"):
        write(coco, "train", content)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("json", "is not JSON"),
        ("keys", "'annotations'"),
        ("list", "not in COCO's format"),
        ("image id", "99"),
        ("three numbers", "not in COCO's format"),
        ("nan", "not finite"),
        ("twice", "occur twice"),
        ("an image missing", "train-2.png"),
        ("images missing", "train-0.png"),
        ("no boxes", "no box in train"),
        ("no val", "no val split"),
        ("foreign", "cow"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(coco, what, says):
    spoil(coco, what)
    with pytest.raises(DataError) as refused:
        opened(coco)
    assert says in refused.value.what


def test_file_names_of_windows_and_macos_are_found(coco):
    (coco / "train2017/train-0.png").rename(coco / "train2017/cafe\u0301.png")
    for part in ("train", "val"):
        content = tree(part)
        for entry in content["images"]:
            name = entry["file_name"].replace("train-0", "café")
            entry["file_name"] = f"{part}2017\\{name}"
        write(coco, part, content)
    train, val = opened(coco)
    assert (len(train), len(val)) == (2, 3)
    assert train.source.get_name(0) == "train2017/cafe\u0301.png"
    assert train.source.load(0).shape == (20, 30, 3)


def test_a_list_may_name_images_of_several_splits(coco):
    content = tree("train")
    for entry in content["images"]:
        entry["file_name"] = f"train2017/{entry['file_name']}"
    content["images"][1]["file_name"] = "val2017/val-1.png"
    write(coco, "train", content)
    train, _ = opened(coco)
    names = [train.source.get_name(row) for row in range(len(train))]
    assert names == ["train2017/train-0.png", "train2017/train-2.png"]
