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

from relicctl.config.dense import DetectionData
from relicctl.data.images import BadImage
from relicctl.data.shapes import ShapesSource
from relicctl.data.sources import Source
from relicctl.errors import DataError
from relicctl.evaluation.dense.samples import Samples

VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

NO_SIZE = 0.01  # pixels; less is lost when images are resized


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


class BoxedImages(Samples):
    """``boxes`` of all images, those of image i from ``starts[i]`` to ``starts[i + 1]``; ``sizes`` int64 ``[N, 2]``."""

    def __init__(
        self, source: Source, classes: tuple[str, ...], boxes: Boxes, starts: np.ndarray, sizes: np.ndarray
    ) -> None:
        self.source, self.classes, self.boxes, self.starts, self.sizes = source, classes, boxes, starts, sizes

    def load(self, index: int) -> np.ndarray:
        image = super().load(index)
        height, width = self.sizes[index].tolist()
        if image.shape[:2] != (height, width):
            raise BadImage(f"is {image.shape[1]} x {image.shape[0]}, but its boxes are of {width} x {height}")
        return image

    def target(self, index: int) -> Boxes:
        return self.boxes[self.starts[index] : self.starts[index + 1]]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.source.fingerprint()} {self.classes}".encode())
        for array in (self.boxes.corners, self.boxes.labels, self.boxes.ignored, self.starts, self.sizes):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def with_boxes(self) -> BoxedImages:
        """The images that have a box to learn from."""
        owners = np.repeat(np.arange(len(self)), np.diff(self.starts))
        counts = np.bincount(owners[~self.boxes.ignored], minlength=len(self))
        return self._at(np.flatnonzero(counts))

    def _at(self, rows: np.ndarray) -> BoxedImages:
        parts = [np.arange(self.starts[row], self.starts[row + 1]) for row in rows]
        starts = np.cumsum([0, *map(len, parts)])
        boxes = self.boxes[np.concatenate(parts) if parts else np.empty(0, np.int64)]
        return BoxedImages(self.source.select(rows), self.classes, boxes, starts, self.sizes[rows])


def assembled(
    name: str, source: Source, classes: tuple[str, ...], sizes: np.ndarray, owners: np.ndarray, boxes: Boxes,
    max_bad: float, warn: Callable[[str], None],
) -> BoxedImages:  # fmt: skip
    """Boxes clipped to their images (``owners`` int64 ``[K]``) and put in the images' order.

    Boxes of no size, or outside their image, are left out; DataError when they are more than ``max_bad`` of all.
    """
    limits = sizes[owners][:, [1, 0, 1, 0]] if len(owners) else np.empty((0, 4))
    corners = np.clip(boxes.corners, 0, limits).astype(np.float32)
    usable = (corners[:, 2:] - corners[:, :2]).min(1, initial=np.inf) > NO_SIZE
    if not usable.all():
        first = int(np.flatnonzero(~usable)[0])
        what = (
            f"{name}: {(~usable).sum()} of {len(usable)} boxes have no size or lie outside their image, "
            f"{boxes.corners[first].round(1).tolist()} of {source.key(int(owners[first]))} among them"
        )
        if (~usable).mean() > max_bad:
            raise DataError(f"{what}.", "Mend the boxes ([left, top, width, height] in pixels), or raise data.max_bad.")
        warn(f"{what}; they are left out")
    order = np.flatnonzero(usable)[np.argsort(owners[usable], kind="stable")]
    starts = np.searchsorted(owners[order], np.arange(len(source) + 1))
    kept = Boxes(corners[order], boxes.labels[order], boxes.ignored[order], boxes.area[order])
    return BoxedImages(source, classes, kept, starts, sizes)


def open_boxed(
    name: str, spec: str, config: DetectionData, warn: Callable[[str], None]
) -> tuple[BoxedImages, BoxedImages]:
    """The images to train on, those with boxes, and those to test on. Raises DataError."""
    from relicctl.evaluation.dense.annotations import read_annotations

    if spec.partition(":")[0] == "shapes":
        train, val = (of_shapes(ShapesSource.from_spec(spec, part)) for part in ("train", "val"))
    else:
        train = read_annotations(name, spec, "train", config, None, warn)
        val = read_annotations(name, spec, "val", config, train.classes, warn)
    train = train.with_boxes()
    for part, samples in (("train", train), ("val", val)):
        if not len(samples) or samples.boxes.ignored.all():
            raise DataError(f"{name} has no box in {part}.", "Give annotations with boxes.")
    return train, val


def of_shapes(source: ShapesSource) -> BoxedImages:
    """Every object's box."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda index: _around(source.mask(index)), range(len(source))))
    owners = np.array([index for index, corners in enumerate(found) if corners is not None], dtype=np.int64)
    corners = np.array([c for c in found if c is not None], dtype=np.float32).reshape(-1, 4)
    area = (corners[:, 2:] - corners[:, :2]).prod(1).astype(np.float64)
    boxes = Boxes(corners, source.labels[owners], np.zeros(len(owners), bool), area)
    starts = np.searchsorted(owners, np.arange(len(source) + 1))
    sizes = np.full((len(source), 2), source.settings.size)
    return BoxedImages(source, source.classes, boxes, starts, sizes)


def _around(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of what is True in bool ``[H, W]``."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
