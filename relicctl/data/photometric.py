"""The parameters of photometric augmentation, drawn for the global batch from (seed, step)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relicctl.core.counter_rng import Stream, draw_uniform
from relicctl.data.crops import make_gaussian_matrices

LUMA = (0.2989, 0.5870, 0.1140)
BLUR_SIGMA_RANGE = (0.1, 2.0)  # of the blur, in pixels
EPS = 1e-20  # keeps a division by a grey pixel's chroma finite


@dataclass(frozen=True)
class AugmentConfig:
    """Probabilities and strengths; the pairs are for the sets T and T', which views use alternately."""

    hflip_prob: float = 0.5
    color_jitter_prob: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_prob: float = 0.2
    blur_prob: tuple[float, float] = (1.0, 0.1)
    solarize_prob: tuple[float, float] = (0.0, 0.2)


@dataclass(frozen=True)
class AugmentParams:
    """What was drawn for every image: arrays ``[V, B]``; ``params[:2]`` are those of views 0 and 1.

    ``order``, ``[V, B, 4]``, holds the order of the jitter's operations, numbered as in ``JITTER_OPS``.
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

    def __getitem__(self, key: Any) -> AugmentParams:
        return AugmentParams(**{field.name: getattr(self, field.name)[key] for field in fields(self)})


def draw_augment_params(config: AugmentConfig, seed: int, step: int, rows: np.ndarray, views: int) -> AugmentParams:
    """Draw the parameters of a step for ``rows`` (``[B]``, positions in the global batch) and views 0 .. ``views - 1``.

    A draw depends on (seed, step, row, view) alone. Even views use set T, odd ones T'.
    """
    view = np.arange(views)[:, None]
    u = np.moveaxis(draw_uniform(seed, Stream.PHOTOMETRY, step, np.asarray(rows), view, n=14), -1, 0)

    def scale_to_range(low: float, high: float, uniform: np.ndarray) -> np.ndarray:
        return low + (high - low) * uniform

    return AugmentParams(
        flip=u[0] < config.hflip_prob,
        jitter=u[1] < config.color_jitter_prob,
        order=np.argsort(np.moveaxis(u[2:6], 0, -1), axis=-1),
        brightness=scale_to_range(-config.brightness, config.brightness, u[6]),
        contrast=scale_to_range(1 - config.contrast, 1 + config.contrast, u[7]),
        saturation=scale_to_range(1 - config.saturation, 1 + config.saturation, u[8]),
        hue=scale_to_range(-config.hue, config.hue, u[9]),
        grayscale=u[10] < config.grayscale_prob,
        blur=u[11] < np.asarray(config.blur_prob)[view % 2],
        sigma=scale_to_range(*BLUR_SIGMA_RANGE, u[12]),
        solarize=u[13] < np.asarray(config.solarize_prob)[view % 2],
    )


def _copy_to_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy the arrays to the device, in one copy that the host does not wait for."""
    joined = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        joined = joined.pin_memory()
    return list(joined.to(device, non_blocking=True).split([len(array) for array in arrays]))


def _apply_to_rows(flat: Tensor, rows: Tensor, operation: Callable[..., Tensor], *arguments: Any) -> None:
    """Replace the images at ``rows`` by the results of the operation."""
    if len(rows):
        flat.index_copy_(0, rows, operation(flat.index_select(0, rows), *arguments))


def _apply_blur(x: Tensor, sigmas: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    across = make_gaussian_matrices(sigmas, width, compute_blur_radius(width))
    down = across if height == width else make_gaussian_matrices(sigmas, height, compute_blur_radius(height))
    rows = torch.bmm(x.view(n, channels * height, width), across).view(x.shape)
    return torch.matmul(down[:, None], rows)


def compute_blur_radius(pixels: int) -> int:
    """Return the number of taps on either side of the middle one: 23 taps in all at 224 px, 9 at 96, 3 at 32."""
    return int(pixels / 10 / 2)
