"""How much memory a step takes, and whether it is there. Views are exact; the rest is an estimate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from relicctl.config.schema import Config
from relicctl.console import Console
from relicctl.core.hardware import free_memory
from relicctl.core.models.resnet import ResNet
from relicctl.core.models.siamese import Siamese
from relicctl.errors import UsageError


def check_memory(config: Config, device: torch.device, processes: int = 1) -> None:
    """Raises UsageError when the views of one batch do not fit into the device's free memory."""
    need = view_bytes(config, processes)
    free = free_memory(device)
    if need > free:
        raise UsageError(
            f"The views of one batch take {in_units(need)}, but only {in_units(free)} of memory are free.",
            "Lower optim.batch_size, or the count or size of views.large and views.small.",
        )


def check_step_memory(
    config: Config, networks: Siamese, device: torch.device, precision: str, processes: int, console: Console
) -> None:
    """Raises UsageError when a whole step clearly does not fit; warns when the estimate says it may not."""
    need, free = sum(step_memory(config, networks, precision, processes).values()), free_memory(device)
    told = f"A step takes about {in_units(need)}, and {in_units(free)} of memory are free"
    ways = "lower optim.batch_size or the views' size, set optim.microbatch, or runtime.activation_checkpointing=true"
    if need > 1.5 * free:
        raise UsageError(f"{told}.", f"{ways.capitalize()}.")
    if need > free:
        console.warn(f"{told}; if it does not fit, {ways}")


def view_bytes(config: Config, processes: int = 1) -> int:
    """Bytes of one process's share of a batch of views: in uint8 as they come, and in float32."""
    pixels = sum(view.count * view.size**2 for view in (config.views.large, config.views.small))
    return (1 + 4) * 3 * pixels * (config.optim.batch_size // processes)


def step_memory(config: Config, networks: Siamese, precision: str, processes: int = 1) -> dict[str, int]:
    """Bytes on one process's device at the peak of a step, part by part.

    ``networks`` may live on the meta device. Activations: see ``activations``.
    """
    weights = 4 * count(networks.online.parameters())
    images = config.optim.batch_size // processes
    per_image = sum(
        view.count * activations(networks, view.size, config.runtime.activation_checkpointing)
        for view in (config.views.large, config.views.small)
        if view.count
    )
    return {
        "weights": weights,
        "gradients": weights,
        "optimiser": optimizer_states(config) * weights,
        "target": 4 * count(networks.target.parameters()) if networks.target is not None else 0,
        "activations": (2 if precision == "bf16" else 4) * min(images, config.optim.microbatch or images) * per_image,
        "views": view_bytes(config, processes),
    }


def optimizer_states(config: Config) -> int:
    """Numbers that the optimiser keeps per weight."""
    return 2 if config.optim.name == "adamw" else 1


def activations(networks: Siamese, size: int, checkpointing: bool) -> int:
    """Numbers that one image of ``size`` px leaves in the online network for its backward pass.

    Assumed: every convolution, norm and linear layer keeps its output. With ``checkpointing`` the encoder
    keeps what its blocks put out, and once the inside of the largest block.
    """
    encoder = networks.online["encoder"]
    assert isinstance(encoder, ResNet)
    blocks = [b for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4) for b in stage]
    layers = [m for m in networks.online.modules() if isinstance(m, (nn.Conv2d, nn.Linear, _BatchNorm))]
    kept: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        kept[module] = output.numel() // 2

    hooks = [module.register_forward_hook(note) for module in (*layers, *blocks)]
    device = next(networks.parameters()).device
    with torch.no_grad():
        networks.online_forward([torch.empty(1, 2, 3, size, size, device=device)])
    for hook in hooks:
        hook.remove()

    everything = sum(kept[layer] for layer in layers)
    if not checkpointing:
        return everything
    inside = [sum(kept[m] for m in block.modules() if m is not block and m in kept) for block in blocks]
    return everything - sum(inside) + sum(kept[block] for block in blocks) + max(inside)


def count(tensors: Iterable[Tensor]) -> int:
    """Numbers in all of them together."""
    return sum(tensor.numel() for tensor in tensors)


def in_units(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} GiB" if size < 1000 else f"{size:,.0f} GiB"
