"""Refine saliency maps along the image's edges, and fuse several priors into one soft label.

The edge-aware step is the guided filter of He, Sun and Tang (TPAMI 2013), with the colour image as the guide:
within every window the map is assumed to be a linear function of the colours. DeepUSPS (arXiv 1909.13055) used a
fully connected CRF here; the filter is batched and costs a few box filters.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from relicctl.config.bgmask import RefineConfig

EPS = 1e-6
GRABCUT_ITERATIONS = 1  # of fitting colours and cutting: a second one improves nothing and adds half the time


def apply_guided_filter(images: Tensor, maps: Tensor, radius: int, eps: float) -> Tensor:
    """Smooth ``maps``, float ``[B, P, H, W]``, along uint8 ``images``, ``[B, 3, H, W]``: float32 in [0, 1].

    ``radius``: of the square window, in pixels; ``eps``: the variance of colours in [0, 1] below which a window
    counts as flat.
    """
    guide, maps = images.to(torch.float32) / 255, maps.to(torch.float32)
    inside = _compute_box_mean(guide.new_ones(1, 1, *guide.shape[2:]), radius)  # less than 1 near the border

    def compute_mean(x: Tensor) -> Tensor:
        return _compute_box_mean(x, radius) / inside

    r, g, b = guide.unbind(1)
    colours = compute_mean(guide)
    squares = compute_mean(torch.stack([r * r, r * g, r * b, g * g, g * b, b * b], 1))
    inverse = _invert_covariance(colours, squares, eps)
    level = compute_mean(maps)
    cross = [compute_mean(guide[:, i, None] * maps) - colours[:, i, None] * level for i in range(3)]
    smooth, offset = torch.zeros_like(level), level
    for i, row in enumerate(inverse):  # of each colour, the map's slope in every window
        slope = row[0][:, None] * cross[0] + row[1][:, None] * cross[1] + row[2][:, None] * cross[2]
        offset = offset - slope * colours[:, i, None]
        smooth = smooth + compute_mean(slope) * guide[:, i, None]
    smooth = smooth + compute_mean(offset)
    return smooth.clamp(0, 1)


def _invert_covariance(mean: Tensor, squares: Tensor, eps: float) -> tuple[tuple[Tensor, ...], ...]:
    """Return 3 x 3 tensors ``[B, H, W]``: the inverse of the colours' covariance plus ``eps``, by cofactors.

    ``mean``: ``[B, 3, H, W]``; ``squares``: means of rr, rg, rb, gg, gb, bb, ``[B, 6, H, W]``.
    """
    r, g, b = mean.unbind(1)
    rr, rg, rb, gg, gb, bb = squares.unbind(1)
    rr, gg, bb = rr - r * r + eps, gg - g * g + eps, bb - b * b + eps
    rg, rb, gb = rg - r * g, rb - r * b, gb - g * b
    c00, c01, c02 = gg * bb - gb * gb, gb * rb - rg * bb, rg * gb - gg * rb
    c11, c12, c22 = rr * bb - rb * rb, rg * rb - rr * gb, rr * gg - rg * rg
    inverse_determinant = 1 / (rr * c00 + rg * c01 + rb * c02)
    c00, c01, c02, c11, c12, c22 = (c * inverse_determinant for c in (c00, c01, c02, c11, c12, c22))
    return (c00, c01, c02), (c01, c11, c12), (c02, c12, c22)


def _compute_box_mean(x: Tensor, radius: int) -> Tensor:
    """Return sums over windows of side 2 radius + 1, zeros beyond the border, divided by the window's area.

    Two products with a band matrix: on a CPU four times as fast as torch's pooling.
    """
    down, across = (_build_band_matrix(side, radius, x) for side in x.shape[-2:])
    return torch.matmul(down, torch.matmul(x, across))


def _build_band_matrix(side: int, radius: int, like: Tensor) -> Tensor:
    positions = torch.arange(side, device=like.device)
    return ((positions[:, None] - positions).abs() <= radius).to(like.dtype) / (2 * radius + 1)


def normalize_maps(maps: Tensor) -> Tensor:
    """Shift and scale each of ``maps``, float ``[..., H, W]``, to run from 0 to 1; a constant one becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp_min(EPS)


