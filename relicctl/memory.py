"""How much memory a step takes, and whether it is there. Views are exact; the rest is an estimate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from relicctl.config.schema import PretrainConfig
from relicctl.console import Console
from relicctl.core.hardware import get_free_memory
from relicctl.core.models.resnet import ResNet
from relicctl.core.models.siamese import Siamese
from relicctl.errors import UsageError


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


def count_elements(tensors: Iterable[Tensor]) -> int:
    """Numbers in all of them together."""
    return sum(tensor.numel() for tensor in tensors)


def format_bytes(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} GiB" if size < 1000 else f"{size:,.0f} GiB"
