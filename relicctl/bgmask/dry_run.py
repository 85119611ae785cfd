"""``train-bgmask --dry-run``: what a training of masks will take in steps, memory and disk."""

from __future__ import annotations

import copy
import json
import os
import textwrap
from typing import Any

import torch
from torch import nn

from relicctl.bgmask.data import open_bgmask_data, resolve_bgmask_run
from relicctl.bgmask.network import SaliencyNet, init_saliency_net
from relicctl.bgmask.priors.maps import PRIOR_NAMES
from relicctl.bgmask.self_training import count_total_steps, list_stages
from relicctl.config.bgmask import BgmaskConfig
from relicctl.config.resolve import ResolvedConfig, dump_yaml
from relicctl.core.hardware import count_elements, format_bytes, get_free_memory, pick_precision
from relicctl.data.mask_bank import MASK_SIDE
from relicctl.errors import UsageError
from relicctl.runs.context import Session
from relicctl.runs.distributed import resolve_device
from relicctl.runs.resume import BgmaskOptions


def check_training_memory(
    config: BgmaskConfig, net: SaliencyNet, images: int, precision: str, session: Session
) -> None:
    """Raise UsageError when training ``net`` clearly does not fit into memory; warn when it may not."""
    need = sum(estimate_training_memory(config, net, images, precision, session.world.size).values())
    free = get_free_memory(session.device)
    message = f"Training takes about {format_bytes(need)}, and {format_bytes(free)} of memory are free"
    advice = "lower optim.batch_size, model.size or data.images"
    if need > 1.5 * free:
        raise UsageError(f"{message}.", f"{advice.capitalize()}.")
    if need > free:
        session.console.warn(f"{message}; if it does not fit, {advice}")


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
        "total_steps": count_total_steps(config, images),
        "device": device.type,
        "precision": precision,
        "memory": estimate_training_memory(config, net, images, precision, processes),
        "free_memory": get_free_memory(device),
        "disk": {
            "priors": images * len(PRIOR_NAMES) * config.labels.size**2,
            "masks": len(data.masks_for) * (MASK_SIDE**2 // 8 + 22),
        },
    }


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
