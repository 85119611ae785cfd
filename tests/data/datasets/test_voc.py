"""VOC's year is named, and what is there is not fetched again."""

from __future__ import annotations

import pytest
from torchvision import datasets

from relicctl.data.datasets.voc import find_voc_folder
from relicctl.errors import DataError
from tests.helpers.voc import write_voc

LISTS = {"train": {"1": ["cat"]}, "trainval": {"1": ["cat"]}, "test": {"2": ["dog"]}}


def test_the_folder_of_the_year_is_found_and_nothing_unpacked_twice(tmp_path, monkeypatch):
    folder = write_voc(tmp_path / "VOCdevkit/VOC2007", LISTS)
    monkeypatch.setattr(datasets, "VOCDetection", None)
    for download in (False, True):
        assert find_voc_folder(f"torchvision:VOCDetection:{tmp_path}#2007", download) == str(folder)


@pytest.mark.parametrize("spec", ["torchvision:DTD", "VOCdevkit/VOC2007", "shapes:size=16", "torchvision"])
def test_other_data_are_none_of_its_business(spec):
    assert find_voc_folder(spec, False) is None


@pytest.mark.parametrize("year", ["", "#test", "#2006", "#2007-test"])
def test_the_year_must_be_told(year):
    with pytest.raises(DataError, match="VOCDetection#2007"):
        find_voc_folder(f"torchvision:VOCDetection{year}", False)


def test_both_archives_of_2007_are_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        datasets,
        "VOCDetection",
        lambda root, year, image_set, download: asked.append((root, year, image_set, download)),
    )
    find_voc_folder(f"torchvision:VOCDetection:{tmp_path}#2007", True)
    find_voc_folder(f"torchvision:VOCDetection:{tmp_path}#2012", True)
    root = str(tmp_path)
    assert asked == [(root, "2007", "trainval", True), (root, "2007", "test", True), (root, "2012", "trainval", True)]


@pytest.mark.parametrize("lists", [{}, {part: LISTS[part] for part in ("train", "trainval")}], ids=["none", "no test"])
def test_what_is_not_there_names_the_download(tmp_path, lists):
    if lists:
        write_voc(tmp_path / "VOCdevkit/VOC2007", lists)
    with pytest.raises(DataError, match="not complete") as error:
        find_voc_folder(f"torchvision:VOCDetection:{tmp_path}#2007", False)
    assert "--download" in error.value.fix
