"""Background removal: which large views are cropped from the masked image, and how it is masked.

As in ReLICv2 (arXiv 2201.05119), every large view independently uses the image without its background, with a
probability; small views never do. The mask is applied to the whole image, and the view is cropped from that.
Only the part that a crop needs is computed, and only for views that drew a mask. What a view draws depends on
(seed, epoch, sample, view) alone.

Masks of any shape are scaled to their image by the nearest pixel: the same bits in both ways of cropping.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from relicctl.core.counter_rng import Stream, derive_seed, draw_uniform
from relicctl.data.constants import IMAGENET_MEAN
from relicctl.data.crops import crop_on_device
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.mask_bank import MaskBank
from relicctl.data.sampler import DrawKey

FillMode = Literal["mean", "gray", "noise"]
FILL_COLORS = {"mean": np.rint(255 * np.array(IMAGENET_MEAN)).astype(np.uint8), "gray": np.full(3, 128, np.uint8)}
PIXEL = np.dtype("V3")  # three bytes as one
ALPHA_THRESHOLD = 128  # pixels of at least this alpha are foreground
NOISE_KEY = 1  # separates the noise from the draws of views


class MaskSource(ABC):
    """Where foreground masks come from."""

    @abstractmethod
    def read(self, index: int, image: np.ndarray) -> np.ndarray | None:
        """Return the foreground of sample ``index``: bool ``[h, w]`` of any shape; None without a usable mask.

        ``image``: the sample as loaded from ``get_image_source``.
        """

    def get_image_source(self, source: ImageDataset) -> ImageDataset:
        """Return what the images are loaded from, with all that ``read`` needs of them."""
        return source

    def select(self, images: list[np.ndarray], indices: Sequence[int]) -> MaskSource:
        """Return masks of images cached decoded: mask i is of sample ``indices[i]``, loaded as ``images[i]``."""
        return _PackedMasks([self.read(index, image) for index, image in zip(indices, images, strict=True)])


class BankMasks(MaskSource):
    """Masks of a bank. ``rows``, int64 ``[N]``: each sample's row there; ``limits``: range of foreground ratios."""

    def __init__(self, bank: MaskBank, rows: np.ndarray, limits: tuple[float, float]) -> None:
        self.bank, self.rows, self.limits = bank, rows, limits

    def is_usable(self) -> np.ndarray:
        """Return whose foreground lies within the limits: bool ``[N]``."""
        return np.asarray(_is_within(self.bank.get_foreground_ratio(self.rows), self.limits))

    def read(self, index: int, image: np.ndarray) -> np.ndarray | None:
        row = int(self.rows[index])
        return self.bank.load_mask(row) if _is_within(self.bank.get_foreground_ratio(row), self.limits) else None

    def select(self, images: list[np.ndarray], indices: Sequence[int]) -> BankMasks:
        return BankMasks(self.bank, self.rows[np.asarray(indices)], self.limits)


class AlphaMasks(MaskSource):
    """Masks from the images' alpha channels; images without one have no mask."""

    def __init__(self, limits: tuple[float, float]) -> None:
        self.limits = limits

    def get_image_source(self, source: ImageDataset) -> ImageDataset:
        source = copy.copy(source)
        source.decode = replace(source.decode, keep_alpha=True)
        return source

    def read(self, index: int, image: np.ndarray) -> np.ndarray | None:
        if image.shape[2] < 4:
            return None
        mask = image[..., 3] >= ALPHA_THRESHOLD
        return mask if _is_within(mask.mean(), self.limits) else None


class _PackedMasks(MaskSource):
    """Masks in memory as bits, at their images' shapes."""

    def __init__(self, masks: list[np.ndarray | None]) -> None:
        self._masks = [None if mask is None else (mask.shape, np.packbits(mask)) for mask in masks]

    def read(self, index: int, image: np.ndarray) -> np.ndarray | None:
        packed = self._masks[index]
        if packed is None:
            return None
        shape, bits = packed
        return np.unpackbits(bits, count=math.prod(shape)).view(bool).reshape(shape)


def _is_within(ratio: Any, limits: tuple[float, float]) -> Any:
    return (limits[0] <= ratio) & (ratio <= limits[1])


