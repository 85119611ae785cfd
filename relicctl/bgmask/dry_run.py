"""``train-bgmask --dry-run``: what a training of masks will take in steps, memory and disk, before it is started."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch

from relicctl.bgmask.data import BgmaskData, open_bgmask_data
from relicctl.bgmask.network import SaliencyNet, init_saliency_net
from relicctl.bgmask.priors.maps import PRIOR_NAMES
from relicctl.bgmask.self_training import count_total_steps, list_stages
from relicctl.config.base import list_specs
from relicctl.config.bgmask import BgmaskConfig
from relicctl.config.resolve import ResolvedConfig
from relicctl.console import Console
from relicctl.core.hardware import count_elements, format_bytes, get_free_memory, pick_precision
from relicctl.data.datasets.open import check_data_exists
from relicctl.data.mask_bank import MASK_SIDE
from relicctl.runs.distributed import Session, resolve_device
from relicctl.runs.estimate import (
    OPTIMIZER_STATES,
    check_memory,
    count_outputs,
    estimate_training_memory,
    format_byte_sum,
    format_dry_run,
    list_saving_layers,
)
from relicctl.runs.resume import TrainingOptions, resolve_run


def format_bgmask_dry_run(resolved: ResolvedConfig, options: TrainingOptions) -> str:
    """Return the resolved config and its estimate: YAML with comments, or with ``options.json`` one JSON object."""
    resolved, _ = resolve_run(resolved, options)
    estimate = estimate_bgmask(resolved.config, options.download, Console(options.quiet))
    return format_dry_run(resolved, estimate, _describe_estimate(estimate), options.json)


def estimate_bgmask(config: BgmaskConfig, download: bool, console: Console) -> dict[str, Any]:
    """Return images, stages, steps and bytes of a run as plain data, None for what only the data could say."""
    device, data = resolve_device(config.runtime.device), _open_images(config, download, console)
    precision, net = pick_precision(config.runtime.precision, device), init_saliency_net(config, warn=console.warn)
    images, masks = (len(data.train), len(data.masks_for)) if data is not None else (None, None)
    trainings = [f"{stage.name} ({stage.epochs} epochs)" for stage in list_stages(config, images or 0)]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "parameters": count_elements(net.parameters()),
        "images": images,
        "masks": masks,
        "eval_images": len(data.truth.images) if data is not None and data.truth is not None else 0,
        "stages": [f"priors ({', '.join(PRIOR_NAMES)})", *trainings, "masks"],
        "total_steps": count_total_steps(config, images) if images is not None else None,
        "device": device.type,
        "precision": precision,
        "memory": estimate_memory(config, net, images or 0, precision, processes),
        "free_memory": get_free_memory(device),
        "disk": {
            "priors": (images or 0) * len(PRIOR_NAMES) * config.labels.size**2,
            "masks": (masks or 0) * (MASK_SIDE**2 // 8 + 22),
        },
    }


def _open_images(config: BgmaskConfig, download: bool, console: Console) -> BgmaskData | None:
    """Open the images; None where none to train on are given. Raises DataError for a path that is not there."""
    if config.data.train:
        return open_bgmask_data(config, download, console=console)
    for spec in (*list_specs(config.data.mask_data), *list_specs(config.data.eval)):
        check_data_exists(spec)
    return None


def check_training_memory(
    config: BgmaskConfig, net: SaliencyNet, images: int, precision: str, session: Session
) -> None:
    """Raise UsageError when training ``net`` clearly does not fit into memory; warn when it may not."""
    memory = estimate_memory(config, net, images, precision, session.world.size)
    advice = "lower optim.batch_size, model.size or data.max_train_images"
    check_memory("Training", sum(memory.values()), session.device, advice, session.console)


def estimate_memory(
    config: BgmaskConfig, net: SaliencyNet, images: int, precision: str, processes: int = 1
) -> dict[str, int]:
    """Return the bytes that one process takes at the peak of a step of training ``net``, part by part."""
    outline, size = copy.deepcopy(net).to("meta"), config.model.size
    batch = torch.empty(2, 3 + net.hints, size, size, device="meta")
    activations = sum(count_outputs(list_saving_layers(outline), lambda: outline(batch)).values())
    # The images in memory, and beside them the training set: images, labels and weights, and the priors if it has any.
    planes = 3 + (3 + 1 + 1) + 1 + 2 * net.hints
    return estimate_training_memory(
        net.parameters(),
        optimizer_states=OPTIMIZER_STATES["adamw"],
        activations=activations * (config.optim.batch_size // processes),
        precision=precision,
        **{"images and labels": images * config.labels.size**2 * planes},
    )


def _describe_estimate(estimate: dict[str, Any]) -> dict[str, str]:
    """Return the estimate in words, line by line."""
    images, steps = "unknown: no --data is given", "unknown"
    if estimate["images"] is not None:
        images = (
            f"{estimate['images']:,} to train on, {estimate['masks']:,} to create masks for, "
            f"{estimate['eval_images']:,} with ground-truth masks for evaluation"
        )
        steps = f"{estimate['total_steps']:,} in all"
    return {
        "network": f"{estimate['parameters']:,} parameters",
        "images": images,
        "stages": ", ".join(estimate["stages"]),
        "steps": steps,
        "memory": f"about {format_byte_sum(estimate['memory'])} per process in {estimate['precision']}, if every "
        f"convolution and norm stores its output; {format_bytes(estimate['free_memory'])} free on "
        f"{estimate['device']}",
        "disk": f"about {format_byte_sum(estimate['disk'])}, and the checkpoints"
        if estimate["images"] is not None
        else "unknown",
    }