@dataclass(frozen=True)
class RefinedLabels:
    """Soft labels of B images: ``map`` float ``[B, S, S]`` in [0, 1], ``agreement`` float ``[B]`` from 0 to 1.

    ``agreement``: soft intersection over union of the map before and after the graph cut. Where no prior was valid
    both are 0.
    """

    map: Tensor
    agreement: Tensor


def fuse_priors(images: Tensor, maps: Tensor, valid: Tensor, refine: RefineConfig, threads: int = 1) -> RefinedLabels:
    """Fuse the valid priors of each image into one label.

    ``images``: uint8 ``[B, 3, S, S]``; ``maps``: float ``[B, P, S, S]`` in [0, 1], anything where not valid;
    ``valid``: bool ``[B, P]``.
    """
    valid_maps = torch.where(valid[:, :, None, None], maps, 0.0)
    mean = valid_maps.sum(1) / valid.sum(1).clamp_min(1)[:, None, None]
    labels = refine_maps(images, mean, refine, threads)
    return RefinedLabels(labels.map, torch.where(valid.any(1), labels.agreement, 0.0))


def refine_maps(images: Tensor, maps: Tensor, refine: RefineConfig, threads: int = 1) -> RefinedLabels:
    """Refine ``maps``, float ``[B, S, S]``, along the images' edges: guided filter, rescaling, then graph cut.

    The label is the mean of the filtered map and the cut, in which the cut has the weight ``refine.grabcut_weight``.
    """
    soft = normalize_maps(apply_guided_filter(images, maps[:, None], refine.radius, refine.eps)[:, 0])
    pixels, maps_on_cpu = images.permute(0, 2, 3, 1).cpu().numpy(), soft.cpu().numpy()
    thresholds = {"background": refine.bg_threshold, "foreground": refine.fg_threshold}
    hard = apply_grabcut(pixels, maps_on_cpu, **thresholds, threads=threads)
    solid = torch.from_numpy(hard).to(soft)
    return RefinedLabels(soft.lerp(solid, refine.grabcut_weight), _compute_soft_iou(soft, solid))


def _compute_soft_iou(a: Tensor, b: Tensor) -> Tensor:
    intersection, union = torch.minimum(a, b).sum((-2, -1)), torch.maximum(a, b).sum((-2, -1))
    return intersection / union.clamp_min(EPS)


def apply_grabcut(
    images: np.ndarray, maps: np.ndarray, *, background: float, foreground: float, threads: int = 1
) -> np.ndarray:
    """Segment uint8 ``images``, ``[B, S, S, 3]``, by GrabCut from ``maps``, float ``[B, S, S]``: bool ``[B, S, S]``.

    A pixel whose map is below ``background`` or above ``foreground`` is fixed. The others start on the side of Otsu's
    threshold. The result depends on the image and its map alone.
    """
    pairs = zip(images, maps, strict=True)
    with ThreadPoolExecutor(threads) as pool:  # OpenCV releases the GIL
        masks = list(pool.map(lambda pair: _apply_grabcut_to_image(pair[0], pair[1], background, foreground), pairs))
    return np.stack(masks) if masks else np.empty(maps.shape, dtype=bool)


def _apply_grabcut_to_image(
    image: np.ndarray, saliency: np.ndarray, background: float, foreground: float
) -> np.ndarray:
    level, _ = cv2.threshold(np.rint(255 * saliency).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    inside = saliency > level / 255
    state = np.where(inside, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    state[saliency < background] = cv2.GC_BGD
    state[saliency > foreground] = cv2.GC_FGD
    start = _is_foreground(state)
    if start.all() or not start.any():  # one of the two colour models would be empty
        return np.asarray(inside)
    cv2.setRNGSeed(0)  # of this thread; the mixtures are seeded by k-means
    mixtures = np.zeros((1, 65)), np.zeros((1, 65))
    no_rectangle = (0, 0, 0, 0)  # it starts from the mask
    cv2.grabCut(np.ascontiguousarray(image), state, no_rectangle, *mixtures, GRABCUT_ITERATIONS, cv2.GC_INIT_WITH_MASK)
    return _is_foreground(state)


def _is_foreground(state: np.ndarray) -> np.ndarray:
    return np.isin(state, (cv2.GC_FGD, cv2.GC_PR_FGD))
