"""What a training of masks works on and what it will take: the images, the facts of a run, a dry run."""

from __future__ import annotations

import copy
import json
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from relicctl import __version__
from relicctl.commands.common import pick_device
from relicctl.commands.options import BgmaskOptions
from relicctl.commands.resuming import continued, facts_of, run_to_resume
from relicctl.config.bgmask import BgmaskConfig
from relicctl.config.resolve import Resolved, dump_yaml
from relicctl.console import Console
from relicctl.core.counted import Stream
from relicctl.core.distributed import World
from relicctl.core.hardware import free_memory, pick_precision
from relicctl.data.joined import Joined
from relicctl.data.masks import SIDE
from relicctl.data.sources import Source, open_source
from relicctl.errors import DataError, UsageError
from relicctl.evaluation.during import shuffled
from relicctl.memory import count, in_units
from relicctl.saliency.nets import SaliencyNet, open_net
from relicctl.saliency.priors import NAMES
from relicctl.saliency.recipe import stages_of, total_steps
from relicctl.saliency.truth import TrueMasks, open_truth, refuse_among

# What may differ between a run and its continuation.
FREE_TO_CHANGE = ("runtime.", "checkpoint.", "data.train", "data.eval", "data.masks_for", "data.max_bad")


@dataclass(frozen=True)
class BgmaskData:
    """Images to train on, images that get masks, and images with true masks to measure on.

    ``trained_first``: those that get masks are the first of those to train on, under the same indices.
    """

    train: Source
    masks_for: Source
    truth: TrueMasks | None
    trained_first: bool


def settle(resolved: Resolved, options: BgmaskOptions) -> tuple[Resolved, Path | None]:
    """The config, and the run that is resumed if one is. Refuses what needs no data to be refused."""
    if options.resume is None:
        return resolved, None
    run = run_to_resume(options, resolved.preset, command="train-bgmask")
    return (continued(resolved, run, FREE_TO_CHANGE), run) if run is not None else (resolved, None)


def open_data(config: BgmaskConfig, download: bool, world: World | None = None) -> BgmaskData:
    """Raises DataError for what cannot be used, UsageError where no data are named."""
    if download and world is not None and world.size > 1:
        world.only(lambda: _opened(config, download))  # one process fetches
    return _opened(config, download)


def _opened(config: BgmaskConfig, download: bool) -> BgmaskData:
    specs = config.data.train
    if not specs:
        raise UsageError("No data is given.", "Give --data a folder, a .zip, a .tar, torchvision:NAME or shapes.")
    sources = [open_source(spec, split="train", download=download) for spec in specs]
    train: Source = sources[0] if len(sources) == 1 else Joined(sources)
    if len(train) < 2:
        raise DataError(f"{train.spec} holds one image, and masks are learned from many.", "Give more images.")
    every = len(train) <= config.data.images
    if not every:
        rows = np.sort(shuffled(len(train), config.seed, Stream.SUBSET)[: config.data.images])
        train = train.select(rows)
    masks_for = sources[0]
    if config.data.masks_for is not None:
        masks_for = open_source(config.data.masks_for, split="train", download=download)
    truth = None
    if config.data.eval is not None:
        for spec in (*specs, *([config.data.masks_for] if config.data.masks_for else ())):
            refuse_among(config.data.eval, spec)
        truth = open_truth(config.data.eval, config.data.eval_images, config.seed, download=download)
    return BgmaskData(train, masks_for, truth, every and config.data.masks_for is None)


def new_record(resolved: Resolved, data: BgmaskData, device: torch.device) -> dict[str, Any]:
    """What config.yaml says under ``run``: facts that a continuation must share."""
    return {
        "version": __version__,
        "preset": resolved.preset,
        "data_fingerprint": data.train.fingerprint(),
        "images": len(data.train),
        "precision": pick_precision(resolved.config.runtime.precision, device),
    }


def continued_record(run: Path, resolved: Resolved, data: BgmaskData, device: torch.device) -> dict[str, Any]:
    """The facts noted at the start; the precision may be chosen anew. Raises DataError for other images."""
    record = facts_of(run)
    if record["data_fingerprint"] != data.train.fingerprint():
        raise DataError(
            f"The images are not those that {run} was started with.",
            "Give --data the same images in the same order, or start another run.",
        )
    if resolved.origin["runtime.precision"] != "run":
        record["precision"] = pick_precision(resolved.config.runtime.precision, device)
    return record


