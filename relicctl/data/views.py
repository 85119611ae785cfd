"""What the views of an image are: how many, how large, from how much of it; and a batch of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from relicctl.data.background_removal import BackgroundFill
from relicctl.data.crops import crop_on_host, draw_crop_boxes
from relicctl.data.photometric import AugmentConfig

IMAGES_PER_DECODE = 8  # images a worker holds decoded: boxes are drawn for so many, and large photos still fit


@dataclass(frozen=True)
class CropSpec:
    """``count`` square crops of ``size`` pixels that cover a share of the image within ``area``."""

    count: int
    size: int
    area: tuple[float, float]


@dataclass(frozen=True)
class ViewSpec:
    """All views of an image: the large ones first, then the small ones if there are any."""

    crops: tuple[CropSpec, ...]
    aspect: tuple[float, float]
    augment: AugmentConfig

    @property
    def count(self) -> int:
        return sum(size.count for size in self.crops)


@dataclass(frozen=True)
class Batch:
    """``views``: float32 ``[count, B, 3, size, size]`` per size, normalised; ``labels``: int64 ``[B]`` or None."""

    views: list[torch.Tensor]
    labels: torch.Tensor | None


def _draw_view_boxes(
    plan: ViewSpec, seed: int, epoch: int, samples: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> list[np.ndarray]:
    """int32 ``[B, count, 4]`` per size."""
    first, boxes = 0, []
    for size in plan.crops:
        boxes.append(
            draw_crop_boxes(
                seed, epoch, samples, heights, widths,
                first_view=first, count=size.count, area=size.area, aspect=plan.aspect,
            )
        )  # fmt: skip
        first += size.count
    return boxes


def crop_views(
    images: list[np.ndarray],
    plan: ViewSpec,
    seed: int,
    epoch: int,
    samples: np.ndarray,
    out: list[np.ndarray],
    fills: list[list[BackgroundFill | None]] | None = None,
) -> None:
    """All views of decoded images, uint8 ``[H, W, 3]``, into ``out``: per size uint8 ``[count, B, size, size, 3]``.

    The boxes of all ``samples`` (``[B]``) are drawn at once: for one image the drawing costs as much as a crop.
    ``cutouts``: per image what removes the background of each large view.
    """
    heights, widths = np.array([image.shape[:2] for image in images]).T
    view_boxes = _draw_view_boxes(plan, seed, epoch, samples, heights, widths)
    for number, (size, boxes, views) in enumerate(zip(plan.crops, view_boxes, out, strict=True)):
        for row, image in enumerate(images):
            edits = fills[row] if fills is not None and number == 0 else None
            crop_on_host(image, boxes[row], size.size, views[:, row], edits)
