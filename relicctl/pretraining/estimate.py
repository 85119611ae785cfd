"""``pretrain --dry-run``: what a pretraining will take in steps, memory and disk, before anything is started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from relicctl.config.base import list_specs
from relicctl.config.pretrain import PretrainConfig
from relicctl.config.resolve import ResolvedConfig
from relicctl.console import Console
from relicctl.core.hardware import count_elements, format_bytes, get_free_memory
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.datasets.open import check_data_exists
from relicctl.data.mask_bank import MaskBank
from relicctl.data.sampler import Sampler
from relicctl.encoders.file import load_encoder
from relicctl.errors import DataError, UsageError
from relicctl.models.resnet import ResNet
from relicctl.models.siamese import Siamese
from relicctl.pretraining.data import open_masking, open_pretrain_data, resolve_bank_path
from relicctl.pretraining.task import Schedule, build_networks, resolve_precision
from relicctl.runs.distributed import resolve_device
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

BYTES_PER_METRICS_LINE = 400
ASSUMED_STEPS_PER_EPOCH = 1000  # while the size of the data is unknown


def format_pretrain_dry_run(resolved: ResolvedConfig, options: TrainingOptions) -> str:
    """Return the resolved config and its estimate: YAML with comments, or with ``options.json`` one JSON object."""
    resolved, resumed = resolve_run(resolved, options)
    if options.init_from is not None and resumed is None:
        load_encoder(options.init_from)  # raises UsageError, as the run would
    resolved = resolve_bank_path(resolved)
    estimate = estimate_pretrain(resolved.config, download=options.download)
    return format_dry_run(resolved, estimate, _describe_estimate(resolved.config, estimate), options.json)


def estimate_pretrain(config: PretrainConfig, *, download: bool = False) -> dict[str, Any]:
    """Return bytes, steps and images of a run as plain data, None for what only the data could say.

    Raises UsageError when a batch exceeds the data or the memory, DataError for data or masks that cannot be used.
    """
    device, processes = resolve_device(config.runtime.device), int(os.environ.get("WORLD_SIZE", "1"))
    check_view_memory(config, device, processes)
    train, unknown = _open_training_images(config, download)
    images = len(train) if train is not None else None
    masks = open_masking(config, train, Console(quiet=True))[1] if train is not None else None
    steps = Sampler(config.seed, images, config.optim.batch_size).steps_per_epoch if images else None
    schedule = Schedule(config, steps or ASSUMED_STEPS_PER_EPOCH)
    networks, precision = outline_networks(config), resolve_precision(config, device)
    total = schedule.total_steps
    milestones = {"start": 0, "warmed up": schedule.warmup_steps, "middle": total // 2, "end": total}
    return {
        "parameters": {
            "encoder": count_elements(networks.online["encoder"].parameters()),
            "online": count_elements(networks.online.parameters()),
            "target": count_elements(networks.target.parameters()) if networks.target else 0,
        },
        "images": images,
        "images_unknown": unknown,
        "bgmask": masks,
        "crops_per_image": config.views.large.count + config.views.small.count,
        "steps_per_epoch": steps,
        "total_steps": schedule.last_step if steps else None,
        "schedule": {
            name: {"lr": schedule.compute_learning_rate(step), "ema": schedule.compute_ema(step)}
            for name, step in milestones.items()
        },
        "device": device.type,
        "precision": precision,
        "memory": estimate_step_memory(config, networks, precision, processes),
        "free_memory": get_free_memory(device),
        "disk": {
            "checkpoints": compute_checkpoint_bytes(config, networks),
            "encoder": 4 * count_elements(networks.online["encoder"].state_dict().values()),
            "metrics": BYTES_PER_METRICS_LINE * (total // config.runtime.log_every),
        },
    }


def outline_networks(config: PretrainConfig, classes: int = 1000) -> Siamese:
    """Return the networks of ``config`` on the meta device: shapes without memory or values."""
    with torch.device("meta"):
        return build_networks(config, classes)


def compute_checkpoint_bytes(config: PretrainConfig, networks: Siamese) -> int:
    """Return the bytes of all checkpoints that a run holds on to, and of one more while it is written."""
    optimizer_states = OPTIMIZER_STATES[config.optim.name] * count_elements(networks.online.parameters())
    numbers = count_elements((*networks.parameters(), *networks.buffers())) + optimizer_states
    return 4 * numbers * (config.checkpoint.keep + 1)


def check_view_memory(config: PretrainConfig, device: torch.device, processes: int = 1) -> None:
    """Raise UsageError when the views of one batch do not fit into the device's free memory."""
    need, free = compute_view_bytes(config, processes), get_free_memory(device)
    if need > free:
        what = f"The views of one batch take {format_bytes(need)}, but only {format_bytes(free)} of memory are free."
        raise UsageError(what, "Lower optim.batch_size, or the count or size of views.large and views.small.")


