"""Masks from a trained network: a batch of them, or the bank of a whole data set in one pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from relicctl.config.bgmask import Predict, Refine
from relicctl.core.distributed import World
from relicctl.core.turns import Piece, in_turn, own
from relicctl.data.augment import MEAN, STD
from relicctl.data.masks import SIDE, MaskBankWriter
from relicctl.data.sources import Source
from relicctl.saliency.hints import as_input, hints
from relicctl.saliency.nets import SaliencyNet
from relicctl.saliency.photos import Squashed, stream
from relicctl.saliency.prior_store import PriorStore
from relicctl.saliency.refine import guided_filter, sharpen

GRAIN = 32  # a network's input side is a multiple of it at every scale


@torch.no_grad()
def predict(
    net: SaliencyNet,
    images: Tensor,
    given: Tensor | None = None,
    *,
    options: Predict,
    refine: Refine,
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
    ways = [(scale, mirrored) for scale in options.scales for mirrored in ((False, True) if options.flip else (False,))]
    for scale, mirrored in ways:
        side = max(GRAIN, GRAIN * round(net.size * scale / GRAIN))
        x = normalised(images, net.size if scale == 1 else side)
        if net.hints:
            assert given is not None
            x = torch.cat([x, as_input(given.to(device), x.shape[-1])], 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(x.flip(-1) if mirrored else x)[0].float()
        logits = logits.flip(-1) if mirrored else logits
        enlarged = F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)
        total += enlarged.sigmoid()[:, 0]
    maps = total / len(ways)
    if options.refine == "guided":
        maps = guided_filter(images, maps[:, None], refine.radius, refine.eps)[:, 0]
    elif options.refine == "cut":
        maps = sharpen(images, maps, refine, threads).map
    return maps.cpu()


def normalised(images: Tensor, side: int) -> Tensor:
    """uint8 images ``[B, 3, S, S]`` as a network sees them: float32 ``[B, 3, side, side]``, channels last."""
    x = images.to(torch.float32) / 255
    if x.shape[-1] != side:
        x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
    mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


@dataclass
class BankFigures:
    """What was made in a pass: masks, how many of them are empty or full, samples that cannot be decoded."""

    made: int = 0
    empty: int = 0
    full: int = 0
    bad: int = 0


def make_bank(
    net: SaliencyNet,
    source: Source,
    writer: MaskBankWriter | None,
    *,
    options: Predict,
    refine: Refine,
    device: torch.device,
    precision: str,
    workers: int,
    prior_size: int = 0,
    priors: PriorStore | None = None,
    threads: int = 1,
    show: Callable[[int], None] = lambda done: None,
    bad: Callable[[str, str], None] = lambda name, reason: None,
    world: World | None = None,
) -> BankFigures:
    """Give every sample of ``source`` that ``writer`` misses a mask; an empty one where it cannot be decoded.

    Images are decoded and squashed by ``workers`` processes, and only a few batches are in memory at a time. For a
    network that takes hints they make priors of ``prior_size`` pixels as well; ``priors`` are those of the source where
    they are made already.
    ``show`` is told how many samples have masks, ``bad`` the name of a sample and what is wrong with it.
    The processes of ``world`` make a batch each in turn. The main one has the ``writer``, is told and gets the figures.
    """
    world = world or World()
    missing = np.array(world.lead(lambda: writer.missing().tolist() if writer else []), dtype=np.int64)
    batches = [missing[first : first + options.batch_size] for first in range(0, len(missing), options.batch_size)]
    mine = np.concatenate([missing[:0], *own(world, batches)])  # cut into the same batches again
    figures, done = BankFigures(), len(source) - len(missing)

    def made(some: Squashed) -> Piece:
        masks = torch.empty(0, SIDE, SIDE, dtype=torch.bool)
        if len(some.indices):
            given = some.hints
            if net.hints and priors is not None:
                given = hints(priors.maps[some.indices], priors.valid[some.indices])
            maps = predict(
                net,
                some.images,
                given,
                options=options,
                refine=refine,
                device=device,
                precision=precision,
                threads=threads,
            )
            masks = maps > options.threshold
        return Piece((torch.from_numpy(some.indices), masks), some.bad)

    def take(piece: Piece) -> None:
        assert writer is not None
        indices, masks = (tensor.numpy() for tensor in piece.tensors)
        for index, mask in zip(indices.tolist(), masks, strict=True):
            writer.put(index, mask)
            figures.empty += not mask.any()
            figures.full += bool(mask.all())
        for index, reason in piece.words:
            writer.put(index, np.zeros((SIDE, SIDE), dtype=bool))
            bad(source.key(index), reason)
        figures.made += len(indices)
        figures.bad += len(piece.words)
        show(done + figures.made + figures.bad)

    with_hints = prior_size if net.hints and priors is None else 0
    streamed = stream(source, mine, SIDE, batch_size=options.batch_size, workers=workers, with_hints=with_hints)
    with closing(streamed) as squashed:
        in_turn(world, len(batches), map(made, squashed), take)
    return figures
