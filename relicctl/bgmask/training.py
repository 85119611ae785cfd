"""Train a mask network on soft labels: the loop's batches, its task and the loss.

A batch is a function of (seed, step) alone: which images, where they are cropped (image, label and weight
alike), how their colours change. Each of several ranks has its rows of it, and they minimise the loss of the whole
batch. The labels come from priors or from an earlier network; nothing here ever sees a true mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from relicctl.config.bgmask import MaskLossConfig, MaskOptimConfig
from relicctl.core.distributed import SINGLE_PROCESS, World
from relicctl.core.loop import Task
from relicctl.core.optim import build_optimizer, compute_learning_rate
from relicctl.data.augment import apply_augmentations
from relicctl.data.crops import crop_on_device, draw_crop_boxes
from relicctl.data.photometric import AugmentConfig, draw_augment_params
from relicctl.data.sampler import DrawKey, Sampler
from relicctl.models.layers import convert_sync_batchnorm

EPS = 1e-6


@dataclass(frozen=True)
class Stage:
    """One training of a run; the last is the final network's. Its steps are ``first`` to ``last - 1`` of the run."""

    number: int
    name: str
    epochs: int
    first: int
    last: int

    @property
    def steps(self) -> int:
        return self.last - self.first

    @property
    def steps_per_epoch(self) -> int:
        return self.steps // self.epochs


@dataclass(frozen=True)
class MaskTrainingSet:
    """Training data on one device: uint8 images ``[K, 3, S, S]``; labels and weights ``[K, 1, S, S]``, 255 = 1.

    ``prior_channels``: uint8 ``[K, P, S, S]`` for a network that takes priors as input.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    prior_channels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class MaskAugmentation:
    """Random crops of ``size`` px, ``area`` (fraction of the image) and ``aspect`` (width / height); flip and colours.

    The arguments of RandomResizedCrop, and an AugmentConfig.
    """

    size: int
    area: tuple[float, float]
    aspect: tuple[float, float]
    photometric: AugmentConfig


@dataclass(frozen=True)
class MaskBatch:
    """float32: the network's input, normalised images and prior maps, ``[B, 3 + P, s, s]``; labels and weights
    ``[B, 1, s, s]`` in [0, 1].
    """

    images: Tensor
    labels: Tensor
    weights: Tensor


class MaskLoader:
    """The loop's batches, cut from images in memory, so that no time is spent waiting. Steps count from ``first``.

    ``batch_size`` is that of all ranks of ``world`` together. Raises UsageError if they cannot split it evenly.
    """

    data_wait_seconds = 0.0

    def __init__(
        self,
        data: MaskTrainingSet,
        views: MaskAugmentation,
        *,
        batch_size: int,
        seed: int,
        first: int = 0,
        world: World = SINGLE_PROCESS,
    ) -> None:
        self._data, self._views, self._seed, self._first = data, views, seed, first
        self.sampler = Sampler(seed, len(data), batch_size)
        self._rows = np.arange(*world.get_local_rows(batch_size))

    def iter_from_step(self, step: int, stop: int) -> Iterator[MaskBatch]:
        """Yield this rank's rows of the batches of steps ``step`` to ``stop - 1``."""
        return (self._make_batch(number - self._first) for number in range(step, stop))

    def _make_batch(self, step: int) -> MaskBatch:
        data, views, samples = self._data, self._views, self.sampler.get_batch_indices(step)[self._rows]
        rows = torch.from_numpy(samples).to(data.images.device)
        planes = [data.images, data.labels, data.weights]
        planes += [] if data.prior_channels is None else [data.prior_channels]
        layers = torch.cat([plane[rows] for plane in planes], 1)
        sizes = np.full((len(samples), 2), layers.shape[-1])
        key = DrawKey(self._seed, self.sampler.get_epoch(step), samples)
        boxes = draw_crop_boxes(key, sizes, range(1), views.area, views.aspect)
        crops = crop_on_device(layers, boxes, views.size)
        params = draw_augment_params(views.photometric, self._seed, step, self._rows, 1)
        flips = torch.from_numpy(params.flip[0]).to(crops.device)[:, None, None, None]
        maps = crops[0, :, 3:]
        maps = torch.where(flips, maps.flip(-1), maps)
        images = apply_augmentations(crops[:, :, :3], params)[0]
        if data.prior_channels is not None:
            images = torch.cat([images, maps[:, 2:] - 0.5], 1)
        return MaskBatch(images.contiguous(memory_format=torch.channels_last), maps[:, :1], maps[:, 1:2])


