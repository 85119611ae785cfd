"""The photometric half of a view, batched on whatever device the networks are on.

The operations, their order and ranges are BYOL's (arXiv 2006.07733, appendix B), as in ReLICv2's public code.
What each image gets is drawn on the host, so the device is never asked: an operation runs on the images that
drew it, through index lists that are sent ahead in one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relicctl.core.counted import Stream, counted_uniform
from relicctl.data.resample import gaussian_bands

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.5870, 0.1140)
SIGMA = (0.1, 2.0)  # of the blur, in pixels
TINY = 1e-20  # keeps a division by a grey pixel's chroma finite


@dataclass(frozen=True)
class Photometric:
    """Probabilities and strengths; the pairs are for the sets T and T', which the views take in turn."""

    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: tuple[float, float] = (1.0, 0.1)
    solarize: tuple[float, float] = (0.0, 0.2)


@dataclass(frozen=True)
class Photometry:
    """What was drawn for every image: arrays ``[V, B]``; ``draw[:2]`` is what views 0 and 1 got.

    ``order``, ``[V, B, 4]``, holds the jitter's operations in turn, numbered as in ``JITTER``.
    """

    flip: np.ndarray  # bool
    jitter: np.ndarray  # bool
    order: np.ndarray
    brightness: np.ndarray  # added
    contrast: np.ndarray  # factor
    saturation: np.ndarray  # factor
    hue: np.ndarray  # turns
    grayscale: np.ndarray  # bool
    blur: np.ndarray  # bool
    sigma: np.ndarray  # pixels
    solarize: np.ndarray  # bool

    def __getitem__(self, key: Any) -> Photometry:
        return Photometry(**{field.name: getattr(self, field.name)[key] for field in fields(self)})


def draw_photometry(spec: Photometric, seed: int, step: int, rows: np.ndarray, views: int) -> Photometry:
    """The draws of a step for ``rows`` (``[B]``, positions in the global batch) and views 0 .. ``views - 1``.

    A draw depends on (seed, step, row, view) alone. Even views use set T, odd ones T'.
    """
    view = np.arange(views)[:, None]
    u = np.moveaxis(counted_uniform(seed, Stream.PHOTOMETRY, step, np.asarray(rows), view, n=14), -1, 0)

    def between(low: float, high: float, uniform: np.ndarray) -> np.ndarray:
        return low + (high - low) * uniform

    return Photometry(
        flip=u[0] < spec.flip,
        jitter=u[1] < spec.jitter,
        order=np.argsort(np.moveaxis(u[2:6], 0, -1), axis=-1),
        brightness=between(-spec.brightness, spec.brightness, u[6]),
        contrast=between(1 - spec.contrast, 1 + spec.contrast, u[7]),
        saturation=between(1 - spec.saturation, 1 + spec.saturation, u[8]),
        hue=between(-spec.hue, spec.hue, u[9]),
        grayscale=u[10] < spec.grayscale,
        blur=u[11] < np.asarray(spec.blur)[view % 2],
        sigma=between(*SIGMA, u[12]),
        solarize=u[13] < np.asarray(spec.solarize)[view % 2],
    )


