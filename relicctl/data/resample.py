"""Resampling and blurring as small matrices, one per image, so that a batch is a batched matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
