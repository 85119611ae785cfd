"""``--dry-run``: what a config comes to, before anything is started. Memory and disk are estimates."""

from __future__ import annotations

import json
import os
import textwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from relicctl.config.pretrain import PretrainConfig
from relicctl.config.resolve import ResolvedConfig, dump_yaml
from relicctl.console import Console
from relicctl.core.hardware import count_elements, format_bytes, get_free_memory
from relicctl.core.optim import compute_ema_gamma, compute_learning_rate
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.sampler import Sampler
from relicctl.errors import DataError, UsageError
from relicctl.models.resnet import ResNet
from relicctl.models.siamese import Siamese
from relicctl.pretraining.data import open_masking, open_pretrain_data, resolve_bank_path
from relicctl.pretraining.task import build_networks, resolve_precision
from relicctl.runs.distributed import resolve_device
from relicctl.runs.resume import PretrainOptions, find_run_to_resume, resume_config

BYTES_PER_METRICS_LINE = 400
ASSUMED_STEPS_PER_EPOCH = 1000  # while the size of the data is unknown


def format_pretrain_dry_run(resolved: ResolvedConfig, options: PretrainOptions) -> str:
    """The resolved config and its figures: YAML with comments, or with ``options.json`` one JSON object."""
    if options.resume is not None and (run := find_run_to_resume(options, resolved.preset)) is not None:
        resolved = resume_config(resolved, run)
    resolved = resolve_bank_path(resolved)
    estimate = estimate_pretrain(resolved.config, download=options.download)
    if options.json:
        config = resolved.config.model_dump(mode="json")
        return json.dumps({"config": config, "origin": resolved.origin, **estimate})
    return f"{dump_yaml(resolved.config, resolved.origin)}\n{_format_estimate(resolved.config, estimate)}"


def estimate_pretrain(config: PretrainConfig, *, download: bool = False) -> dict[str, Any]:
    """The figures of a run as plain data: bytes, steps and images, None for what only the data could tell.

    Raises UsageError when a batch exceeds the data or the memory, DataError for masks that cannot be used.
    """
    device, processes = resolve_device(config.runtime.device), int(os.environ.get("WORLD_SIZE", "1"))
    check_view_memory(config, device, processes)
    train, unknown = _open_training_images(config, download)
    images = len(train) if train is not None else None
    masks = open_masking(config, train, Console(quiet=True))[1] if train is not None else None
    steps = Sampler(config.seed, images, config.optim.batch_size).steps_per_epoch if images else None
    scheduled = steps * config.optim.epochs if steps else None
    with torch.device("meta"):
        networks = build_networks(config, classes=1000)
    precision = resolve_precision(config, device)
    return {
        "parameters": {
            "encoder": count_elements(networks.online["encoder"].parameters()),
            "online": count_elements(networks.online.parameters()),
            "target": count_elements(networks.target.parameters()) if networks.target is not None else 0,
        },
        "images": images,
        "images_unknown": unknown,
        "bgmask": masks,
        "crops_per_image": config.views.large.count + config.views.small.count,
        "steps_per_epoch": steps,
        "total_steps": min(scheduled, config.optim.max_steps or scheduled) if scheduled else None,
        "schedule": _compute_schedule(config, steps or ASSUMED_STEPS_PER_EPOCH),
        "device": device.type,
        "precision": precision,
        "memory": estimate_step_memory(config, networks, precision, processes),
        "free_memory": get_free_memory(device),
        "disk": _estimate_disk(config, networks, scheduled or config.optim.epochs * ASSUMED_STEPS_PER_EPOCH),
    }


def _open_training_images(config: PretrainConfig, download: bool) -> tuple[ImageDataset | None, str | None]:
    """The images that are trained on, or why they are unknown."""
    if config.data.train is None:
        return None, "no --data is given"
    try:
        return open_pretrain_data(config, download, Console(quiet=True)).train, None
    except DataError as error:
        return None, error.what


