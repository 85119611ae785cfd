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
from relicctl.commands.common import resolve_device
from relicctl.commands.options import BgmaskOptions
from relicctl.commands.resuming import find_run_to_resume, read_resumable_record, resume_config
from relicctl.config.bgmask import BgmaskConfig
from relicctl.config.resolve import ResolvedConfig, dump_yaml
from relicctl.console import Console
from relicctl.core.counted import Stream
from relicctl.core.distributed import World
from relicctl.core.hardware import get_free_memory, pick_precision
from relicctl.data.joined import ConcatDataset
from relicctl.data.masks import MASK_SIDE
from relicctl.data.sources import ImageDataset, open_dataset
from relicctl.errors import DataError, UsageError
from relicctl.evaluation.during import permutation
from relicctl.memory import count_elements, format_bytes
from relicctl.saliency.nets import SaliencyNet, init_saliency_net
from relicctl.saliency.priors import PRIOR_NAMES
from relicctl.saliency.recipe import count_total_steps, list_stages
from relicctl.saliency.truth import GroundTruth, check_no_leak, open_ground_truth

# What may differ between a run and its continuation.
BGMASK_MUTABLE_KEYS = ("runtime.", "checkpoint.", "data.train", "data.eval", "data.masks_for", "data.max_bad")


@dataclass(frozen=True)
class BgmaskData:
    """Images to train on, images that get masks, and images with true masks to measure on.

    ``masks_for_is_prefix``: those that get masks are the first of those to train on, under the same indices.
    """

    train: ImageDataset
    masks_for: ImageDataset
    truth: GroundTruth | None
    masks_for_is_prefix: bool


def resolve_bgmask_run(resolved: ResolvedConfig, options: BgmaskOptions) -> tuple[ResolvedConfig, Path | None]:
    """The config, and the run that is resumed if one is. Refuses what needs no data to be refused."""
    if options.resume is None:
        return resolved, None
    run = find_run_to_resume(options, resolved.preset, command="train-bgmask")
    return (resume_config(resolved, run, BGMASK_MUTABLE_KEYS), run) if run is not None else (resolved, None)


def open_bgmask_data(config: BgmaskConfig, download: bool, world: World | None = None) -> BgmaskData:
    """Raises DataError for what cannot be used, UsageError where no data are named."""
    if download and world is not None and world.size > 1:
        world.run_on_main(lambda: _open_datasets(config, download))  # one process fetches
    return _open_datasets(config, download)


def _open_datasets(config: BgmaskConfig, download: bool) -> BgmaskData:
    specs = config.data.train
    if not specs:
        raise UsageError("No data is given.", "Give --data a folder, a .zip, a .tar, torchvision:NAME or shapes.")
    sources = [open_dataset(spec, split="train", download=download) for spec in specs]
    train: ImageDataset = sources[0] if len(sources) == 1 else ConcatDataset(sources)
    if len(train) < 2:
        raise DataError(f"{train.spec} holds one image, and masks are learned from many.", "Give more images.")
    all_used = len(train) <= config.data.images
    if not all_used:
        rows = np.sort(permutation(len(train), config.seed, Stream.SUBSET)[: config.data.images])
        train = train.select(rows)
    masks_for = sources[0]
    if config.data.masks_for is not None:
        masks_for = open_dataset(config.data.masks_for, split="train", download=download)
    truth = None
    if config.data.eval is not None:
        for spec in (*specs, *([config.data.masks_for] if config.data.masks_for else ())):
            check_no_leak(config.data.eval, spec)
        truth = open_ground_truth(config.data.eval, config.data.eval_images, config.seed, download=download)
    return BgmaskData(train, masks_for, truth, all_used and config.data.masks_for is None)


def make_bgmask_record(resolved: ResolvedConfig, data: BgmaskData, device: torch.device) -> dict[str, Any]:
    """What config.yaml says under ``run``: facts that a continuation must share."""
    return {
        "version": __version__,
        "preset": resolved.preset,
        "data_fingerprint": data.train.compute_fingerprint(),
        "images": len(data.train),
        "precision": pick_precision(resolved.config.runtime.precision, device),
    }


def resume_bgmask_record(run: Path, resolved: ResolvedConfig, data: BgmaskData, device: torch.device) -> dict[str, Any]:
    """The facts noted at the start; the precision may be chosen anew. Raises DataError for other images."""
    record = read_resumable_record(run)
    if record["data_fingerprint"] != data.train.compute_fingerprint():
        raise DataError(
            f"The images are not those that {run} was started with.",
            "Give --data the same images in the same order, or start another run.",
        )
    if resolved.origin["runtime.precision"] != "run":
        record["precision"] = pick_precision(resolved.config.runtime.precision, device)
    return record


