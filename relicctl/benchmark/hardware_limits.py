"""What a step asks of the hardware, and what the hardware could give: operations, matrix peak, largest batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from relicctl.benchmark.train_step import LapTimer, train_one_step
from relicctl.config.pretrain import PretrainConfig
from relicctl.core.hardware import get_free_memory
from relicctl.data.views import Batch
from relicctl.pretraining.estimate import estimate_step_memory, outline_networks
from relicctl.pretraining.task import PretrainTask, Schedule

MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}  # rows and columns: large enough that arithmetic is all that counts


def count_flop_per_image(config: PretrainConfig, classes: int) -> int:
    """Return floating-point operations (a multiply-add is two) of both networks' passes for one image's views.

    Counted on the meta device, without memory or values; what is computed twice to save memory counts once.
    """
    optim = config.optim.model_copy(update={"microbatch": None})
    runtime = config.runtime.model_copy(update={"activation_checkpointing": False})
    networks = outline_networks(config.model_copy(update={"optim": optim, "runtime": runtime}), classes)
    views = _draw_views(config, 2, torch.device("meta"))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        _, outputs = networks(views)
        if networks.target is not None:
            networks.forward_target(views[0])
        outputs.sum().backward()
    flops: int = counter.get_total_flops()
    return flops // 2


def measure_matmul_peak(device: torch.device, precision: str, runs: int = 7) -> float:
    """Return floating-point operations per second of a large square matrix product, the best of ``runs``."""
    n = MATMUL_SIZE[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    factor = torch.randn(n, n, device=device).to(dtype)
    laps = LapTimer(device)
    for _ in range(runs + 1):
        factor @ factor
        laps.record_lap("product")
    return 2 * n**3 / min(laps.get_seconds()["product"][1:])


def estimate_largest_batch(config: PretrainConfig, classes: int, precision: str, device: torch.device) -> int:
    """Return the largest batch whose step fits into free memory, by the estimate of ``--dry-run``; 0 for none."""
    parts = estimate_step_memory(config, outline_networks(config, classes), precision)
    growing = parts.pop("views")
    if config.optim.microbatch is None:  # else the activations are those of a microbatch, whatever the batch
        growing += parts.pop("activations")
    return max(0, int((get_free_memory(device) - sum(parts.values())) * config.optim.batch_size / growing))


def find_largest_fit(fits: Callable[[int], bool], guess: int, step: int = 8) -> int:
    """Return the largest multiple of ``step`` for which ``fits`` holds, searched from ``guess`` on; 0 for none."""
    low, high = 0, max(1, guess // step)  # from here on low fits; after the loop, high does not
    while fits(high * step):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def try_train_step(config: PretrainConfig, classes: int, precision: str, device: torch.device) -> bool:
    """Return whether a step with the config's batch runs on a CUDA device without running out of memory."""
    batch = config.optim.batch_size
    try:
        task = PretrainTask(config, Schedule(config, 1, 1), classes=classes, device=device, precision=precision)
        views = _draw_views(config, batch, device)
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        for step in range(2):  # momentum is allocated by the first
            train_one_step(task, Batch(views, labels), step)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return False
    finally:
        task = views = None  # type: ignore[assignment]
        torch.cuda.empty_cache()
    return True


def _draw_views(config: PretrainConfig, batch: int, device: torch.device) -> list[torch.Tensor]:
    sizes = [view for view in (config.views.large, config.views.small) if view.count]
    return [torch.randn(view.count, batch, 3, view.size, view.size, device=device) for view in sizes]
