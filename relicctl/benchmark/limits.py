"""What the hardware could do, and what a step asks of it."""

from __future__ import annotations

import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from relicctl.config.schema import Config
from relicctl.core.hardware import free_memory
from relicctl.memory import step_memory
from relicctl.pretraining import build_networks

MATRIX = {"cuda": 8192, "cpu": 2048}  # rows and columns: large enough that arithmetic is all that counts


def flop_per_image(config: Config, classes: int) -> int:
    """Floating-point operations (a multiply-add is two) of both networks' passes for one image's views.

    Counted on a shadow of the networks without memory or values; what is computed twice to save memory counts once.
    """
    config = config.model_copy(
        update={
            "optim": config.optim.model_copy(update={"microbatch": None}),
            "runtime": config.runtime.model_copy(update={"activation_checkpointing": False}),
        }
    )
    with torch.device("meta"):
        networks = build_networks(config, classes)
        sizes = [view for view in (config.views.large, config.views.small) if view.count]
        views = [torch.empty(view.count, 2, 3, view.size, view.size) for view in sizes]
        with FlopCounterMode(display=False) as counter:
            _, outputs = networks.online_forward(views)
            if networks.target is not None:
                networks.target_forward(views[0])
            outputs.sum().backward()
    return counter.get_total_flops() // 2


def matrix_peak(device: torch.device, precision: str, runs: int = 7) -> float:
    """Floating-point operations per second of a large square matrix product, the median of ``runs``."""
    n = MATRIX[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    factor = torch.randn(n, n, device=device).to(dtype)
    taken = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        factor @ factor
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(taken[1:])


def largest_batch(config: Config, classes: int, precision: str, device: torch.device) -> int:
    """Images whose step fits into the device's free memory, by the estimate of ``--dry-run``; 0 for none."""
    with torch.device("meta"):
        networks = build_networks(config, classes)
    parts = step_memory(config, networks, precision)
    growing = parts.pop("activations") + parts.pop("views")
    return max(0, int((free_memory(device) - sum(parts.values())) * config.optim.batch_size / growing))
