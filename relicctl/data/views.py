"""What the views of an image are (how many, which size, how much of the image), and how they are cropped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from relicctl.data.background_removal import ViewFills
from relicctl.data.crops import Oversized, crop_on_host, draw_crop_boxes
from relicctl.data.photometric import AugmentConfig
from relicctl.data.sampler import DrawKey

IMAGES_PER_DECODE = 8  # images a worker holds decoded: boxes are drawn for so many, and large photos still fit


@dataclass(frozen=True)
class CropSpec:
    """``count`` square crops of ``size`` pixels that cover a fraction of the image within ``area``."""

    count: int
    size: int
    area: tuple[float, float]


@dataclass(frozen=True)
class ViewSpec:
    """All views of an image: the large ones first, then the small ones if there are any.

    ``ratio``: range of width / height of a crop's box; ``oversized``: what becomes of a box larger than the image.
    """

    crops: tuple[CropSpec, ...]
    ratio: tuple[float, float]
    augment: AugmentConfig
    oversized: Oversized = "redraw"

    @property
    def count(self) -> int:
        return sum(crop.count for crop in self.crops)


@dataclass(frozen=True)
class Batch:
    """``views``: float32 ``[count, B, 3, size, size]`` per crop size, normalised; ``labels``: int64 ``[B]`` or None."""

    views: list[torch.Tensor]
    labels: torch.Tensor | None


def draw_view_boxes(spec: ViewSpec, key: DrawKey, sizes: np.ndarray) -> list[np.ndarray]:
    """Draw the boxes of all views, int32 ``[B, count, 4]`` per crop size, in images of ``sizes``, as in crops.py."""
    first, boxes = 0, []
    for crop in spec.crops:
        views = range(first, first + crop.count)
        boxes.append(draw_crop_boxes(key, sizes, views, crop.area, spec.ratio, spec.oversized))
        first += crop.count
    return boxes


def crop_views(
    images: list[np.ndarray], spec: ViewSpec, key: DrawKey, out: list[np.ndarray], fills: ViewFills | None = None
) -> None:
    """Crop all views of images, uint8 ``[H, W, 3]``, into ``out``: uint8 ``[count, B, size, size, 3]`` per size.

    The boxes of all B images are drawn at once: for one image drawing costs as much as a crop.
    ``fills``: what removes the background.
    """
    sizes = np.array([image.shape[:2] for image in images])
    for number, (boxes, views) in enumerate(zip(draw_view_boxes(spec, key, sizes), out, strict=True)):
        for row, image in enumerate(images):
            edits = fills[row] if fills is not None and number == 0 else None
            crop_on_host(image, boxes[row], views.shape[2], views[:, row], edits)
