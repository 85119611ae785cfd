"""The handcrafted saliency priors of an image: where an object may be, by four methods without training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from relicctl.bgmask.priors.dsr import compute_dsr
from relicctl.bgmask.priors.mc import compute_mc
from relicctl.bgmask.priors.mr import compute_mr
from relicctl.bgmask.priors.rbd import compute_rbd
from relicctl.bgmask.priors.superpixels import Superpixels, segment_superpixels

PRIORS: dict[str, Callable[[Superpixels], np.ndarray]]  # of superpixels that are not featureless
PRIORS = {"rbd": compute_rbd, "mc": compute_mc, "dsr": compute_dsr, "mr": compute_mr}
PRIOR_NAMES = tuple(PRIORS)
MAX_LONG_SIDE = 200  # pixels; larger images are shrunk first: 200 superpixels need no more
UNDECIDED = 128  # of 255


def compute_prior_maps(image: np.ndarray, size: int) -> np.ndarray:
    """Compute the maps of ``image``, uint8 ``[H, W, 3]``, resized to squares: float32 ``[P, size, size]``, 0 to 1.

    In the order of PRIOR_NAMES. The map of a prior that is undefined for the image is all NaN; where the superpixels
    are featureless, all are.
    """
    superpixels = segment_superpixels(shrink_image(image))
    if superpixels.is_featureless:
        return np.full((len(PRIORS), size, size), np.nan, dtype=np.float32)
    return np.stack([resize_map_to_square(prior(superpixels)[superpixels.labels], size) for prior in PRIORS.values()])


def shrink_image(image: np.ndarray) -> np.ndarray:
    """Shrink ``image``, uint8 ``[H, W, 3]``, to a long side of at most MAX_LONG_SIDE."""
    height, width = image.shape[:2]
    scale = MAX_LONG_SIDE / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def resize_map_to_square(values: np.ndarray, size: int) -> np.ndarray:
    """Resize a map, ``[H, W]``, to float32 ``[size, size]``; all NaN if it has any."""
    if not np.isfinite(values).all():
        return np.full((size, size), np.nan, dtype=np.float32)
    square = Image.fromarray(values.astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(square), 0.0, 1.0)


def make_centre_prior(size: int) -> np.ndarray:
    """Return a Gaussian about the centre, the simplest prior: float32 ``[size, size]``, at most 1."""
    offset = np.square(((np.arange(size) + 0.5) / size - 0.5) / 0.25) / 2
    return np.exp(-(offset[:, None] + offset)).astype(np.float32)


def quantize_maps(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize float ``[P, S, S]``, 0 to 1 or NaN, to uint8; invalid maps are 0. Also which are valid, bool ``[P]``."""
    valid = np.isfinite(maps).all(axis=(1, 2))
    quantized = np.zeros(maps.shape, dtype=np.uint8)
    quantized[valid] = np.rint(255 * maps[valid])
    return quantized, valid


def build_prior_channels(maps: np.ndarray, valid: np.ndarray) -> Tensor:
    """Return uint8 ``[B, P, S, S]``: quantized ``maps``, the invalid ones replaced by the mean of the ``valid``.

    ``valid``: bool ``[B, P]``. Where none is, all are UNDECIDED.
    """
    filled = np.array(maps)
    for row in np.flatnonzero(~valid.all(1)).tolist():
        usable = valid[row]
        filled[row, ~usable] = np.rint(filled[row, usable].mean(axis=0)) if usable.any() else UNDECIDED
    return torch.from_numpy(filled)


def to_network_input(prior_channels: Tensor, side: int) -> Tensor:
    """Turn uint8 ``[B, P, S, S]`` into a network's input: float32 ``[B, P, side, side]`` from -1/2 to 1/2."""
    x = prior_channels.to(torch.float32) / 255
    if x.shape[-1] != side:
        x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return x - 0.5
