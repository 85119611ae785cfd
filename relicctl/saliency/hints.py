"""Hints: the hand-made priors' maps of an image as a further input of a mask network (``model.priors``).

A network that sees only the image has to learn from a few thousand photos what the priors work out for every one of
them anew, its contrasts and borders; given their maps it learns when to trust which.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

UNDECIDED = 128


def quantize_maps(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float ``[P, S, S]`` from 0 to 1, or NaN, as they are kept: uint8 maps, 0 where not valid; which are, bool [P]."""
    valid = np.isfinite(maps).all(axis=(1, 2))
    quantized = np.zeros(maps.shape, dtype=np.uint8)
    quantized[valid] = np.rint(255 * maps[valid])
    return quantized, valid


def build_prior_channels(maps: np.ndarray, valid: np.ndarray) -> Tensor:
    """uint8 ``[B, P, S, S]`` of such ``maps``; one that is not ``valid``, ``[B, P]``, is the mean of those that are.

    Where none is, all are undecided throughout.
    """
    filled = np.array(maps)
    for row in np.flatnonzero(~valid.all(1)).tolist():
        usable = valid[row]
        filled[row, ~usable] = np.rint(filled[row, usable].mean(axis=0)) if usable.any() else UNDECIDED
    return torch.from_numpy(filled)


def to_network_input(prior_channels: Tensor, side: int) -> Tensor:
    """uint8 ``[B, P, S, S]`` as a network sees them: float32 ``[B, P, side, side]`` from -1/2 to 1/2."""
    x = prior_channels.to(torch.float32) / 255
    if x.shape[-1] != side:
        x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return x - 0.5