def check_step_memory(
    config: PretrainConfig, classes: int, device: torch.device, precision: str, processes: int, console: Console
) -> None:
    """Raise UsageError when a whole step clearly does not fit into memory; warn when it may not."""
    memory = estimate_step_memory(config, outline_networks(config, classes), precision, processes)
    advice = "lower optim.batch_size or the views' size, set optim.microbatch, or runtime.activation_checkpointing=true"
    check_memory("A step", sum(memory.values()), device, advice, console)


def compute_view_bytes(config: PretrainConfig, processes: int = 1) -> int:
    """Return the bytes of one process's part of a batch of views: in uint8 as they are loaded, and in float32."""
    pixels = sum(view.count * view.size**2 for view in (config.views.large, config.views.small))
    return (1 + 4) * 3 * pixels * (config.optim.batch_size // processes)


def estimate_step_memory(
    config: PretrainConfig, networks: Siamese, precision: str, processes: int = 1
) -> dict[str, int]:
    """Return the bytes on one process's device at the peak of a step, part by part."""
    images = config.optim.batch_size // processes
    per_image = sum(
        view.count * count_activations(networks, view.size, config.runtime.activation_checkpointing)
        for view in (config.views.large, config.views.small)
        if view.count
    )
    return estimate_training_memory(
        networks.online.parameters(),
        optimizer_states=OPTIMIZER_STATES[config.optim.name],
        activations=min(images, config.optim.microbatch or images) * per_image,
        precision=precision,
        target=4 * count_elements(networks.target.parameters() if networks.target else ()),
        views=compute_view_bytes(config, processes),
    )


def count_activations(networks: Siamese, size: int, checkpointing: bool) -> int:
    """Return how many numbers one image of ``size`` px leaves in the online network for its backward pass.

    Assumed: every convolution, norm and linear layer stores its output. With ``checkpointing`` the encoder
    stores the outputs of its blocks, and once the inside of the largest block.
    """
    encoder = networks.online["encoder"]
    assert isinstance(encoder, ResNet)
    blocks = [b for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4) for b in stage]
    layers = list_saving_layers(networks.online)
    images = torch.empty(1, 2, 3, size, size, device=next(networks.parameters()).device)
    sizes = count_outputs((*layers, *blocks), lambda: networks([images]))
    everything = sum(sizes[layer] for layer in layers)
    if not checkpointing:
        return everything
    inner = [sum(sizes[m] for m in block.modules() if m is not block and m in sizes) for block in blocks]
    return everything - sum(inner) + sum(sizes[block] for block in blocks) + max(inner)


def _open_training_images(config: PretrainConfig, download: bool) -> tuple[ImageDataset | None, str | None]:
    """Return the images to train on, or why they are unknown: not given, or not downloaded yet."""
    specs = (*list_specs(config.data.train), *list_specs(config.data.val))
    if config.data.train is None:
        for spec in specs:
            check_data_exists(spec)
        if config.bgmask.bank is not None:
            MaskBank.open(Path(config.bgmask.bank))
        return None, "no --data is given"
    try:
        return open_pretrain_data(config, download, Console(quiet=True)).train, None
    except DataError as error:
        if download or not any(spec.startswith("torchvision:") for spec in specs):
            raise
        for spec in specs:
            check_data_exists(spec)
        return None, error.what


def _describe_estimate(config: PretrainConfig, estimate: dict[str, Any]) -> dict[str, str]:
    """Return the estimate in words, line by line."""
    views, masks = config.views, estimate["bgmask"]
    images, per_epoch, steps = (
        "unknown" if estimate[key] is None else f"{estimate[key]:,}"
        for key in ("images", "steps_per_epoch", "total_steps")
    )
    lines = {
        "parameters": ", ".join(f"{name} {size:,}" for name, size in estimate["parameters"].items()),
        "images": f"{images}: {estimate['images_unknown']}" if estimate["images_unknown"] else images,
        "crops": f"{estimate['crops_per_image']} per image and epoch: {views.large.count} of "
        f"{views.large.size} px, {views.small.count} of {views.small.size} px",
        "steps": f"{per_epoch} per epoch, {steps} in all",
    }
    if masks and masks["source"] != "none":
        lines["masks"] = (
            f"{masks['source']}; {masks['usable']:.1%} of the images have a usable one, "
            f"{masks['masked_views']:.1%} of large views lose their background"
        )
    for name, values in estimate["schedule"].items():
        lines[name] = f"learning rate {values['lr']:.4g}, ema {values['ema']:.6g}"
    lines["memory"] = (
        f"about {format_byte_sum(estimate['memory'])} per process in {estimate['precision']}, if every convolution, "
        f"norm and linear layer stores its output; {format_bytes(estimate['free_memory'])} free on {estimate['device']}"
    )
    return lines | {"disk": f"about {format_byte_sum(estimate['disk'])}"}
