"""Semantic segmentation: a dilated encoder, a small head, and mean intersection over union.

The set-up of BYOL (arXiv 2006.07733, appendix D): the encoder's last stage dilated, two 3x3 convolutions
with dilation 6, each with BatchNorm and ReLU, and a 1x1 convolution to the classes. Logits are upsampled bilinearly
to the image; pixels with mask value 255 are ignored.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from relicctl.config.transfer import SegmentationConfig
from relicctl.data.constants import IMAGENET_MEAN
from relicctl.errors import DataError
from relicctl.evaluation.dense.data import DenseDataset, iter_decodable, to_device
from relicctl.evaluation.dense.segmentation_data import IGNORE_INDEX, open_segmentation_data
from relicctl.evaluation.dense.training import DenseTask
from relicctl.models.layers import convert_sync_batchnorm
from relicctl.models.resnet import ResNet

EVAL_BATCH_SIZE = 16
PAD_COLOR = np.rint(255 * np.array(IMAGENET_MEAN)).astype(np.uint8)  # about 0 after normalisation


class Segmenter(nn.Module):
    """[N, 3, H, W] -> logits [N, C, H, W]."""

    def __init__(self, encoder: ResNet, classes: int, channels: int, dilation: int) -> None:
        super().__init__()
        self.encoder = dilate_last_stage(encoder)
        layers: list[nn.Module] = []
        for width in (encoder.feature_dim, channels):
            layers += [nn.Conv2d(width, channels, 3, padding=dilation, dilation=dilation, bias=False)]
            layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.head = nn.Sequential(*layers, nn.Conv2d(channels, classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(compute_feature_map(self.encoder, images))
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class SegmentationTransform:
    """Random resize, crop or pad to a square, and flip; the same for image and mask."""

    config: SegmentationConfig

    def __call__(self, image: np.ndarray, mask: np.ndarray, uniform: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return uint8 ``[size, size, 3]`` and uint8 ``[size, size]``, 255 where it is padded."""
        if image.shape[:2] != mask.shape:
            what = f"An image of {image.shape[1]} x {image.shape[0]} has a mask of {mask.shape[1]} x {mask.shape[0]}."
            raise DataError(what, "Give one class index for every pixel of the image, upright.")
        crop = self.config.crop
        size, (low, high) = crop.size, crop.scale
        factor = low + (high - low) * float(uniform[0])
        height, width = (max(1, round(factor * side)) for side in mask.shape)
        shifts = [int(u * (abs(side - size) + 1)) for u, side in zip(uniform[1:3], (height, width), strict=True)]
        cut = [shift if side > size else 0 for shift, side in zip(shifts, (height, width), strict=True)]
        offset = [0 if side > size else shift for shift, side in zip(shifts, (height, width), strict=True)]
        rows, columns = min(size, height), min(size, width)
        planes = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
        resized = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        square = np.tile(PAD_COLOR, (size, size, 1))
        labels = np.full((size, size), IGNORE_INDEX, np.uint8)
        there = slice(offset[0], offset[0] + rows), slice(offset[1], offset[1] + columns)
        square[there] = resized[cut[0] : cut[0] + rows, cut[1] : cut[1] + columns]
        down, across = (
            ((np.arange(first, first + count) + 0.5) * old / new).astype(np.int64)
            for first, count, old, new in zip(cut, (rows, columns), mask.shape, (height, width), strict=True)
        )
        labels[there] = mask[down[:, None], across]
        if uniform[3] < crop.hflip_prob:
            square, labels = square[:, ::-1].copy(), labels[:, ::-1].copy()
        return torch.from_numpy(square), torch.from_numpy(labels)


