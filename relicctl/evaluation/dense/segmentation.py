"""Semantic segmentation: a dilated encoder, a small head, and mean intersection over union.

The set-up of BYOL (arXiv 2006.07733, appendix D): the encoder's last stage dilated, two 3x3 convolutions
with dilation 6, each with BatchNorm and ReLU, and a 1x1 convolution to the classes. Logits are enlarged bilinearly to
the image; where a mask says 255 nothing is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relicctl.config.dense import SegmentationConfig, SegmentationCrop
from relicctl.core.batchnorm import synchronised
from relicctl.core.counted import Stream, counted_seed
from relicctl.core.distributed import World, sum_over_processes
from relicctl.core.models.resnet import ResNet, seeded
from relicctl.data.augment import MEAN
from relicctl.data.images import BadImage
from relicctl.errors import DataError
from relicctl.evaluation.dense.dilated import dilated, feature_map
from relicctl.evaluation.dense.masks import IGNORED
from relicctl.evaluation.dense.samples import Samples
from relicctl.evaluation.dense.training import normalisation, prepared, sgd, spread, step_rate

TESTED_AT_ONCE = 16
FILL = np.rint(255 * np.array(MEAN)).astype(np.uint8)  # beyond the border: about 0 once normalised


class Segmenter(nn.Module):
    """[N, 3, H, W] -> logits [N, C, H, W]."""

    def __init__(self, encoder: ResNet, classes: int, channels: int, dilation: int) -> None:
        super().__init__()
        self.encoder = dilated(encoder)
        layers: list[nn.Module] = []
        width = encoder.feature_dim
        for _ in range(2):
            layers += [nn.Conv2d(width, channels, 3, padding=dilation, dilation=dilation, bias=False)]
            layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            width = channels
        self.head = nn.Sequential(*layers, nn.Conv2d(width, classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(feature_map(self.encoder, images))
        if logits.dtype == torch.bfloat16:
            logits = logits.float()
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


class SegmentationTask:
    """The loop's task. A batch is (images uint8 [B, H, W, 3], masks uint8 [B, H, W]), this process's rows of it."""

    def __init__(
        self, encoder: Any, classes: int, config: SegmentationConfig, device: torch.device, precision: str, world: World
    ) -> None:
        self._schedule, self._world = config.optim, world
        body = prepared(encoder, config.model, device, world)
        with seeded(counted_seed(config.seed, Stream.INIT, 1)):
            network = Segmenter(body, classes, config.head.channels, config.head.dilation)
        if world.size > 1:
            network.head = synchronised(network.head, device)
        self.state: Segmenter = network.to(device).to(memory_format=torch.channels_last).train()
        self._network = spread(self.state, world)
        self.optimizer: torch.optim.Optimizer = sgd(self.state, config.optim)
        self._mean, self._std = normalisation(encoder, device)
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        self._classes, self._device = classes, device

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        with self._autocast:
            return network((images.permute(0, 3, 1, 2) / 255 - self._mean) / self._std)

    def loss(self, batch: tuple[Tensor, Tensor], step: int) -> dict[str, Tensor]:
        """Cross-entropy, the mean over all pixels of the batch that count."""
        images, masks = batch
        logits = self._logits(self._network, images)
        total = F.cross_entropy(logits, masks.long(), ignore_index=IGNORED, reduction="sum")
        count = (masks != IGNORED).sum().float()
        if self._world.size > 1:  # the mean of the processes' gradients is then the gradient of the batch's mean
            count = sum_over_processes(count) / self._world.size
        return {"loss": total / count.clamp(min=1)}

    def learning_rate(self, step: int) -> float:
        return step_rate(step, self._schedule)

    def after_step(self, step: int) -> None:
        pass

    def describe(self, step: int) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def score(self, samples: Samples, bad: dict[int, str]) -> dict[str, Any]:
        """Figures on whole images; those that cannot be decoded come into ``bad``."""
        self.state.eval()
        confusion = torch.zeros(self._classes, self._classes, dtype=torch.int64, device=self._device)
        for images, masks in _same_sized(samples, bad):
            told = self._logits(self.state, torch.from_numpy(images).to(self._device)).argmax(1)
            confusion += confusion_of(torch.from_numpy(masks).to(self._device).long(), told, self._classes)
        shares = intersection_over_union(confusion)
        named = zip(samples.classes, shares.tolist(), strict=True)
        right = confusion.diagonal().sum() / confusion.sum().clamp(min=1)
        return {
            "miou": shares[~shares.isnan()].mean().item(),
            "pixel_accuracy": right.item(),
            "iou": {name: share if share == share else None for name, share in named},
        }


def confusion_of(truth: Tensor, told: Tensor, classes: int) -> Tensor:
    """int64 ``[C, C]``: pixels of class (row) told to be class (column); pixels that are 255 in truth do not count."""
    asked = truth != IGNORED
    return torch.bincount(truth[asked] * classes + told[asked], minlength=classes**2).view(classes, classes)


def intersection_over_union(confusion: Tensor) -> Tensor:
    """float64 ``[C]``; NaN for a class that neither is there nor was told."""
    both = confusion.diagonal().double()
    return both / (confusion.sum(0) + confusion.sum(1) - both)


@dataclass(frozen=True)
class ScaleCropFlip:
    """Resized by a drawn factor, placed or cut at random to a square, perhaps flipped; image and mask alike."""

    told: SegmentationCrop

    def __call__(self, image: np.ndarray, mask: np.ndarray, uniform: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 ``[size, size, 3]`` and uint8 ``[size, size]``, where 255 lies beyond the border."""
        if image.shape[:2] != mask.shape:
            raise DataError(
                f"An image of {image.shape[1]} x {image.shape[0]} has a mask of {mask.shape[1]} x {mask.shape[0]}.",
                "Give one index for every pixel of the image as it stands upright.",
            )
        size, (low, high) = self.told.size, self.told.scale
        factor = low + (high - low) * float(uniform[0])
        height, width = (max(1, round(factor * side)) for side in mask.shape)
        shifts = [int(u * (abs(side - size) + 1)) for u, side in zip(uniform[1:3], (height, width), strict=True)]
        cut = [shift if side > size else 0 for shift, side in zip(shifts, (height, width), strict=True)]
        put = [0 if side > size else shift for shift, side in zip(shifts, (height, width), strict=True)]
        rows, columns = min(size, height), min(size, width)
        planes = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
        resized = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        square = np.tile(FILL, (size, size, 1))
        labels = np.full((size, size), IGNORED, np.uint8)
        there = slice(put[0], put[0] + rows), slice(put[1], put[1] + columns)
        square[there] = resized[cut[0] : cut[0] + rows, cut[1] : cut[1] + columns]
        down, across = (
            ((np.arange(first, first + count) + 0.5) * old / new).astype(np.int64)
            for first, count, old, new in zip(cut, (rows, columns), mask.shape, (height, width), strict=True)
        )
        labels[there] = mask[down[:, None], across]
        if uniform[3] < self.told.flip:
            square, labels = square[:, ::-1].copy(), labels[:, ::-1].copy()
        return torch.from_numpy(square), torch.from_numpy(labels)


def stacked(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, masks = zip(*items, strict=True)
    return torch.stack(images), torch.stack(masks)


def _same_sized(samples: Samples, bad: dict[int, str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Whole images of one size in a row, at most so many, with their masks."""
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for index in range(len(samples)):
        try:
            image = samples.load(index)
        except BadImage as reason:
            bad[index] = reason.reason
            continue
        if images and (image.shape != images[0].shape or len(images) == TESTED_AT_ONCE):
            yield np.stack(images), np.stack(masks)
            images, masks = [], []
        images.append(image)
        masks.append(samples.target(index))
    if images:
        yield np.stack(images), np.stack(masks)