class MaskTask(Task):
    """The loop's task. The learning rate warms up and decays to 0 over the steps of ``stage``.

    With several ranks in ``world``, BatchNorm's statistics, the loss and its gradient are those of the whole batch.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: MaskLossConfig,
        optim: MaskOptimConfig,
        stage: Stage,
        autocast: torch.autocast,
        world: World = SINGLE_PROCESS,
    ) -> None:
        self._loss, self._optim, self._stage, self._autocast, self._world = loss, optim, stage, autocast, world
        self._warmup_steps = round(min(optim.warmup_epochs, stage.epochs) * stage.steps_per_epoch)
        self.model = self._network = net
        if world.size > 1:
            self.model = convert_sync_batchnorm(net, next(net.parameters()).device)
            self._network = DistributedDataParallel(self.model)
        self.optimizer = build_optimizer("adamw", self.model.named_parameters(), optim.base_lr, 0.9, optim.weight_decay)

    def compute_loss(self, batch: MaskBatch, step: int) -> dict[str, Tensor]:
        """Return ``loss``, the mean over all of the network's outputs, and ``fused``, that of the first alone."""
        self.model.train()
        with self._autocast:
            outputs = self._network(batch.images)
        total_weight = self._world.all_reduce_mean(batch.weights.sum())
        losses = [
            mask_loss(logits.to(batch.labels.dtype), batch.labels, batch.weights, self._loss, total_weight)
            for logits in outputs
        ]
        loss, fused = self._world.all_reduce_mean(torch.stack([torch.stack(losses).mean(), losses[0]])).unbind()
        return {"loss": loss, "fused": fused.detach()}

    def get_learning_rate(self, step: int) -> float:
        return compute_learning_rate(
            step - self._stage.first + 1,
            peak=self._optim.base_lr,
            warmup_steps=self._warmup_steps,
            total_steps=self._stage.steps + 1,
        )

    def compute_metrics(self, step: int) -> dict[str, float]:
        return {"stage": self._stage.number}


def mask_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, terms: MaskLossConfig, total_weight: Tensor | None = None
) -> Tensor:
    """Return the scalar loss of ``logits``, soft ``labels`` and pixel ``weights``, all float32 ``[B, 1, H, W]``.

    The weighted binary cross-entropy per pixel, plus, per image and from the soft overlap of prediction and label,
    1 - IoU and 1 - F (DeepUSPS, arXiv 1909.13055: (1 + beta2) PR / (beta2 P + R)). Pixels of weight 0 do not count.
    For one of several equal parts of a batch, ``total_weight`` (scalar) is the mean over the parts of the sum of their
    weights: then the mean of the parts' losses is the batch's.
    """
    total_weight = weights.sum() if total_weight is None else total_weight
    total = logits.new_zeros(())
    if terms.bce:
        cross = F.binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum")
        total = total + terms.bce * cross / total_weight.clamp_min(EPS)
    if terms.iou or terms.fbeta:
        p, y, w = logits.sigmoid().flatten(1), labels.flatten(1), weights.flatten(1)
        overlap, predicted, expected = (w * p * y).sum(1), (w * p).sum(1), (w * y).sum(1)
        if terms.iou:
            iou = (overlap + EPS) / (predicted + expected - overlap + EPS)
            total = total + terms.iou * (1 - iou).mean()
        if terms.fbeta:
            f = ((1 + terms.fbeta_beta2) * overlap + EPS) / (terms.fbeta_beta2 * expected + predicted + EPS)
            total = total + terms.fbeta * (1 - f).mean()
    return total