def check_memory(
    config: BgmaskConfig,
    net: SaliencyNet,
    images: int,
    device: torch.device,
    precision: str,
    processes: int,
    console: Console,
) -> None:
    """Raises UsageError when training ``net`` clearly does not fit into memory; warns when it may not."""
    need, free = sum(memory(config, net, images, precision, processes).values()), free_memory(device)
    told = f"Training takes about {in_units(need)}, and {in_units(free)} of memory are free"
    ways = "lower optim.batch_size, model.size or data.images"
    if need > 1.5 * free:
        raise UsageError(f"{told}.", f"{ways.capitalize()}.")
    if need > free:
        console.warn(f"{told}; if it does not fit, {ways}")


def memory(config: BgmaskConfig, net: SaliencyNet, images: int, precision: str, processes: int = 1) -> dict[str, int]:
    """Bytes that one of the processes takes at the peak of a step of training ``net``, part by part.

    Assumed: every convolution and norm keeps its output.
    """
    weights = 4 * count(net.parameters())
    kept = _outputs(net, config.model.size) * (config.optim.batch_size // processes)
    return {
        "weights": weights,
        "gradients": weights,
        "optimiser": 2 * weights,
        "activations": (2 if precision == "bf16" else 4) * kept,
        # all, and beside them those trained on
        "images and labels": images * config.labels.size**2 * (3 + 1 + 5 + 2 * net.hints),
    }


def _outputs(net: SaliencyNet, size: int) -> int:
    """Numbers that one image leaves in the network for its backward pass."""
    net, kept = copy.deepcopy(net).to("meta"), []  # nothing is computed there
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    for layer in layers:
        layer.register_forward_hook(lambda _, __, output: kept.append(output.numel() // 2))
    with torch.no_grad():
        net(torch.empty(2, 3 + net.hints, size, size, device="meta"))
    return sum(kept)


def dry_run(resolved: Resolved, options: BgmaskOptions) -> str:
    """The resolved config and what it comes to: YAML with comments, or with ``options.json`` one JSON object."""
    resolved, _ = settle(resolved, options)
    config = resolved.config
    figures = plan(config, options.download)
    if options.json:
        return json.dumps({"config": config.model_dump(mode="json"), "origin": resolved.origin, **figures})
    return f"{dump_yaml(config, resolved.origin)}\n{_in_words(figures)}"


def plan(config: BgmaskConfig, download: bool) -> dict[str, Any]:
    """The figures of a run as plain data."""
    device, data = pick_device(config.runtime.device), open_data(config, download)
    precision, images = pick_precision(config.runtime.precision, device), len(data.train)
    net, processes = open_net(config), int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "parameters": count(net.parameters()),
        "images": images,
        "masks": len(data.masks_for),
        "eval_images": len(data.truth.images) if data.truth is not None else 0,
        "stages": stages(config, images),
        "total_steps": steps(config, images),
        "device": device.type,
        "precision": precision,
        "memory": memory(config, net, images, precision, processes),
        "free_memory": free_memory(device),
        "disk": {
            "priors": images * len(NAMES) * config.labels.size**2,
            "masks": len(data.masks_for) * (SIDE**2 // 8 + 22),
        },
    }


def steps(config: BgmaskConfig, images: int) -> int:
    """Of all trainings together. Raises UsageError when the images cannot fill one batch."""
    total = total_steps(config, images)
    if not total:
        raise UsageError(
            f"The batch of {config.optim.batch_size} images is larger than what is trained on: "
            f"{images} images less the share {config.labels.drop:g} whose labels are trusted least.",
            "Lower optim.batch_size or labels.drop, or give more images.",
        )
    return total


def stages(config: BgmaskConfig, images: int) -> list[str]:
    """What is done, in its order."""
    trainings = [f"{stage.name} ({stage.epochs} epochs)" for stage in stages_of(config, images)]
    return [f"priors ({', '.join(NAMES)})", *trainings, "masks"]


def _in_words(figures: dict[str, Any]) -> str:
    """The figures as comments, so that the whole output is a file for ``--config``."""
    memory, disk = figures["memory"], figures["disk"]
    lines = {
        "network": f"{figures['parameters']:,} parameters",
        "images": f"{figures['images']:,} to train on, {figures['masks']:,} to make masks for, "
        f"{figures['eval_images']:,} with true masks to measure on",
        "stages": ", ".join(figures["stages"]),
        "steps": f"{figures['total_steps']:,} in all",
        "memory": f"about {_sum(memory)} in {figures['precision']}, if every convolution and norm keeps its output; "
        f"{in_units(figures['free_memory'])} free on {figures['device']}",
        "disk": f"about {_sum(disk)}, and the checkpoints",
    }
    return "\n".join(
        textwrap.fill(text, 110, initial_indent=f"# {name:<8}  ", subsequent_indent="#" + " " * 11)
        for name, text in lines.items()
    )


def _sum(parts: dict[str, int]) -> str:
    named = ", ".join(f"{name} {in_units(size)}" for name, size in parts.items())
    return f"{in_units(sum(parts.values()))} ({named})"