class SegmentationTask(DenseTask):
    """The loop's task. A batch is (images uint8 [B, H, W, 3], masks uint8 [B, H, W]), this rank's rows of it."""

    name, metric = "segmentation", "miou"
    open_splits = staticmethod(open_segmentation_data)
    build_transform = SegmentationTransform
    collate = staticmethod(default_collate)

    def build_network(self, encoder: Any) -> nn.Module:
        network = Segmenter(encoder, self.classes, self.config.head.channels, self.config.head.dilation)
        if self.world.size > 1:
            network.head = convert_sync_batchnorm(network.head, self.device)
        return network.to(memory_format=torch.channels_last)

    def _compute_logits(self, network: nn.Module, images: Tensor) -> Tensor:
        with self.autocast:
            logits: Tensor = network((images.permute(0, 3, 1, 2) / 255 - self.mean) / self.std)
        return logits

    def compute_loss(self, batch: tuple[Tensor, Tensor], step: int) -> dict[str, Tensor]:
        """Return the cross-entropy, averaged over all pixels of the batch that are not ignored."""
        images, masks = batch
        logits = self._compute_logits(self.network, images)
        total = F.cross_entropy(logits, masks.long(), ignore_index=IGNORE_INDEX, reduction="sum")
        count = (masks != IGNORE_INDEX).sum().float()
        count = self.world.all_reduce_mean(count)  # so that averaging gradients over ranks gives the batch's gradient
        return {"loss": total / count.clamp(min=1)}

    @torch.no_grad()
    def score(self, samples: DenseDataset, bad: dict[int, str]) -> dict[str, Any]:
        self.model.eval()
        confusion = torch.zeros(self.classes, self.classes, dtype=torch.int64, device=self.device)
        for batch in _iter_same_size_batches(samples, bad):
            images, masks = to_device(default_collate(batch), self.device)
            predicted = self._compute_logits(self.model, images).argmax(1)
            confusion += compute_confusion_matrix(masks.long(), predicted, self.classes)
        iou = compute_iou(confusion)
        named = zip(samples.classes, iou.tolist(), strict=True)
        accuracy = confusion.diagonal().sum() / confusion.sum().clamp(min=1)
        return {
            "miou": iou[~iou.isnan()].mean().item(),
            "pixel_accuracy": accuracy.item(),
            "iou": {name: value if value == value else None for name, value in named},
        }


def compute_confusion_matrix(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return int64 ``[C, C]``: pixels of class (row) predicted as class (column), without those of value 255."""
    valid = truth != IGNORE_INDEX
    return torch.bincount(truth[valid] * classes + predicted[valid], minlength=classes**2).view(classes, classes)


def compute_iou(confusion: Tensor) -> Tensor:
    """Return the IoU of each class, float64 ``[C]``; NaN for a class that is neither present nor predicted."""
    both = confusion.diagonal().double()
    return both / (confusion.sum(0) + confusion.sum(1) - both)


def _iter_same_size_batches(
    samples: DenseDataset, bad: dict[int, str]
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Yield batches of consecutive whole images of equal size, with their masks."""
    batch: list[tuple[np.ndarray, np.ndarray]] = []
    for row, image in iter_decodable(samples, range(len(samples)), bad):
        if batch and (image.shape != batch[0][0].shape or len(batch) == EVAL_BATCH_SIZE):
            yield batch
            batch = []
        batch.append((image, samples.load_target(row)))
    if batch:
        yield batch


def dilate_last_stage(encoder: ResNet) -> ResNet:
    """Return a copy of ``encoder`` whose last stage has stride 1, and dilation 2 after its first convolution."""
    encoder = copy.deepcopy(encoder)
    strided_before = False
    for block in encoder.layer4:
        for name, conv in list(block.named_children()):
            if not isinstance(conv, nn.Conv2d) or conv.kernel_size == (1, 1):
                continue
            if conv.stride == (2, 2):
                setattr(block, name, _remove_stride(conv))
                strided_before = True
            elif strided_before:
                conv.dilation, conv.padding = (2, 2), (2, 2)
        if block.downsample is not None:
            cast(nn.Conv2d, cast(nn.Sequential, block.downsample)[0]).stride = (1, 1)
    return encoder


def compute_feature_map(encoder: ResNet, images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, feature_dim, h, w]: the features before the spatial mean."""
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))
    features: Tensor = encoder.layer4(encoder.layer3(encoder.layer2(encoder.layer1(x))))
    return features


def _remove_stride(conv: nn.Conv2d) -> nn.Conv2d:
    if conv.padding == (1, 1):
        conv.stride = (1, 1)
        return conv
    dense = _UnstridedSameConv2d(conv.in_channels, conv.out_channels, 3, bias=False)
    dense.weight = conv.weight
    return dense


class _UnstridedSameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding at stride 2, without the stride.

    At an even size SAME pads only at the end, so the strided kernels lie one pixel further than PyTorch's.
    Rows and columns are padded so that output 2 i equals output i of the strided convolution.
    """

    def forward(self, input: Tensor) -> Tensor:
        # the pixels that SAME pads before each side for a 3x3 kernel of stride 2
        height, width = (max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0) // 2 for size in input.shape[-2:])
        return F.conv2d(F.pad(input, (width, 2 - width, height, 2 - height)), self.weight)
