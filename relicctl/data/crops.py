"""The geometric half of a view: where its box lies, and the box cut out and resized.

Boxes are (left, top, width, height) in whole pixels. Resizing is antialiased bicubic on the cropped image,
first along the rows, then along the columns, clipped after each; uint8 on the host, float32 on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from relicctl.core.counter_rng import Stream, draw_uniform

CROP_TRIES = 10  # draws before the centred fallback, as in torchvision's RandomResizedCrop


def draw_crop_boxes(
    seed: int,
    epoch: int,
    indices: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    *,
    first_view: int,
    count: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> np.ndarray:
    """int32 ``[B, count, 4]``: a box for each sample and each of ``count`` views from ``first_view`` on.

    ``indices``, ``heights``, ``widths`` are ``[B]``. A box depends on (seed, epoch, its sample's index and
    size, its view) alone. The law is torchvision's RandomResizedCrop: share of the area uniform in ``area``,
    width / height log-uniform in ``aspect``, the first of ten draws that fits, else the largest centred box
    of lawful aspect.
    """
    views = np.arange(first_view, first_view + count)
    indices = np.asarray(indices)[:, None]
    u = draw_uniform(seed, Stream.GEOMETRY, epoch, indices, views, n=2 * CROP_TRIES + 2)
    height, width = (np.asarray(side, dtype=np.int64)[:, None] for side in (heights, widths))

    pixels = (height * width)[..., None] * (area[0] + (area[1] - area[0]) * u[..., :CROP_TRIES])
    log_low, log_high = np.log(aspect)
    ratio = np.exp(log_low + (log_high - log_low) * u[..., CROP_TRIES : 2 * CROP_TRIES])
    tried_w, tried_h = (np.rint(np.sqrt(side)).astype(np.int64) for side in (pixels * ratio, pixels / ratio))
    fits = (tried_w > 0) & (tried_w <= width[..., None]) & (tried_h > 0) & (tried_h <= height[..., None])
    first = fits.argmax(-1)[..., None]
    found = fits.any(-1)

    shape = np.clip(width / height, *aspect)
    w = np.where(found, _gather_draws(tried_w, first), np.clip(np.rint(height * shape), 1, width))
    h = np.where(found, _gather_draws(tried_h, first), np.clip(np.rint(width / shape), 1, height))
    left = np.where(found, np.floor(u[..., -2] * (width - w + 1)), (width - w) // 2)
    top = np.where(found, np.floor(u[..., -1] * (height - h + 1)), (height - h) // 2)
    return np.stack([left, top, w, h], axis=-1).astype(np.int32)


def _gather_draws(values: np.ndarray, position: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, position, axis=-1)[..., 0]


def make_eval_box(height: int, width: int, crop_ratio: float) -> np.ndarray:
    """int32 ``[4]``: the centred square whose side is ``crop_ratio`` of the shorter side.

    Resizing it to s pixels equals resizing the short side to ``s / crop_ratio``, then cutting out the centre.
    """
    side = max(1, round(crop_ratio * min(height, width)))
    return np.array([(width - side) // 2, (height - side) // 2, side, side], dtype=np.int32)


CropEdit = Callable[[np.ndarray, int, int], None]  # changes a crop's pixels in place; told its left and top


def crop_on_host(
    image: np.ndarray,
    boxes: np.ndarray,
    size: int,
    out: np.ndarray | None = None,
    edits: Sequence[CropEdit | None] | None = None,
) -> np.ndarray:
    """uint8 ``[V, size, size, 3]``, in ``out`` if given: the boxes ``[V, 4]`` of one image, uint8 ``[H, W, 3]``.

    ``edits``, V of them: what is done to a box's pixels before they are resized, as if it were done to the image.

    torch resizes interleaved uint8 five times as fast as Pillow, with weights of 15 bits instead of 22: three
    pixels in a thousand differ by one grey level, two in a million by two. As in torchvision a box is cropped
    before it is resized: Pillow's ``resize(box=...)`` would let neighbours from outside the box shine in.
    """
    if out is None:
        out = np.empty((len(boxes), size, size, 3), dtype=np.uint8)
    for crop, (left, top, w, h), edit in zip(out, boxes.tolist(), edits or [None] * len(boxes), strict=True):
        box = image[top : top + h, left : left + w].copy()  # row by row, many times as fast as torch's copy
        if edit is not None:
            edit(box, left, top)
        planes = torch.from_numpy(box)[None].permute(0, 3, 1, 2)  # channels_last, and so is what comes of it
        resized = F.interpolate(planes, size=(size, size), mode="bicubic", antialias=True)
        crop[:] = resized[0].permute(1, 2, 0).numpy()
    return out


def crop_on_device(images: Tensor, boxes: np.ndarray | Tensor, size: int) -> Tensor:
    """float32 ``[V, B, 3, size, size]`` in [0, 1]: boxes ``[B, V, 4]`` of uint8 images ``[B, 3, H, W]``.

    Two batched matrix products a view, on the images' device, in float32 whatever the autocast. Clipping
    between them is what every uint8 resize does, and a sharp edge shows it; nothing is rounded, which keeps
    within 1.5 grey levels of those. On a CPU ``crop_on_host`` is the faster way above some 64 pixels.
    """
    batch, channels, height, width = images.shape
    left, top, w, h = torch.as_tensor(boxes).to(images.device, non_blocking=True).unbind(-1)
    crops = torch.empty(left.shape[1], batch, channels, size, size, device=images.device)
    with torch.autocast(images.device.type, enabled=False):
        lines = images.float().div_(255.0).reshape(batch, channels * height, width)
        for view, crop in enumerate(crops):
            across = make_bicubic_matrices(left[:, view], w[:, view], width, size)
            down = make_bicubic_matrices(top[:, view], h[:, view], height, size)
            rows = torch.bmm(lines, across.mT).clamp_(0.0, 1.0).view(batch, channels, height, size)
            torch.matmul(down[:, None], rows, out=crop)
    return crops.clamp_(0.0, 1.0)


def make_bicubic_matrices(starts: Tensor, lengths: Tensor, pixels: int, size: int) -> Tensor:
    """float32 ``[K, size, pixels]``: row y of matrix k makes output pixel y from a line of ``pixels`` pixels.

    The interval of ``lengths[k]`` pixels from ``starts[k]`` on becomes ``size`` pixels; nothing outside it is
    read. The filter is Keys' cubic with a = -0.5, stretched by the scale when it shrinks (antialiasing), and
    renormalised at the ends: the weights of Pillow's BICUBIC on the cropped image.
    """
    pixel = torch.arange(pixels, device=starts.device, dtype=torch.float32) + 0.5
    target = torch.arange(size, device=starts.device, dtype=torch.float32) + 0.5
    start, length = starts.float()[:, None], lengths.float()[:, None]
    scale = length / size
    centre = start + target * scale
    distance = ((pixel - centre[..., None]) / scale.clamp_min(1.0)[..., None]).abs_()
    inside = (pixel > start) & (pixel < start + length)
    weights = _compute_keys_kernel(distance).mul_(inside[:, None])
    return weights.div_(weights.sum(-1, keepdim=True))


def _compute_keys_kernel(distance: Tensor) -> Tensor:
    """Keys' kernel (1981), a = -0.5, without branches: q²(q-1)/2 + p²(1-2p); q = (2-t)⁺, p = (1-t)⁺."""
    q = (2.0 - distance).clamp_min_(0.0)
    p = (1.0 - distance).clamp_min_(0.0)
    outer = (q - 1.0).mul_(q).mul_(q).mul_(0.5)
    return outer.add_(p.square().mul_(p.mul_(-2.0).add_(1.0)))


def make_gaussian_matrices(sigmas: Tensor, pixels: int, radius: int) -> Tensor:
    """float32 ``[K, pixels, pixels]``: symmetric band matrices of Gaussians with ``2 radius + 1`` taps.

    ``sigmas`` is ``[K]`` in pixels. The taps sum to one and what lies beyond the border counts as zero.
    """
    offset = torch.arange(-radius, radius + 1, device=sigmas.device, dtype=torch.float32)
    taps = torch.softmax(-offset.square() / (2.0 * sigmas.float().square())[:, None], dim=-1)
    line = F.pad(taps, (pixels - 1 - radius, pixels - 1 - radius))
    return line.unfold(-1, pixels, 1).flip(1)  # row i is the line shifted i pixels to the right
