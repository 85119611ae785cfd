"""What a training will take of memory and disk, estimated from the shapes in its network alone."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from relicctl.config.resolve import ResolvedConfig, dump_yaml
from relicctl.console import Console
from relicctl.core.hardware import count_elements, format_bytes, get_free_memory
from relicctl.errors import UsageError

OPTIMIZER_STATES = {"adamw": 2, "lars": 1, "sgd": 1}  # numbers that the optimiser stores for each weight
REFUSED_RATIO = 1.5  # of needed to free memory: the estimates are not exact to less


def estimate_training_memory(
    weights: Iterable[Tensor], *, optimizer_states: int, activations: int, precision: str, **others: int
) -> dict[str, int]:
    """Return the bytes on one device at the peak of a training step, part by part.

    ``activations``: numbers stored for the backward pass (``count_outputs``); ``others``: further parts, in bytes.
    """
    weight_bytes = 4 * count_elements(weights)
    return {
        "weights": weight_bytes,
        "gradients": weight_bytes,
        "optimiser": optimizer_states * weight_bytes,
        "activations": (2 if precision == "bf16" else 4) * activations,
        **others,
    }


def list_saving_layers(network: nn.Module) -> list[nn.Module]:
    """Return the layers whose outputs are assumed to be stored for the backward pass."""
    return [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear, _BatchNorm))]


def count_outputs(modules: Iterable[nn.Module], forward: Callable[[], object]) -> dict[nn.Module, int]:
    """Return how many numbers per image each of ``modules`` puts out when ``forward`` passes two images through them.

    On the meta device that takes neither time nor memory.
    """
    sizes: dict[nn.Module, int] = {}

    def record_output(module: nn.Module, _: object, output: Tensor) -> None:
        sizes[module] = output.numel() // 2

    hooks = [module.register_forward_hook(record_output) for module in modules]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    return sizes


def check_memory(what: str, need: int, device: torch.device, advice: str, console: Console) -> None:
    """Raise UsageError when ``need`` bytes clearly exceed the free memory of ``device``; warn when they may."""
    free = get_free_memory(device)
    message = f"{what} takes about {format_bytes(need)}, and {format_bytes(free)} of memory are free"
    if need > REFUSED_RATIO * free:
        raise UsageError(f"{message}.", f"{advice[0].upper()}{advice[1:]}.")
    if need > free:
        console.warn(f"{message}; if it does not fit, {advice}")


def format_byte_sum(parts: dict[str, int]) -> str:
    """Return the total and, in brackets, its parts."""
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    return f"{format_bytes(sum(parts.values()))} ({listed})"


def format_dry_run(resolved: ResolvedConfig, estimate: dict[str, Any], lines: dict[str, str], as_json: bool) -> str:
    """Return the config and what it comes to: one JSON object, or YAML with ``lines`` as comments.

    The YAML is a file for ``--config`` again.
    """
    if as_json:
        config = resolved.config.model_dump(mode="json")
        return json.dumps({"config": config, "origin": resolved.origin, **estimate})
    width = max(map(len, lines))
    comments = [
        textwrap.fill(text, 110, initial_indent=f"# {name:<{width}}  ", subsequent_indent=f"# {'':<{width}}  ")
        for name, text in lines.items()
    ]
    return "\n".join((dump_yaml(resolved.config, resolved.origin), *comments))
