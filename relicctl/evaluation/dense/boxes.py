"""Images with labelled boxes, from COCO's JSON, from VOC's XML, or from the demo data.

coco or coco.zip             annotations/instances_{train,val}2017.json and its like, or {train,val}.json, or
                             {train,val}/_annotations.coco.json; the images in a folder beside or in the root
VOCdevkit/VOC2007            JPEGImages, Annotations, ImageSets/Main/{train,val}.txt
shapes[:key=value,...]       the embedded demo data, with the boxes of their masks
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from relicctl.config.dense import DetectionDataConfig
from relicctl.data.images import BadImageError
from relicctl.data.shapes import ShapesDataset
from relicctl.data.sources import ImageDataset
from relicctl.errors import DataError
from relicctl.evaluation.dense.samples import DenseDataset

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

MIN_BOX_SIDE = 0.01  # pixels; less is lost when images are resized


@dataclass(frozen=True)
class Boxes:
    """K boxes: ``corners`` float32 ``[K, 4]`` (left, top, right, bottom in pixels), ``labels`` int64 ``[K]``.

    ``ignored`` bool ``[K]``: crowds and difficult objects, neither learned from nor counted. ``area`` float64 ``[K]``.
    """

    corners: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    area: np.ndarray

    def __getitem__(self, rows: Any) -> Boxes:
        return Boxes(self.corners[rows], self.labels[rows], self.ignored[rows], self.area[rows])


class DetectionDataset(DenseDataset):
    """``boxes`` of all images, those of image i from ``starts[i]`` to ``starts[i + 1]``; ``sizes`` int64 ``[N, 2]``."""

    def __init__(
        self, source: ImageDataset, classes: tuple[str, ...], boxes: Boxes, starts: np.ndarray, sizes: np.ndarray
    ) -> None:
        self.source, self.classes, self.boxes, self.starts, self.sizes = source, classes, boxes, starts, sizes

    def load(self, index: int) -> np.ndarray:
        image = super().load(index)
        height, width = self.sizes[index].tolist()
        if image.shape[:2] != (height, width):
            raise BadImageError(f"is {image.shape[1]} x {image.shape[0]}, but its boxes are of {width} x {height}")
        return image

    def load_target(self, index: int) -> Boxes:
        return self.boxes[self.starts[index] : self.starts[index + 1]]

    def compute_fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.source.compute_fingerprint()} {self.classes}".encode())
        for array in (self.boxes.corners, self.boxes.labels, self.boxes.ignored, self.starts, self.sizes):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def select_with_boxes(self) -> DetectionDataset:
        """The images that have a box to learn from."""
        image_indices = np.repeat(np.arange(len(self)), np.diff(self.starts))
        counts = np.bincount(image_indices[~self.boxes.ignored], minlength=len(self))
        return self._select_rows(np.flatnonzero(counts))

    def _select_rows(self, rows: np.ndarray) -> DetectionDataset:
        parts = [np.arange(self.starts[row], self.starts[row + 1]) for row in rows]
        starts = np.cumsum([0, *map(len, parts)])
        boxes = self.boxes[np.concatenate(parts) if parts else np.empty(0, np.int64)]
        return DetectionDataset(self.source.select(rows), self.classes, boxes, starts, self.sizes[rows])


def build_detection_dataset(
    name: str, source: ImageDataset, classes: tuple[str, ...], sizes: np.ndarray, image_indices: np.ndarray,
    boxes: Boxes,
    max_bad: float, warn: Callable[[str], None],
) -> DetectionDataset:  # fmt: skip
    """Boxes clipped to their images (``owners`` int64 ``[K]``) and put in the images' order.

    Boxes of no size, or outside their image, are left out; DataError when they are more than ``max_bad`` of all.
    """
    limits = sizes[image_indices][:, [1, 0, 1, 0]] if len(image_indices) else np.empty((0, 4))
    corners = np.clip(boxes.corners, 0, limits).astype(np.float32)
    usable = (corners[:, 2:] - corners[:, :2]).min(1, initial=np.inf) > MIN_BOX_SIDE
    if not usable.all():
        first = int(np.flatnonzero(~usable)[0])
        what = (
            f"{name}: {(~usable).sum()} of {len(usable)} boxes have no size or lie outside their image, "
            f"{boxes.corners[first].round(1).tolist()} of {source.get_name(int(image_indices[first]))} among them"
        )
        if (~usable).mean() > max_bad:
            raise DataError(f"{what}.", "Mend the boxes ([left, top, width, height] in pixels), or raise data.max_bad.")
        warn(f"{what}; they are left out")
    order = np.flatnonzero(usable)[np.argsort(image_indices[usable], kind="stable")]
    starts = np.searchsorted(image_indices[order], np.arange(len(source) + 1))
    usable_boxes = Boxes(corners[order], boxes.labels[order], boxes.ignored[order], boxes.area[order])
    return DetectionDataset(source, classes, usable_boxes, starts, sizes)


def open_detection_data(
    name: str, spec: str, config: DetectionDataConfig, warn: Callable[[str], None]
) -> tuple[DetectionDataset, DetectionDataset]:
    """The images to train on, those with boxes, and those to test on. Raises DataError."""
    from relicctl.evaluation.dense.annotations import read_annotations

    if spec.partition(":")[0] == "shapes":
        train, val = (build_shapes_detection(ShapesDataset.from_spec(spec, part)) for part in ("train", "val"))
    else:
        train = read_annotations(name, spec, "train", config, None, warn)
        val = read_annotations(name, spec, "val", config, train.classes, warn)
    train = train.select_with_boxes()
    for part, samples in (("train", train), ("val", val)):
        if not len(samples) or samples.boxes.ignored.all():
            raise DataError(f"{name} has no box in {part}.", "Give annotations with boxes.")
    return train, val


def build_shapes_detection(source: ShapesDataset) -> DetectionDataset:
    """Every object's box."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda index: _compute_bounding_box(source.load_mask(index)), range(len(source))))
    image_indices = np.array([index for index, corners in enumerate(found) if corners is not None], dtype=np.int64)
    corners = np.array([c for c in found if c is not None], dtype=np.float32).reshape(-1, 4)
    area = (corners[:, 2:] - corners[:, :2]).prod(1).astype(np.float64)
    boxes = Boxes(corners, source.labels[image_indices], np.zeros(len(image_indices), bool), area)
    starts = np.searchsorted(image_indices, np.arange(len(source) + 1))
    sizes = np.full((len(source), 2), source.settings.size)
    return DetectionDataset(source, source.classes, boxes, starts, sizes)


def _compute_bounding_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of what is True in bool ``[H, W]``."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
