"""The photometric half of a view, batched on the device of the networks.

The operations, their order and ranges are BYOL's (arXiv 2006.07733, appendix B), as in ReLICv2's public code.
Parameters are drawn on the host, so it never waits for the device: an operation runs on the images that drew it,
through index lists that are copied ahead in one piece.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.photometric import (
    EPS,
    LUMA,
    AugmentConfig,
    AugmentParams,
    _apply_blur,
    _apply_to_rows,
    _copy_to_device,
    draw_augment_params,
)


def apply_augmentations(
    images: Tensor,
    params: AugmentParams,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Tensor:
    """Augment and normalise ``images`` on their device: float32 ``[V, B, 3, H, W]``.

    ``images`` are uint8, or float in [0, 1], as ``[V, B, 3, H, W]`` or ``[V, B, H, W, 3]``; ``params`` are for
    the same V views and B rows. A contiguous float32 ``[V, B, 3, H, W]`` may be overwritten.
    """
    if images.shape[2] != 3:
        images = images.movedim(-1, 2)
    with torch.autocast(images.device.type, enabled=False):
        kernels = load_triton_kernels(images.device)
        apply = kernels.apply if kernels is not None and kernels.is_supported(images) else _apply_torch
        return apply(images, params, mean, std)


@cache
def load_triton_kernels(device: torch.device) -> ModuleType | None:
    """Return the module ``augment_triton`` on a CUDA device where Triton works; it may lack a C compiler.

    Tried once per device; where it fails for any reason, the plain torch operations are used.
    """
    if device.type != "cuda":
        return None
    try:
        from relicctl.data import augment_triton

        images = torch.zeros(1, 1, 3, 2, 2, dtype=torch.uint8, device=device)
        params = draw_augment_params(AugmentConfig(), 0, 0, np.arange(1), 1)
        augment_triton.apply(images, params, IMAGENET_MEAN, IMAGENET_STD)
    except Exception:
        return None
    return augment_triton


def _apply_torch(images: Tensor, params: AugmentParams, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    x = images.to(torch.float32, memory_format=torch.contiguous_format).contiguous()
    if images.dtype == torch.uint8:
        x.div_(255.0)
    flat = x.view(-1, *x.shape[2:])  # the same memory, one image after the other
    device = x.device

    jitter = np.flatnonzero(params.jitter)
    orders, group = np.unique(params.order.reshape(-1, 4)[jitter], axis=0, return_inverse=True)
    jitter_groups = [jitter[group.ravel() == k] for k in range(len(orders))]  # the images of each order of operations
    chosen = [np.flatnonzero(gate) for gate in (params.flip, params.grayscale, params.blur, params.solarize)]
    flip, grayscale, blur, solarize, *jittered = _copy_to_device(chosen + jitter_groups, device)
    strengths = np.stack([params.brightness, params.contrast, params.saturation, params.hue, params.sigma])
    (table,) = _copy_to_device([strengths.reshape(5, -1).astype(np.float32)], device)

    _apply_to_rows(flat, flip, torch.flip, (-1,))
    for order, rows in zip(orders.tolist(), jittered, strict=True):
        strength = table.index_select(1, rows)[..., None, None, None]
        _apply_to_rows(flat, rows, _apply_jitter, order, strength)
    _apply_to_rows(flat, grayscale, _to_grayscale)
    _apply_to_rows(flat, blur, _apply_blur, table[4].index_select(0, blur))
    _apply_to_rows(flat, solarize, lambda image: torch.minimum(image, 1.0 - image))

    flat.clamp_(0.0, 1.0)
    for plane, centre, scale in zip(flat.unbind(1), mean, std, strict=True):
        plane.sub_(centre).div_(scale)
    return x


def _apply_jitter(x: Tensor, order: list[int], strength: Tensor) -> Tensor:
    for operation in order:
        x = JITTER_OPS[operation](x, strength[operation])
    return x


def _adjust_brightness(x: Tensor, added: Tensor) -> Tensor:
    return x.add_(added).clamp_(0.0, 1.0)


def _adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = x.mean(dim=(-2, -1), keepdim=True)
    return x.sub_(mean).mul_(factor).add_(mean).clamp_(0.0, 1.0)


def _adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply HSV's S by the factor, at most 1: with V and hue fixed every channel moves to V - (V - x) S'/S."""
    value, least = _compute_max_min(x)
    largest = value / value.sub(least).clamp_min_(EPS)  # 1/S; a grey pixel keeps its colour whatever stands here
    return torch.lerp(value, x, largest.minimum(factor))


def _adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate HSV's H and leave S and V: exact, without conversion to HSV and back.

    H runs round a hexagon of perimeter 6, on which every channel is a clipped triangle wave between least and
    value. Measured from cyan, the way is 2 + (r + least - g - b) / chroma, with the sign of b - g.
    """
    red, green, blue = x.split(1, dim=1)
    value, least = _compute_max_min(x)
    chroma = value - least
    way = (red + least).sub_(green).sub_(blue).div_(chroma.clamp_min(EPS)).add_(2.0)
    way.copysign_(blue - green).add_(6.0 * turns)
    way.sub_((way * (1.0 / 6.0)).round_(), alpha=6.0)  # once round is no way at all
    below, above = least - chroma, value + chroma
    torch.addcmul(above, chroma, (way + 1.0).abs_().clamp_(1.0, 2.0), value=-1.0, out=green)
    torch.addcmul(above, chroma, (way - 1.0).abs_().clamp_(1.0, 2.0), value=-1.0, out=blue)
    torch.addcmul(below, chroma, way.abs_().clamp_(1.0, 2.0), out=red)
    return x


def _compute_max_min(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest and least channel of every pixel, ``[n, 1, H, W]`` each."""
    red, green, blue = x.split(1, dim=1)
    return red.maximum(green).maximum(blue), red.minimum(green).minimum(blue)


JITTER_OPS = (_adjust_brightness, _adjust_contrast, _adjust_saturation, _adjust_hue)


def _to_grayscale(x: Tensor) -> Tensor:
    red, green, blue = x.split(1, dim=1)
    grey: Tensor = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    return grey.expand_as(x)