def check_training_memory(
    config: BgmaskConfig,
    net: SaliencyNet,
    images: int,
    device: torch.device,
    precision: str,
    processes: int,
    console: Console,
) -> None:
    """Raises UsageError when training ``net`` clearly does not fit into memory; warns when it may not."""
    need, free = (
        sum(estimate_training_memory(config, net, images, precision, processes).values()),
        get_free_memory(device),
    )
    message = f"Training takes about {format_bytes(need)}, and {format_bytes(free)} of memory are free"
    advice = "lower optim.batch_size, model.size or data.images"
    if need > 1.5 * free:
        raise UsageError(f"{message}.", f"{advice.capitalize()}.")
    if need > free:
        console.warn(f"{message}; if it does not fit, {advice}")


def estimate_training_memory(
    config: BgmaskConfig, net: SaliencyNet, images: int, precision: str, processes: int = 1
) -> dict[str, int]:
    """Bytes that one of the processes takes at the peak of a step of training ``net``, part by part.

    Assumed: every convolution and norm keeps its output.
    """
    weights = 4 * count_elements(net.parameters())
    activations = _count_activations(net, config.model.size) * (config.optim.batch_size // processes)
    return {
        "weights": weights,
        "gradients": weights,
        "optimiser": 2 * weights,
        "activations": (2 if precision == "bf16" else 4) * activations,
        # all, and beside them those trained on
        "images and labels": images * config.labels.size**2 * (3 + 1 + 5 + 2 * net.hints),
    }


def _count_activations(net: SaliencyNet, size: int) -> int:
    """Numbers that one image leaves in the network for its backward pass."""
    net, sizes = copy.deepcopy(net).to("meta"), []  # nothing is computed there
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    for layer in layers:
        layer.register_forward_hook(lambda _, __, output: sizes.append(output.numel() // 2))
    with torch.no_grad():
        net(torch.empty(2, 3 + net.hints, size, size, device="meta"))
    return sum(sizes)


def format_bgmask_dry_run(resolved: ResolvedConfig, options: BgmaskOptions) -> str:
    """The resolved config and what it comes to: YAML with comments, or with ``options.json`` one JSON object."""
    resolved, _ = resolve_bgmask_run(resolved, options)
    config = resolved.config
    estimate = estimate_bgmask(config, options.download)
    if options.json:
        return json.dumps({"config": config.model_dump(mode="json"), "origin": resolved.origin, **estimate})
    return f"{dump_yaml(config, resolved.origin)}\n{_format_bgmask_estimate(estimate)}"


def estimate_bgmask(config: BgmaskConfig, download: bool) -> dict[str, Any]:
    """The figures of a run as plain data."""
    device, data = resolve_device(config.runtime.device), open_bgmask_data(config, download)
    precision, images = pick_precision(config.runtime.precision, device), len(data.train)
    net, processes = init_saliency_net(config), int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "parameters": count_elements(net.parameters()),
        "images": images,
        "masks": len(data.masks_for),
        "eval_images": len(data.truth.images) if data.truth is not None else 0,
        "stages": list_stage_names(config, images),
        "total_steps": count_training_steps(config, images),
        "device": device.type,
        "precision": precision,
        "memory": estimate_training_memory(config, net, images, precision, processes),
        "free_memory": get_free_memory(device),
        "disk": {
            "priors": images * len(PRIOR_NAMES) * config.labels.size**2,
            "masks": len(data.masks_for) * (MASK_SIDE**2 // 8 + 22),
        },
    }


def count_training_steps(config: BgmaskConfig, images: int) -> int:
    """Of all trainings together. Raises UsageError when the images cannot fill one batch."""
    total = count_total_steps(config, images)
    if not total:
        raise UsageError(
            f"The batch of {config.optim.batch_size} images is larger than what is trained on: "
            f"{images} images less the share {config.labels.drop:g} whose labels are trusted least.",
            "Lower optim.batch_size or labels.drop, or give more images.",
        )
    return total


def list_stage_names(config: BgmaskConfig, images: int) -> list[str]:
    """What is done, in its order."""
    trainings = [f"{stage.name} ({stage.epochs} epochs)" for stage in list_stages(config, images)]
    return [f"priors ({', '.join(PRIOR_NAMES)})", *trainings, "masks"]


def _format_bgmask_estimate(estimate: dict[str, Any]) -> str:
    """The figures as comments, so that the whole output is a file for ``--config``."""
    memory, disk = estimate["memory"], estimate["disk"]
    lines = {
        "network": f"{estimate['parameters']:,} parameters",
        "images": f"{estimate['images']:,} to train on, {estimate['masks']:,} to make masks for, "
        f"{estimate['eval_images']:,} with true masks to measure on",
        "stages": ", ".join(estimate["stages"]),
        "steps": f"{estimate['total_steps']:,} in all",
        "memory": f"about {_format_byte_total(memory)} in {estimate['precision']}, if every convolution and norm "
        "keeps its output; "
        f"{format_bytes(estimate['free_memory'])} free on {estimate['device']}",
        "disk": f"about {_format_byte_total(disk)}, and the checkpoints",
    }
    return "\n".join(
        textwrap.fill(text, 110, initial_indent=f"# {name:<8}  ", subsequent_indent="#" + " " * 11)
        for name, text in lines.items()
    )


def _format_byte_total(parts: dict[str, int]) -> str:
    parts_text = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    return f"{format_bytes(sum(parts.values()))} ({parts_text})"