@dataclass(frozen=True)
class BackgroundRemoval:
    """Background removal of a run: where masks come from, how often, and what the background becomes."""

    masks: MaskSource
    probability: float
    fill: FillMode

    def draw_masked_views(self, key: DrawKey, views: int) -> np.ndarray:
        """Draw which large views of B samples get the image without its background: bool ``[B, views]``."""
        uniforms = draw_uniform(key.seed, Stream.MASK, key.epoch, key.samples[:, None], np.arange(views), n=1)
        return np.asarray(uniforms[..., 0] < self.probability)

    def build_fills(self, key: DrawKey, views: int, used: np.ndarray, images: list[np.ndarray]) -> ViewFills:
        """Return what removes the background of every large view of the images.

        ``used``, int ``[B]``: the samples that were loaded as ``images`` in the places of the key's samples.
        """
        fills: ViewFills = [[None] * views for _ in images]
        for row, drawn in enumerate(self.draw_masked_views(key, views)):
            mask = self.masks.read(int(used[row]), images[row]) if drawn.any() else None
            if mask is not None:
                height, width = images[row].shape[:2]
                for view in np.flatnonzero(drawn).tolist():
                    fill = self.make_fill_values(key[row], view, height, width)
                    fills[row][view] = BackgroundFill(mask, height, width, fill)
        return fills

    def make_fill_values(self, key: DrawKey, view: int, height: int, width: int) -> np.ndarray:
        """Return what the background becomes in one view of one sample, the key's.

        uint8 ``[3]``, or ``[height, width, 3]`` of noise that differs from view to view.
        """
        if self.fill != "noise":
            return np.asarray(FILL_COLORS[self.fill])
        count = 3 * height * width
        seed = derive_seed(key.seed, Stream.MASK, key.epoch, int(key.samples), view, NOISE_KEY)
        words = np.asarray(np.random.PCG64(seed).random_raw(-(-count // 8)), dtype="<u8")
        return words.view(np.uint8)[:count].reshape(height, width, 3)


class BackgroundFill:
    """Fills the background in any crop of an image of ``height`` x ``width`` pixels.

    The mask's few rows are stretched across the crop before they are copied to its lines, and numpy fills runs of
    whole pixels: this takes a third of the time of filling by channels.
    """

    def __init__(self, mask: np.ndarray, height: int, width: int, fill: np.ndarray) -> None:
        self._mask, self._height, self._width, self._fill = mask, height, width, fill

    def __call__(self, crop: np.ndarray, left: int, top: int) -> None:
        """Fill ``crop`` in place: uint8 ``[h, w, 3]``, contiguous, the pixels from (top, left) on."""
        h, w = crop.shape[:2]
        rows = _compute_nearest_indices(self._height, self._mask.shape[0])[top : top + h]
        columns = _compute_nearest_indices(self._width, self._mask.shape[1])[left : left + w]
        background = (~self._mask[rows[0] : rows[-1] + 1])[:, columns].take(rows - rows[0], axis=0)
        if self._fill.ndim == 1:
            fill = np.frombuffer(self._fill.tobytes() * w, PIXEL)
        else:
            fill = self._fill.view(PIXEL)[top : top + h, left : left + w, 0]
        np.copyto(crop.view(PIXEL)[..., 0], fill, where=background)


ViewFills = list[list[BackgroundFill | None]]  # per image and large view; None keeps the background


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the mask at the size of its image: bool ``[height, width]``."""
    rows, columns = map(_compute_nearest_indices, (height, width), mask.shape)
    return np.asarray(mask[rows][:, columns])


@lru_cache(maxsize=256)
def _compute_nearest_indices(pixels: int, side: int) -> np.ndarray:
    """Return, of ``side`` mask pixels, the one under the centre of each image pixel: int64 ``[pixels]``."""
    return (2 * np.arange(pixels) + 1) * side // (2 * pixels)


class DeviceMasks:
    """Masks of images of one size, packed at that size on the images' device: 1/24 of the images' memory."""

    def __init__(self, masking: BackgroundRemoval, images: list[np.ndarray], device: torch.device) -> None:
        self._masking = masking
        self._height, self._width = images[0].shape[:2]
        self._usable = np.zeros(len(images), dtype=bool)
        packed = np.zeros((len(images), -(-self._height * self._width // 8)), dtype=np.uint8)
        for place, image in enumerate(images):
            mask = masking.masks.read(place, image)
            if mask is not None:
                packed[place] = np.packbits(resize_mask(mask, self._height, self._width))
                self._usable[place] = True
        self._packed = torch.from_numpy(packed).to(device)
        self._shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)

    def crop_masked_views(self, views: Tensor, images: Tensor, boxes: np.ndarray, key: DrawKey) -> None:
        """Crop again the large views that drew a mask: float32 ``[V, B, 3, size, size]``, contiguous, in place.

        ``images``: uint8 ``[B, 3, H, W]``, those of the key's samples; ``boxes``: ``[B, V, 4]``.
        """
        (count, batch), samples = views.shape[:2], key.samples
        drawn = self._masking.draw_masked_views(key, count) & self._usable[samples][:, None]
        rows, chosen = np.nonzero(drawn)
        if not len(rows):
            return
        fills = [
            self._masking.make_fill_values(key[row], view, self._height, self._width)
            for row, view in zip(rows.tolist(), chosen.tolist(), strict=True)
        ]
        indices = torch.from_numpy(np.stack([rows, samples[rows], chosen * batch + rows]))
        row, sample, place = indices.to(images.device, non_blocking=True)
        bits = (self._packed[sample][..., None] >> self._shifts) & 1
        keep = bits.flatten(1)[:, : self._height * self._width].reshape(-1, 1, self._height, self._width).bool()
        fill = torch.from_numpy(np.stack(fills)).to(images.device, non_blocking=True)  # [K, 3] or [K, H, W, 3]
        filled = torch.where(keep, images[row], fill.movedim(-1, 1) if fill.ndim == 4 else fill[..., None, None])
        crops = crop_on_device(filled, boxes[rows, chosen][:, None], views.shape[-1])
        views.view(-1, *views.shape[2:]).index_copy_(0, place, crops[0])
