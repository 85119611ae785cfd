"""``--dry-run``: what a config comes to, before anything is started. Memory and disk are estimates."""

from __future__ import annotations

import json
import os
import textwrap
from typing import Any

import torch

from relicctl.commands.common import pick_device
from relicctl.commands.data import open_data
from relicctl.commands.masking import open_masking, with_bank_named
from relicctl.commands.options import PretrainOptions
from relicctl.commands.resuming import continued, run_to_resume
from relicctl.config.resolve import Resolved, dump_yaml
from relicctl.config.schema import Config
from relicctl.console import Console
from relicctl.core.hardware import free_memory
from relicctl.core.models.siamese import Siamese
from relicctl.core.schedules import ema_gamma, learning_rate
from relicctl.data.sampler import Sampler
from relicctl.data.sources import Source
from relicctl.errors import DataError
from relicctl.memory import check_memory, count, in_units, optimizer_states, step_memory
from relicctl.pretraining import build_networks, settle_precision

BYTES_PER_METRICS_LINE = 400
ASSUMED_STEPS_PER_EPOCH = 1000  # while the size of the data is unknown


def dry_run(resolved: Resolved, options: PretrainOptions) -> str:
    """The resolved config and its figures: YAML with comments, or with ``options.json`` one JSON object."""
    if options.resume is not None and (run := run_to_resume(options, resolved.preset)) is not None:
        resolved = continued(resolved, run)
    resolved = with_bank_named(resolved)
    planned = plan(resolved.config, download=options.download)
    if options.json:
        config = resolved.config.model_dump(mode="json")
        return json.dumps({"config": config, "origin": resolved.origin, **planned})
    return f"{dump_yaml(resolved.config, resolved.origin)}\n{_in_words(resolved.config, planned)}"


def plan(config: Config, *, download: bool = False) -> dict[str, Any]:
    """The figures of a run as plain data: bytes, steps and images, None for what only the data could tell.

    Raises UsageError when a batch exceeds the data or the memory, DataError for masks that cannot be used.
    """
    device, processes = pick_device(config.runtime.device), int(os.environ.get("WORLD_SIZE", "1"))
    check_memory(config, device, processes)
    train, unknown = _training_images(config, download)
    images = len(train) if train is not None else None
    masks = open_masking(config, train, Console(quiet=True))[1] if train is not None else None
    steps = Sampler(config.seed, images, config.optim.batch_size).steps_per_epoch if images else None
    scheduled = steps * config.optim.epochs if steps else None
    with torch.device("meta"):
        networks = build_networks(config, classes=1000)
    precision = settle_precision(config, device)
    return {
        "parameters": {
            "encoder": count(networks.online["encoder"].parameters()),
            "online": count(networks.online.parameters()),
            "target": count(networks.target.parameters()) if networks.target is not None else 0,
        },
        "images": images,
        "images_unknown": unknown,
        "bgmask": masks,
        "crops_per_image": config.views.large.count + config.views.small.count,
        "steps_per_epoch": steps,
        "total_steps": min(scheduled, config.optim.max_steps or scheduled) if scheduled else None,
        "schedule": _schedule(config, steps or ASSUMED_STEPS_PER_EPOCH),
        "device": device.type,
        "precision": precision,
        "memory": step_memory(config, networks, precision, processes),
        "free_memory": free_memory(device),
        "disk": _disk(config, networks, scheduled or config.optim.epochs * ASSUMED_STEPS_PER_EPOCH),
    }


def _training_images(config: Config, download: bool) -> tuple[Source | None, str | None]:
    """The images that are trained on, or why they are unknown."""
    if config.data.train is None:
        return None, "no --data is given"
    try:
        return open_data(config, download, Console(quiet=True)).train, None
    except DataError as error:
        return None, error.what


def _schedule(config: Config, steps_per_epoch: int) -> dict[str, dict[str, float]]:
    """Learning rate and target decay where they turn."""
    optim, total = config.optim, config.optim.epochs * steps_per_epoch
    peak, warmup = optim.base_lr * optim.batch_size / 256, round(optim.warmup_epochs * steps_per_epoch)
    moments = {"start": 0, "warmed up": warmup, "middle": total // 2, "end": total}
    return {
        moment: {
            "lr": learning_rate(step, peak=peak, warmup_steps=warmup, total_steps=total),
            "ema": ema_gamma(step, gamma0=config.target.ema, total_steps=total),
        }
        for moment, step in moments.items()
    }


def _disk(config: Config, networks: Siamese, steps: int) -> dict[str, int]:
    """Bytes in the run's folder: all checkpoints kept, and one more while it is written."""
    trained = count(networks.online.parameters())
    target = count(networks.target.parameters()) if networks.target is not None else 0
    checkpoint = 4 * (trained * (1 + optimizer_states(config)) + target + count(networks.buffers()))
    return {
        "checkpoints": checkpoint * (config.checkpoint.keep + 1),
        "encoder": 4 * count(networks.online["encoder"].state_dict().values()),
        "metrics": BYTES_PER_METRICS_LINE * (steps // config.runtime.log_every),
    }


def _in_words(config: Config, planned: dict[str, Any]) -> str:
    """The figures as comments, so that the whole output is a file for ``--config``."""
    parameters, views = planned["parameters"], config.views
    lines = {
        "parameters": ", ".join(f"{name} {size:,}" for name, size in parameters.items()),
        "images": _known(planned["images"], planned["images_unknown"]),
        "crops": f"{planned['crops_per_image']} per image and epoch: {views.large.count} of "
        f"{views.large.size} px, {views.small.count} of {views.small.size} px",
        "steps": f"{_known(planned['steps_per_epoch'])} per epoch, {_known(planned['total_steps'])} in all",
    }
    if masks := planned["bgmask"]:
        lines["masks"] = (
            f"{masks['source']}; {masks['usable']:.1%} of the images have a usable one, "
            f"{masks['masked_views']:.1%} of large views lose their background"
        )
    for moment, figures in planned["schedule"].items():
        lines[moment] = f"learning rate {figures['lr']:.4g}, ema {figures['ema']:.6g}"
    lines["memory"] = (
        f"about {_sum(planned['memory'])} per process in {planned['precision']}, if every convolution, norm "
        f"and linear layer keeps its output; {in_units(planned['free_memory'])} free on {planned['device']}"
    )
    lines["disk"] = f"about {_sum(planned['disk'])}"
    return "\n".join(
        textwrap.fill(text, 110, initial_indent=f"# {name:<10}  ", subsequent_indent="#" + " " * 13)
        for name, text in lines.items()
    )


def _sum(parts: dict[str, int]) -> str:
    named = ", ".join(f"{name} {in_units(size)}" for name, size in parts.items())
    return f"{in_units(sum(parts.values()))} ({named})"


def _known(number: int | None, reason: str | None = None) -> str:
    if number is not None:
        return f"{number:,}"
    return f"unknown: {reason}" if reason else "unknown"
