"""The geometric half of a view: drawing its box, and cropping and resizing it.

Boxes are (left, top, width, height) in whole pixels. Resizing is antialiased bicubic on the cropped image,
first along the rows, then along the columns, clipped after each; uint8 on the host, float32 on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from relicctl.core.counter_rng import Stream, draw_uniform
from relicctl.data.sampler import DrawKey

# For each crop what changes its pixels in place, if anything does; it gets the crop's left and top.
CropEdits = Sequence[Callable[[np.ndarray, int, int], None] | None]

Oversized = Literal["redraw", "clamp"]

CROP_TRIES = 10  # draws before the centred fallback, as in torchvision's RandomResizedCrop


def draw_crop_boxes(
    key: DrawKey, sizes: np.ndarray, views: range, area: tuple[float, float], ratio: tuple[float, float],
    oversized: Oversized = "redraw",
) -> np.ndarray:  # fmt: skip
    """Draw a box for each of B samples and each of V ``views`` (their numbers): int32 ``[B, V, 4]``.

    ``sizes``: the images' (height, width), int ``[B, 2]``. A box depends on its sample's key and size and on its view
    alone. Its fraction of the image's area is uniform in ``area``, its width / height log-uniform in ``ratio``. A box
    larger than the image is drawn again ("redraw", the distribution of torchvision's RandomResizedCrop: the first of
    ten draws that fits, else the largest centred box of valid ratio), or cut to the image's sides ("clamp": BYOL's and
    ReLICv2's public code).
    """
    numbers = np.arange(views.start, views.stop)
    u = draw_uniform(key.seed, Stream.GEOMETRY, key.epoch, key.samples[:, None], numbers, n=2 * CROP_TRIES + 2)
    height, width = sizes.astype(np.int64).T[..., None]

    pixels = (height * width)[..., None] * (area[0] + (area[1] - area[0]) * u[..., :CROP_TRIES])
    log_low, log_high = np.log(ratio)
    ratios = np.exp(log_low + (log_high - log_low) * u[..., CROP_TRIES : 2 * CROP_TRIES])
    tried_w, tried_h = (np.rint(np.sqrt(side)).astype(np.int64) for side in (pixels * ratios, pixels / ratios))
    if oversized == "clamp":
        w, h = np.clip(tried_w[..., 0], 1, width), np.clip(tried_h[..., 0], 1, height)
        any_fits = np.ones_like(w, dtype=bool)
    else:
        w, h, any_fits = _pick_first_fit(tried_w, tried_h, width, height, ratio)
    left = np.where(any_fits, np.floor(u[..., -2] * (width - w + 1)), (width - w) // 2)
    top = np.where(any_fits, np.floor(u[..., -1] * (height - h + 1)), (height - h) // 2)
    return np.stack([left, top, w, h], axis=-1).astype(np.int32)


def _pick_first_fit(
    tried_w: np.ndarray, tried_h: np.ndarray, width: np.ndarray, height: np.ndarray, ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return width and height of the first of the tries that fits, or of the centred fallback; and where one fits."""
    fits = (tried_w > 0) & (tried_w <= width[..., None]) & (tried_h > 0) & (tried_h <= height[..., None])
    first = fits.argmax(-1)[..., None]
    any_fits = np.asarray(fits.any(-1))
    chosen_w, chosen_h = (np.take_along_axis(tried, first, axis=-1)[..., 0] for tried in (tried_w, tried_h))
    shape = np.clip(width / height, *ratio)
    w = np.where(any_fits, chosen_w, np.clip(np.rint(height * shape), 1, width))
    h = np.where(any_fits, chosen_h, np.clip(np.rint(width / shape), 1, height))
    return w, h, any_fits


def make_eval_box(height: int, width: int, crop_ratio: float) -> np.ndarray:
    """Return the centred square whose side is ``crop_ratio`` of the shorter side: int32 ``[4]``.

    Resizing it to s pixels equals resizing the short side to ``s / crop_ratio``, then cutting out the centre.
    """
    side = max(1, round(crop_ratio * min(height, width)))
    return np.array([(width - side) // 2, (height - side) // 2, side, side], dtype=np.int32)


def crop_on_host(
    image: np.ndarray, boxes: np.ndarray, size: int, out: np.ndarray | None = None, edits: CropEdits | None = None
) -> np.ndarray:
    """Crop and resize boxes ``[V, 4]`` of an image, uint8 ``[H, W, 3]``: uint8 ``[V, size, size, 3]``, or into ``out``.

    ``edits``, V of them: what changes a box's pixels before they are resized, as if it changed the image.

    torch resizes interleaved uint8 five times as fast as Pillow, with weights of 15 bits instead of 22: three
    pixels in a thousand differ by one grey level, two in a million by two. As in torchvision a box is cropped
    before it is resized: Pillow's ``resize(box=...)`` would also read neighbours outside the box.
    """
    if out is None:
        out = np.empty((len(boxes), size, size, 3), dtype=np.uint8)
    for crop, (left, top, w, h), edit in zip(out, boxes.tolist(), edits or [None] * len(boxes), strict=True):
        box = image[top : top + h, left : left + w].copy()  # row by row, many times as fast as torch's copy
        if edit is not None:
            edit(box, left, top)
        planes = torch.from_numpy(box)[None].permute(0, 3, 1, 2)  # channels_last, as is the result
        resized = F.interpolate(planes, size=(size, size), mode="bicubic", antialias=True)
        crop[:] = resized[0].permute(1, 2, 0).numpy()
    return out


def crop_on_device(images: Tensor, boxes: np.ndarray | Tensor, size: int) -> Tensor:
    """Crop and resize boxes ``[B, V, 4]`` of uint8 images ``[B, 3, H, W]``.

    Returns float32 ``[V, B, 3, size, size]`` in [0, 1].

    Two batched matrix products per view, on the images' device, in float32 whatever the autocast. Clipping
    between them is what every uint8 resize does, and a sharp edge shows it; nothing is rounded, so results are
    within 1.5 grey levels of those. On a CPU ``crop_on_host`` is faster above some 64 pixels.
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
    """Build float32 ``[K, size, pixels]``: row y of matrix k gives output pixel y of a line of ``pixels`` pixels.

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
    """Compute Keys' kernel (1981), a = -0.5, without branches: q²(q-1)/2 + p²(1-2p); q = (2-t)⁺, p = (1-t)⁺."""
    q = (2.0 - distance).clamp_min_(0.0)
    p = (1.0 - distance).clamp_min_(0.0)
    outer = (q - 1.0).mul_(q).mul_(q).mul_(0.5)
    return outer.add_(p.square().mul_(p.mul_(-2.0).add_(1.0)))


def make_gaussian_matrices(sigmas: Tensor, pixels: int, radius: int) -> Tensor:
    """Build float32 ``[K, pixels, pixels]``: symmetric band matrices of Gaussians with ``2 radius + 1`` taps.

    ``sigmas`` is ``[K]`` in pixels. The taps sum to one and what lies beyond the border counts as zero.
    """
    offset = torch.arange(-radius, radius + 1, device=sigmas.device, dtype=torch.float32)
    taps = torch.softmax(-offset.square() / (2.0 * sigmas.float().square())[:, None], dim=-1)
    line = F.pad(taps, (pixels - 1 - radius, pixels - 1 - radius))
    return line.unfold(-1, pixels, 1).flip(1)  # row i is the line shifted i pixels to the right
