"""Predict masks with a trained network: for a batch of images, or for a whole data set into a mask bank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from relicctl.bgmask.images import ResizedBatch, iter_resized_batches
from relicctl.bgmask.network import SaliencyNet
from relicctl.bgmask.prior_cache import PriorCache
from relicctl.bgmask.priors.maps import build_prior_channels, to_network_input
from relicctl.bgmask.refine import apply_guided_filter, refine_maps
from relicctl.config.bgmask import BgmaskConfig, PredictConfig, RefineConfig
from relicctl.core.distributed import SINGLE_PROCESS, World
from relicctl.core.hardware import count_process_cores
from relicctl.core.work_sharing import WorkResult, gather_in_order, shard
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.mask_bank import MASK_SIDE, MaskBankWriter
from relicctl.runs.distributed import RunContext

SIZE_DIVISOR = 32  # the side of a network's input is a multiple of this at every scale


@dataclass(frozen=True)
class SaliencyPredictor:
    """A trained network, and how its maps are predicted and refined; ``threads`` are those of the graph cut."""

    net: SaliencyNet
    options: PredictConfig
    refine: RefineConfig
    device: torch.device
    precision: str = "fp32"
    threads: int = 1

    @classmethod
    def from_config(cls, net: SaliencyNet, config: BgmaskConfig, context: RunContext) -> SaliencyPredictor:
        """Return the predictor that makes a run's masks."""
        return cls(net, config.predict, config.refine, context.device, context.precision, count_process_cores())

    @torch.no_grad()
    def predict(self, images: Tensor, prior_channels: Tensor | None = None) -> Tensor:
        """Return probabilities, float32 ``[B, S, S]`` on the CPU, for square uint8 ``images``, ``[B, 3, S, S]``.

        They are averaged over ``options.scales`` (factors on the network's size) and, with ``options.flip``, over the
        mirrored images, then resized to S and refined by ``options.refine``. ``prior_channels``, uint8
        ``[B, P, h, h]``: the prior maps, for a network that takes them as input.
        """
        self.net.eval()
        images = images.to(self.device)
        total = torch.zeros(len(images), *images.shape[2:], device=self.device)
        flips = (False, True) if self.options.flip else (False,)
        for scale in self.options.scales:
            for mirrored in flips:
                logits = self._compute_logits(images, prior_channels, scale, mirrored)
                resized = F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)
                total += resized.sigmoid()[:, 0]
        maps = total / (len(self.options.scales) * len(flips))
        if self.options.refine == "guided":
            maps = apply_guided_filter(images, maps[:, None], self.refine.radius, self.refine.eps)[:, 0]
        elif self.options.refine == "cut":
            maps = refine_maps(images, maps, self.refine, self.threads).map
        return maps.cpu()

    def predict_with_cache(self, images: Tensor, priors: PriorCache, indices: np.ndarray | slice) -> Tensor:
        """``predict``, with the cached ``priors`` of the samples at ``indices`` where the network takes priors."""
        prior_channels = build_prior_channels(priors.maps[indices], priors.valid[indices]) if self.net.hints else None
        return self.predict(images, prior_channels)

    def _compute_logits(self, images: Tensor, prior_channels: Tensor | None, scale: float, mirrored: bool) -> Tensor:
        """Return float32 ``[B, 1, side, side]`` at ``scale`` times the network's size."""
        side = max(SIZE_DIVISOR, SIZE_DIVISOR * round(self.net.size * scale / SIZE_DIVISOR))
        x = normalize_images(images, self.net.size if scale == 1 else side)
        if self.net.hints:
            assert prior_channels is not None
            priors = to_network_input(prior_channels.to(self.device), x.shape[-1])
            x = torch.cat([x, priors], 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits: Tensor = self.net(x.flip(-1) if mirrored else x)[0].float()
        return logits.flip(-1) if mirrored else logits


def normalize_images(images: Tensor, side: int) -> Tensor:
    """Turn uint8 images ``[B, 3, S, S]`` into a network's input: float32 ``[B, 3, side, side]``, channels last."""
    x = images.to(torch.float32) / 255
    if x.shape[-1] != side:
        x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
    mean, std = (x.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class MaskSource:
    """The images that get masks, decoded and resized by ``workers`` processes.

    A network that takes priors gets those of the cache ``priors``, which has the same indices; without a cache they
    are computed, ``prior_size`` pixels wide.
    """

    dataset: ImageDataset
    workers: int = 0
    prior_size: int = 0
    priors: PriorCache | None = None


def write_mask_bank(
    predictor: SaliencyPredictor,
    source: MaskSource,
    writer: MaskBankWriter | None,
    world: World = SINGLE_PROCESS,
    *,
    show: Callable[[int], None] = lambda done: None,
    on_bad_image: Callable[[str, str], None] = lambda name, reason: None,
) -> None:
    """Write a mask for every sample that ``writer`` misses; an empty one where the image cannot be decoded.

    Only a few batches are in memory at a time. ``show`` gets the number of samples that have masks, ``on_bad_image``
    the name of a sample and the reason. The ranks of ``world`` take batches in turn; the main one has the ``writer``
    and makes both calls.
    """
    dataset, options = source.dataset, predictor.options
    listed = world.broadcast_from_main(lambda: writer.find_missing().tolist() if writer else [])
    missing = np.array(listed, dtype=np.int64)
    batches = [missing[first : first + options.batch_size] for first in range(0, len(missing), options.batch_size)]
    local = np.concatenate([missing[:0], *shard(world, batches)])  # cut into the same batches again
    done = len(dataset) - len(missing)

    def predict_batch(batch: ResizedBatch) -> WorkResult:
        masks = torch.empty(0, MASK_SIDE, MASK_SIDE, dtype=torch.bool)
        if len(batch.indices):
            if source.priors is not None:
                maps = predictor.predict_with_cache(batch.images, source.priors, batch.indices)
            else:
                maps = predictor.predict(batch.images, batch.prior_channels)
            masks = maps > options.threshold
        return WorkResult((torch.from_numpy(batch.indices), masks), batch.bad)

    def write_batch(result: WorkResult) -> None:
        nonlocal done
        assert writer is not None
        indices, masks = (tensor.numpy() for tensor in result.tensors)
        for index, mask in zip(indices.tolist(), masks, strict=True):
            writer.write_mask(index, mask)
        for index, reason in result.meta:
            writer.write_mask(index, np.zeros((MASK_SIDE, MASK_SIDE), dtype=bool))
            on_bad_image(dataset.get_name(index), reason)
        done += len(indices) + len(result.meta)
        show(done)

    computed_size = source.prior_size if predictor.net.hints and source.priors is None else 0
    resized = iter_resized_batches(
        dataset, local, MASK_SIDE, batch_size=options.batch_size, workers=source.workers, prior_size=computed_size
    )
    with closing(resized) as resized_batches:
        gather_in_order(world, len(batches), map(predict_batch, resized_batches), write_batch)
