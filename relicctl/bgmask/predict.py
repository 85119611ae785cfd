"""Masks from a trained network: a batch of them, or the bank of a whole data set in one pass."""

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
from relicctl.config.bgmask import PredictConfig, RefineConfig
from relicctl.core.distributed import SINGLE_PROCESS, World
from relicctl.core.work_sharing import WorkResult, gather_in_order, shard
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.mask_bank import MASK_SIDE, MaskBankWriter

SIZE_DIVISOR = 32  # a network's input side is a multiple of it at every scale


@torch.no_grad()
def predict_saliency(
    net: SaliencyNet,
    images: Tensor,
    prior_channels: Tensor | None = None,
    *,
    options: PredictConfig,
    refine: RefineConfig,
    device: torch.device,
    precision: str,
    threads: int = 1,
) -> Tensor:
    """Probabilities, float32 ``[B, S, S]`` on the host, for squashed uint8 images ``[B, 3, S, S]`` of any side S.

    The network sees them at its own size and, averaged over, at each of ``options.scales`` of it and mirrored;
    what it says is brought back to S and, by ``options.refine``, drawn to the edges of the image as it is there.
    ``given``, uint8 ``[B, P, h, h]``: the images' hints, for a network that takes them.
    """
    net.eval()
    images = images.to(device)
    total = torch.zeros(len(images), *images.shape[2:], device=device)
    passes = [
        (scale, mirrored) for scale in options.scales for mirrored in ((False, True) if options.flip else (False,))
    ]
    for scale, mirrored in passes:
        side = max(SIZE_DIVISOR, SIZE_DIVISOR * round(net.size * scale / SIZE_DIVISOR))
        x = normalize_images(images, net.size if scale == 1 else side)
        if net.hints:
            assert prior_channels is not None
            x = torch.cat([x, to_network_input(prior_channels.to(device), x.shape[-1])], 1).contiguous(
                memory_format=torch.channels_last
            )
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(x.flip(-1) if mirrored else x)[0].float()
        logits = logits.flip(-1) if mirrored else logits
        enlarged = F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)
        total += enlarged.sigmoid()[:, 0]
    maps = total / len(passes)
    if options.refine == "guided":
        maps = apply_guided_filter(images, maps[:, None], refine.radius, refine.eps)[:, 0]
    elif options.refine == "cut":
        maps = refine_maps(images, maps, refine, threads).map
    return maps.cpu()


def normalize_images(images: Tensor, side: int) -> Tensor:
    """uint8 images ``[B, 3, S, S]`` as a network sees them: float32 ``[B, 3, side, side]``, channels last."""
    x = images.to(torch.float32) / 255
    if x.shape[-1] != side:
        x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
    mean, std = (x.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


@dataclass
class MaskCounts:
    """What was made in a pass: masks, how many of them are empty or full, samples that cannot be decoded."""

    written: int = 0
    empty: int = 0
    full: int = 0
    bad: int = 0


def write_mask_bank(
    net: SaliencyNet,
    source: ImageDataset,
    writer: MaskBankWriter | None,
    *,
    options: PredictConfig,
    refine: RefineConfig,
    device: torch.device,
    precision: str,
    workers: int,
    prior_size: int = 0,
    priors: PriorCache | None = None,
    threads: int = 1,
    show: Callable[[int], None] = lambda done: None,
    on_bad_image: Callable[[str, str], None] = lambda name, reason: None,
    world: World = SINGLE_PROCESS,
) -> MaskCounts:
    """Give every sample of ``source`` that ``writer`` misses a mask; an empty one where it cannot be decoded.

    Images are decoded and squashed by ``workers`` processes, and only a few batches are in memory at a time. For a
    network that takes hints they make priors of ``prior_size`` pixels as well; ``priors`` are those of the source where
    they are made already.
    ``show`` is told how many samples have masks, ``bad`` the name of a sample and what is wrong with it.
    The processes of ``world`` make a batch each in turn. The main one has the ``writer``, is told and gets the figures.
    """
    missing = np.array(
        world.broadcast_from_main(lambda: writer.find_missing().tolist() if writer else []), dtype=np.int64
    )
    batches = [missing[first : first + options.batch_size] for first in range(0, len(missing), options.batch_size)]
    mine = np.concatenate([missing[:0], *shard(world, batches)])  # cut into the same batches again
    counts, done = MaskCounts(), len(source) - len(missing)

    def predict_batch(batch: ResizedBatch) -> WorkResult:
        masks = torch.empty(0, MASK_SIDE, MASK_SIDE, dtype=torch.bool)
        if len(batch.indices):
            prior_channels = batch.prior_channels
            if net.hints and priors is not None:
                prior_channels = build_prior_channels(priors.maps[batch.indices], priors.valid[batch.indices])
            maps = predict_saliency(
                net,
                batch.images,
                prior_channels,
                options=options,
                refine=refine,
                device=device,
                precision=precision,
                threads=threads,
            )
            masks = maps > options.threshold
        return WorkResult((torch.from_numpy(batch.indices), masks), batch.bad)

    def write_batch(piece: WorkResult) -> None:
        assert writer is not None
        indices, masks = (tensor.numpy() for tensor in piece.tensors)
        for index, mask in zip(indices.tolist(), masks, strict=True):
            writer.write_mask(index, mask)
            counts.empty += not mask.any()
            counts.full += bool(mask.all())
        for index, reason in piece.meta:
            writer.write_mask(index, np.zeros((MASK_SIDE, MASK_SIDE), dtype=bool))
            on_bad_image(source.get_name(index), reason)
        counts.written += len(indices)
        counts.bad += len(piece.meta)
        show(done + counts.written + counts.bad)

    streamed_prior_size = prior_size if net.hints and priors is None else 0
    streamed = iter_resized_batches(
        source, mine, MASK_SIDE, batch_size=options.batch_size, workers=workers, prior_size=streamed_prior_size
    )
    with closing(streamed) as resized_batches:
        gather_in_order(world, len(batches), map(predict_batch, resized_batches), write_batch)
    return counts
