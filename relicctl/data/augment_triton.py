"""The photometric half of a view as three Triton kernels, in place of the dozens of launches of ``augment``.

Every image's parameters are a row of a table, so that images with different operations share a launch. The kernels
compute the channel means that contrast needs; flip, jitter and grayscale, read from uint8 and written once; solarize
and the normalisation, after the blur. The arithmetic is that of ``augment``, operation by operation.
"""

# Arguments of kernels are pointers and numbers on the GPU: they have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from relicctl.data.photometric import EPS, LUMA, AugmentParams, _apply_blur, _apply_to_rows, _copy_to_device

BLOCK = 1024  # pixels of an image to a program

# An image's row of the table: gates, the place of contrast in the jitter, four strengths, the jitter's order
FLIP, JITTER, GRAYSCALE, SOLARIZE, CONTRAST_TURN = (tl.constexpr(column) for column in range(5))
STRENGTH, ORDER, COLUMNS = tl.constexpr(5), tl.constexpr(9), tl.constexpr(13)
LUMA_R, LUMA_G, LUMA_B = (tl.constexpr(weight) for weight in LUMA)
KERNEL_EPS = tl.constexpr(EPS)


def is_supported(images: Tensor) -> bool:
    """Return whether the kernels can read ``[V, B, 3, H, W]``: images and their pixels must be evenly spaced."""
    view, image, _, row, pixel = images.stride()
    return view == images.shape[1] * image and row == images.shape[-1] * pixel