def apply_photometry(
    images: Tensor, draw: Photometry, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> Tensor:
    """float32 ``[V, B, 3, H, W]``, normalised: the images as drawn, on the images' device.

    ``images`` are uint8, or float in [0, 1], as ``[V, B, 3, H, W]`` or ``[V, B, H, W, 3]``; ``draw`` is for
    the same V views and B rows. A contiguous float32 ``[V, B, 3, H, W]`` may be overwritten.
    """
    if images.shape[2] != 3:
        images = images.movedim(-1, 2)
    with torch.autocast(images.device.type, enabled=False):
        kernels = _kernels(images)
        return (kernels.apply if kernels else _apply)(images, draw, mean, std)


def _kernels(images: Tensor) -> ModuleType | None:
    """The same as kernels of their own, where there are such for the images' device."""
    kernels = working_kernels(images.device)
    return kernels if kernels is not None and kernels.fits(images) else None


@cache
def working_kernels(device: torch.device) -> ModuleType | None:
    """The module ``augment_kernels`` on a CUDA device where Triton works: it may be missing, or want a C compiler.

    Tried once: what does not work here for whatever reason is left to the plain operations.
    """
    if device.type != "cuda":
        return None
    try:
        from relicctl.data import augment_kernels

        images = torch.zeros(1, 1, 3, 2, 2, dtype=torch.uint8, device=device)
        augment_kernels.apply(images, draw_photometry(Photometric(), 0, 0, np.arange(1), 1), MEAN, STD)
    except Exception:
        return None
    return augment_kernels


def _apply(images: Tensor, draw: Photometry, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    x = _to_planes(images)
    flat = x.view(-1, *x.shape[2:])  # the same memory, one image after the other
    device = x.device

    groups = _jitter_groups(draw)
    chosen = [np.flatnonzero(gate) for gate in (draw.flip, draw.grayscale, draw.blur, draw.solarize)]
    flip, grayscale, blur, solarize, *jittered = _send(chosen + [rows for _, rows in groups], device)
    strengths = np.stack([draw.brightness, draw.contrast, draw.saturation, draw.hue, draw.sigma])
    (table,) = _send([strengths.reshape(5, -1).astype(np.float32)], device)

    _rewrite(flat, flip, torch.flip, (-1,))
    for (order, _), rows in zip(groups, jittered, strict=True):
        strength = table.index_select(1, rows)[..., None, None, None]
        _rewrite(flat, rows, _jitter, order, strength)
    _rewrite(flat, grayscale, _grayscale)
    _rewrite(flat, blur, _blur, table[4].index_select(0, blur))
    _rewrite(flat, solarize, _solarize)

    flat.clamp_(0.0, 1.0)
    for plane, centre, scale in zip(flat.unbind(1), mean, std, strict=True):
        plane.sub_(centre).div_(scale)
    return x


def _to_planes(images: Tensor) -> Tensor:
    """float32 ``[V, B, 3, H, W]`` in [0, 1], contiguous; the images themselves if they are that already."""
    if images.dtype == torch.uint8:
        return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
    return images.to(torch.float32).contiguous()


def _jitter_groups(draw: Photometry) -> list[tuple[list[int], np.ndarray]]:
    """The images that jitter, grouped by the order of their operations: pairs (order, flat indices)."""
    rows = np.flatnonzero(draw.jitter)
    orders, group = np.unique(draw.order.reshape(-1, 4)[rows], axis=0, return_inverse=True)
    return [(order.tolist(), rows[group.ravel() == k]) for k, order in enumerate(orders)]


def _send(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on the device, in one copy that the host does not wait for."""
    joined = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        joined = joined.pin_memory()
    return list(joined.to(device, non_blocking=True).split([len(array) for array in arrays]))


def _rewrite(flat: Tensor, rows: Tensor, operation: Callable[..., Tensor], *arguments: Any) -> None:
    """Replaces the images at ``rows`` by what the operation makes of them."""
    if len(rows):
        flat.index_copy_(0, rows, operation(flat.index_select(0, rows), *arguments))


def _jitter(x: Tensor, order: list[int], strength: Tensor) -> Tensor:
    for operation in order:
        x = JITTER[operation](x, strength[operation])
    return x


def _brightness(x: Tensor, added: Tensor) -> Tensor:
    return x.add_(added).clamp_(0.0, 1.0)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = x.mean(dim=(-2, -1), keepdim=True)
    return x.sub_(mean).mul_(factor).add_(mean).clamp_(0.0, 1.0)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    """HSV's S times the factor, at most 1: with V and hue fixed every channel moves to V - (V - x) S'/S."""
    value, least = _extremes(x)
    largest = value / value.sub(least).clamp_min_(TINY)  # 1/S; a grey pixel keeps its colour whatever stands here
    return torch.lerp(value, x, largest.minimum(factor))


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """HSV's H turned, S and V kept: exact, without a round trip.

    H runs round a hexagon of perimeter 6, on which every channel is a clipped triangle wave between least and
    value. Measured from cyan, the way is 2 + (r + least - g - b) / chroma, to the side that b - g tells.
    """
    red, green, blue = x.split(1, dim=1)
    value, least = _extremes(x)
    chroma = value - least
    way = (red + least).sub_(green).sub_(blue).div_(chroma.clamp_min(TINY)).add_(2.0)
    way.copysign_(blue - green).add_(6.0 * turns)
    way.sub_((way * (1.0 / 6.0)).round_(), alpha=6.0)  # once round is no way at all
    below, above = least - chroma, value + chroma
    torch.addcmul(above, chroma, (way + 1.0).abs_().clamp_(1.0, 2.0), value=-1.0, out=green)
    torch.addcmul(above, chroma, (way - 1.0).abs_().clamp_(1.0, 2.0), value=-1.0, out=blue)
    torch.addcmul(below, chroma, way.abs_().clamp_(1.0, 2.0), out=red)
    return x


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and least channel of every pixel, ``[n, 1, H, W]`` each."""
    red, green, blue = x.split(1, dim=1)
    return red.maximum(green).maximum(blue), red.minimum(green).minimum(blue)


JITTER = (_brightness, _contrast, _saturation, _hue)


def _grayscale(x: Tensor) -> Tensor:
    red, green, blue = x.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).expand_as(x)


def _blur(x: Tensor, sigmas: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    across = gaussian_bands(sigmas, width, blur_radius(width))
    down = across if height == width else gaussian_bands(sigmas, height, blur_radius(height))
    rows = torch.bmm(x.view(n, channels * height, width), across).view(x.shape)
    return torch.matmul(down[:, None], rows)


def blur_radius(pixels: int) -> int:
    """Taps on either side of the middle one: 23 taps in all at 224 px, 9 at 96, 3 at 32."""
    return int(pixels / 10 / 2)


def _solarize(x: Tensor) -> Tensor:
    return torch.minimum(x, 1.0 - x)