def _compute_schedule(config: PretrainConfig, steps_per_epoch: int) -> dict[str, dict[str, float]]:
    """Learning rate and target decay where they turn."""
    optim, total = config.optim, config.optim.epochs * steps_per_epoch
    peak, warmup = optim.base_lr * optim.batch_size / 256, round(optim.warmup_epochs * steps_per_epoch)
    moments = {"start": 0, "warmed up": warmup, "middle": total // 2, "end": total}
    return {
        moment: {
            "lr": compute_learning_rate(step, peak=peak, warmup_steps=warmup, total_steps=total),
            "ema": compute_ema_gamma(step, gamma0=config.target.ema, total_steps=total),
        }
        for moment, step in moments.items()
    }


def _estimate_disk(config: PretrainConfig, networks: Siamese, steps: int) -> dict[str, int]:
    """Bytes in the run's folder: all checkpoints kept, and one more while it is written."""
    trained = count_elements(networks.online.parameters())
    target = count_elements(networks.target.parameters()) if networks.target is not None else 0
    checkpoint = 4 * (trained * (1 + count_optimizer_states(config)) + target + count_elements(networks.buffers()))
    return {
        "checkpoints": checkpoint * (config.checkpoint.keep + 1),
        "encoder": 4 * count_elements(networks.online["encoder"].state_dict().values()),
        "metrics": BYTES_PER_METRICS_LINE * (steps // config.runtime.log_every),
    }


def _format_estimate(config: PretrainConfig, estimate: dict[str, Any]) -> str:
    """The figures as comments, so that the whole output is a file for ``--config``."""
    parameters, views = estimate["parameters"], config.views
    lines = {
        "parameters": ", ".join(f"{name} {size:,}" for name, size in parameters.items()),
        "images": _format_known(estimate["images"], estimate["images_unknown"]),
        "crops": f"{estimate['crops_per_image']} per image and epoch: {views.large.count} of "
        f"{views.large.size} px, {views.small.count} of {views.small.size} px",
        "steps": f"{_format_known(estimate['steps_per_epoch'])} per epoch, "
        "{_format_known(estimate['total_steps'])} in all",
    }
    if masks := estimate["bgmask"]:
        lines["masks"] = (
            f"{masks['source']}; {masks['usable']:.1%} of the images have a usable one, "
            f"{masks['masked_views']:.1%} of large views lose their background"
        )
    for moment, figures in estimate["schedule"].items():
        lines[moment] = f"learning rate {figures['lr']:.4g}, ema {figures['ema']:.6g}"
    lines["memory"] = (
        f"about {_format_byte_parts(estimate['memory'])} per process in {estimate['precision']}, if every "
        f"convolution, norm "
        f"and linear layer keeps its output; {format_bytes(estimate['free_memory'])} free on {estimate['device']}"
    )
    lines["disk"] = f"about {_format_byte_parts(estimate['disk'])}"
    return "\n".join(
        textwrap.fill(text, 110, initial_indent=f"# {name:<10}  ", subsequent_indent="#" + " " * 13)
        for name, text in lines.items()
    )


def _format_byte_parts(parts: dict[str, int]) -> str:
    parts_text = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    return f"{format_bytes(sum(parts.values()))} ({parts_text})"


def _format_known(number: int | None, reason: str | None = None) -> str:
    if number is not None:
        return f"{number:,}"
    return f"unknown: {reason}" if reason else "unknown"


def check_view_memory(config: PretrainConfig, device: torch.device, processes: int = 1) -> None:
    """Raises UsageError when the views of one batch do not fit into the device's free memory."""
    need = compute_view_bytes(config, processes)
    free = get_free_memory(device)
    if need > free:
        raise UsageError(
            f"The views of one batch take {format_bytes(need)}, but only {format_bytes(free)} of memory are free.",
            "Lower optim.batch_size, or the count or size of views.large and views.small.",
        )


def check_step_memory(
    config: PretrainConfig, networks: Siamese, device: torch.device, precision: str, processes: int, console: Console
) -> None:
    """Raises UsageError when a whole step clearly does not fit; warns when the estimate says it may not."""
    need, free = sum(estimate_step_memory(config, networks, precision, processes).values()), get_free_memory(device)
    summary = f"A step takes about {format_bytes(need)}, and {format_bytes(free)} of memory are free"
    remedies = (
        "lower optim.batch_size or the views' size, set optim.microbatch, or runtime.activation_checkpointing=true"
    )
    if need > 1.5 * free:
        raise UsageError(f"{summary}.", f"{remedies.capitalize()}.")
    if need > free:
        console.warn(f"{summary}; if it does not fit, {remedies}")


def compute_view_bytes(config: PretrainConfig, processes: int = 1) -> int:
    """Bytes of one process's share of a batch of views: in uint8 as they come, and in float32."""
    pixels = sum(view.count * view.size**2 for view in (config.views.large, config.views.small))
    return (1 + 4) * 3 * pixels * (config.optim.batch_size // processes)


def estimate_step_memory(
    config: PretrainConfig, networks: Siamese, precision: str, processes: int = 1
) -> dict[str, int]:
    """Bytes on one process's device at the peak of a step, part by part.

    ``networks`` may live on the meta device. Activations: see ``activations``.
    """
    weights = 4 * count_elements(networks.online.parameters())
    images = config.optim.batch_size // processes
    per_image = sum(
        view.count * count_activations(networks, view.size, config.runtime.activation_checkpointing)
        for view in (config.views.large, config.views.small)
        if view.count
    )
    return {
        "weights": weights,
        "gradients": weights,
        "optimiser": count_optimizer_states(config) * weights,
        "target": 4 * count_elements(networks.target.parameters()) if networks.target is not None else 0,
        "activations": (2 if precision == "bf16" else 4) * min(images, config.optim.microbatch or images) * per_image,
        "views": compute_view_bytes(config, processes),
    }


def count_optimizer_states(config: PretrainConfig) -> int:
    """Numbers that the optimiser keeps per weight."""
    return 2 if config.optim.name == "adamw" else 1


def count_activations(networks: Siamese, size: int, checkpointing: bool) -> int:
    """Numbers that one image of ``size`` px leaves in the online network for its backward pass.

    Assumed: every convolution, norm and linear layer keeps its output. With ``checkpointing`` the encoder
    keeps what its blocks put out, and once the inside of the largest block.
    """
    encoder = networks.online["encoder"]
    assert isinstance(encoder, ResNet)
    blocks = [b for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4) for b in stage]
    layers = [m for m in networks.online.modules() if isinstance(m, (nn.Conv2d, nn.Linear, _BatchNorm))]
    sizes: dict[nn.Module, int] = {}

    def record_output(module: nn.Module, _: object, output: Tensor) -> None:
        sizes[module] = output.numel() // 2

    hooks = [module.register_forward_hook(record_output) for module in (*layers, *blocks)]
    device = next(networks.parameters()).device
    with torch.no_grad():
        networks.forward_online([torch.empty(1, 2, 3, size, size, device=device)])
    for hook in hooks:
        hook.remove()

    everything = sum(sizes[layer] for layer in layers)
    if not checkpointing:
        return everything
    inner = [sum(sizes[m] for m in block.modules() if m is not block and m in sizes) for block in blocks]
    return everything - sum(inner) + sum(sizes[block] for block in blocks) + max(inner)