def apply(images: Tensor, params: AugmentParams, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Do what ``augment.apply_augmentations`` does: ``images`` are uint8 or float, ``[V, B, 3, H, W]``."""
    (height, width), count = images.shape[-2:], images.shape[0] * images.shape[1]
    pixels, blurred = height * width, np.flatnonzero(params.blur)
    columns = [
        params.flip, params.jitter, params.grayscale, params.solarize, (params.order == 1).argmax(-1),
        params.brightness, params.contrast, params.saturation, params.hue, *np.moveaxis(params.order, -1, 0),
    ]  # fmt: skip
    table, sigma = np.stack(columns, -1).astype(np.float32), params.sigma.ravel()[blurred].astype(np.float32)
    draws, sigmas = _copy_to_device([table.ravel(), sigma], images.device)
    (blurred_here,) = _copy_to_device([blurred], images.device)

    out = torch.empty(images.shape, device=images.device)
    means = torch.empty(count, 3, device=images.device)
    _, image, channel, _, pixel = images.stride()
    source = images, image, channel, pixel, 1 / 255 if images.dtype == torch.uint8 else 1.0
    blocks = triton.cdiv(pixels, BLOCK)
    _compute_means_kernel[(count,)](*source, draws, means, pixels, BLOCK)
    _jitter_kernel[(count, blocks)](*source, draws, means, out, pixels, width, BLOCK)
    _apply_to_rows(out.view(count, 3, height, width), blurred_here, _apply_blur, sigmas)
    _normalize_kernel[(3 * count, blocks)](out, draws, *mean, *std, pixels, BLOCK)
    return out


@triton.jit
def _compute_means_kernel(images, image, channel, pixel, scale, draws, means, pixels, block: tl.constexpr):
    """Compute the mean of each channel just before contrast; one image per program."""
    n = tl.program_id(0)
    row = draws + n * COLUMNS
    if tl.load(row + JITTER) > 0:
        start = images + n.to(tl.int64) * image
        before = tl.load(row + CONTRAST_TURN).to(tl.int32)
        red = tl.zeros([block], tl.float32)
        green = tl.zeros([block], tl.float32)
        blue = tl.zeros([block], tl.float32)
        for first in range(0, pixels, block):
            p = first + tl.arange(0, block)
            there = p < pixels
            r, g, b = _load_rgb(start + p * pixel, channel, scale, there)
            for turn in range(0, before):
                r, g, b = _apply_operation(r, g, b, row, turn, 0.0, 0.0, 0.0)
            red += tl.where(there, r, 0.0)
            green += tl.where(there, g, 0.0)
            blue += tl.where(there, b, 0.0)
        tl.store(means + 3 * n, tl.sum(red) / pixels)
        tl.store(means + 3 * n + 1, tl.sum(green) / pixels)
        tl.store(means + 3 * n + 2, tl.sum(blue) / pixels)


@triton.jit
def _jitter_kernel(images, image, channel, pixel, scale, draws, means, out, pixels, width, block: tl.constexpr):
    n = tl.program_id(0)
    row = draws + n * COLUMNS
    p = tl.program_id(1) * block + tl.arange(0, block)
    there = p < pixels
    source = p
    if tl.load(row + FLIP) > 0:
        source = p + width - 1 - 2 * (p % width)
    r, g, b = _load_rgb(images + n.to(tl.int64) * image + source * pixel, channel, scale, there)
    if tl.load(row + JITTER) > 0:
        mean_r = tl.load(means + 3 * n)
        mean_g = tl.load(means + 3 * n + 1)
        mean_b = tl.load(means + 3 * n + 2)
        for turn in range(0, 4):
            r, g, b = _apply_operation(r, g, b, row, turn, mean_r, mean_g, mean_b)
    if tl.load(row + GRAYSCALE) > 0:
        grey = r * LUMA_R + g * LUMA_G + b * LUMA_B
        r = grey
        g = grey
        b = grey
    to = out + n.to(tl.int64) * 3 * pixels + p
    tl.store(to, r, mask=there)
    tl.store(to + pixels, g, mask=there)
    tl.store(to + 2 * pixels, b, mask=there)


@triton.jit
def _normalize_kernel(images, draws, mean_r, mean_g, mean_b, std_r, std_g, std_b, pixels, block: tl.constexpr):
    plane = tl.program_id(0)
    colour = plane % 3
    p = tl.program_id(1) * block + tl.arange(0, block)
    there = p < pixels
    at = images + plane.to(tl.int64) * pixels + p
    x = tl.load(at, mask=there, other=0.0)
    if tl.load(draws + (plane // 3) * COLUMNS + SOLARIZE) > 0:
        x = tl.minimum(x, 1.0 - x)
    mean = tl.where(colour == 0, mean_r, tl.where(colour == 1, mean_g, mean_b))
    std = tl.where(colour == 0, std_r, tl.where(colour == 1, std_g, std_b))
    tl.store(at, (_clip(x) - mean) / std, mask=there)


@triton.jit
def _load_rgb(at, channel, scale, there):
    r = tl.load(at, mask=there, other=0).to(tl.float32) * scale
    g = tl.load(at + channel, mask=there, other=0).to(tl.float32) * scale
    b = tl.load(at + 2 * channel, mask=there, other=0).to(tl.float32) * scale
    return r, g, b


@triton.jit
def _apply_operation(r, g, b, row, turn, mean_r, mean_g, mean_b):
    """Apply the jitter's operation number ``turn``."""
    operation = tl.load(row + ORDER + turn).to(tl.int32)
    strength = tl.load(row + STRENGTH + operation)
    if operation == 0:
        r = _clip(r + strength)
        g = _clip(g + strength)
        b = _clip(b + strength)
    elif operation == 1:
        r = _clip((r - mean_r) * strength + mean_r)
        g = _clip((g - mean_g) * strength + mean_g)
        b = _clip((b - mean_b) * strength + mean_b)
    else:
        value = tl.maximum(tl.maximum(r, g), b)
        least = tl.minimum(tl.minimum(r, g), b)
        chroma = value - least
        part = tl.maximum(chroma, KERNEL_EPS)
        if operation == 2:
            weight = tl.minimum(value / part, strength)
            r = value + weight * (r - value)
            g = value + weight * (g - value)
            b = value + weight * (b - value)
        else:
            way = tl.abs((r + least - g - b) / part + 2.0)
            way = tl.where(b < g, -way, way) + 6.0 * strength
            way = way - 6.0 * tl.floor(way / 6.0 + 0.5)
            r = least - chroma + chroma * _clamp_1_to_2(way)
            g = value + chroma - chroma * _clamp_1_to_2(way + 1.0)
            b = value + chroma - chroma * _clamp_1_to_2(way - 1.0)
    return r, g, b


@triton.jit
def _clamp_1_to_2(way):
    return tl.minimum(tl.maximum(tl.abs(way), 1.0), 2.0)


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)
