"""PASCAL VOC: its folder as torchvision downloads it (``torchvision:VOCDetection[:ROOT]#YEAR``), and its boxes."""

from __future__ import annotations

import os
import posixpath
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from torchvision import datasets
from torchvision.datasets.voc import DATASET_YEAR_DICT

from relicctl.data.datasets.archives import FileReader
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.datasets.torchvision import DEFAULT_ROOT, make_unavailable_error
from relicctl.errors import DataError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def find_voc_folder(spec: str, download: bool) -> str | None:
    """Return the year's folder of JPEGImages, Annotations and ImageSets; None for other specs than VOCDetection's.

    Raises DataError when no year is given, or its lists (of 2007 also that of its test images) are missing.
    """
    place, _, year = spec.partition("#")
    kind, name, root = [*place.split(":", 2), "", ""][:3]
    if (kind, name) != ("torchvision", "VOCDetection"):
        return None
    years = [known for known in DATASET_YEAR_DICT if known.isdecimal()]
    if year not in years:
        what = f"{spec} does not name a year of VOC alone."
        raise DataError(what, f"Write torchvision:VOCDetection#2007, or another of {', '.join(sorted(years))}.")
    root = os.path.abspath(os.path.expanduser(root or DEFAULT_ROOT))
    folder = os.path.join(root, DATASET_YEAR_DICT[year]["base_dir"])
    for part in ("trainval", "test") if year == "2007" else ("trainval",):
        if os.path.isfile(os.path.join(folder, "ImageSets", "Main", f"{part}.txt")):
            continue  # torchvision would unpack it again
        try:
            with redirect_stdout(sys.stderr):
                datasets.VOCDetection(root, year=year, image_set=part, download=download)
        except (RuntimeError, OSError) as error:
            raise make_unavailable_error(name, root, True, download, error) from error
    return folder


@dataclass(frozen=True)
class Boxes:
    """K boxes: ``corners`` float32 ``[K, 4]`` (left, top, right, bottom in pixels), ``labels`` int64 ``[K]``.

    ``ignored`` bool ``[K]``: crowds and difficult objects, left out of training and metrics. ``area`` float64 ``[K]``.
    """

    corners: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    area: np.ndarray

    def __getitem__(self, rows: Any) -> Boxes:
        return Boxes(self.corners[rows], self.labels[rows], self.ignored[rows], self.area[rows])


@dataclass(frozen=True)
class BoxAnnotations:
    """Images by file name with their height and width, 0 where not given; boxes with the rows of their images."""

    files: list[str]
    sizes: np.ndarray
    image_indices: np.ndarray
    boxes: Boxes
    classes: tuple[str, ...]


def read_voc(
    files: FileReader, images: ImageDataset, stems: list[str], classes: tuple[str, ...] | None, spec: str
) -> BoxAnnotations:
    """Read the boxes of ``Annotations/STEM.xml``, whose pixels count from 1; difficult ones are ignored.

    ``images``: those of ``JPEGImages``, of any format.
    """
    sizes, image_indices, corners, names, ignored, filenames = [], [], [], [], [], []
    for image_index, stem in enumerate(stems):
        place = f"Annotations/{stem}.xml"
        content = files.read(place) if "/" not in stem else None
        if content is None:
            raise DataError(f"{spec} has no {place}.", "Give one for every image that is listed.")
        try:
            tree = ElementTree.fromstring(content)
            sizes.append([_parse_number(tree, f"size/{side}", "0") for side in ("height", "width")])
            filenames.append(posixpath.basename(tree.findtext("filename", "").strip()))
            for thing in tree.iter("object"):
                image_indices.append(image_index)
                box = (_parse_number(thing, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
                left, top, right, bottom = box
                corners.append([left - 1, top - 1, right, bottom])
                names.append(thing.findtext("name", "").strip())
                ignored.append(thing.findtext("difficult", "0").strip() == "1")
        except (ElementTree.ParseError, ValueError) as reason:
            raise DataError(f"{place} in {spec} is no valid VOC file ({reason}).", "Correct or remove it.") from None
    known = classes or (VOC_CLASSES if set(names) <= set(VOC_CLASSES) else tuple(sorted(set(names))))
    known += tuple(sorted(set(names) - set(known)))
    boxes = np.array(corners, dtype=np.float64).reshape(-1, 4)
    labels = np.array([known.index(name) for name in names], dtype=np.int64)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return BoxAnnotations(
        _find_image_names(images, stems, filenames),
        np.array(sizes, dtype=np.int64).reshape(-1, 2),
        np.array(image_indices, dtype=np.int64),
        Boxes(boxes, labels, np.array(ignored, dtype=bool), area),
        known,
    )


def _find_image_names(images: ImageDataset, stems: list[str], filenames: list[str]) -> list[str]:
    """Return the name of every stem's image: that of the stem; of several STEM.jpg, or what the annotation says."""
    by_stem: dict[str, list[str]] = {}
    for name in map(images.get_name, range(len(images))):
        by_stem.setdefault(posixpath.splitext(name)[0], []).append(name)
    found = []
    for stem, filename in zip(stems, filenames, strict=True):
        named = by_stem.get(stem) or by_stem.get(posixpath.splitext(filename)[0], [])
        found.append(next((name for name in (f"{stem}.jpg", filename) if name in named), (*named, f"{stem}.jpg")[0]))
    return found


def _parse_number(tree: ElementTree.Element, place: str, default: str = "") -> float:
    value = float(tree.findtext(place, default).strip() or default)
    if not np.isfinite(value):
        raise ValueError(f"{place} is {value}")
    return value
