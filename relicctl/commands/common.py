"""What commands share: the device, the workers, and what a line of progress shows."""

from __future__ import annotations

import os
from typing import Any

import torch

from relicctl.config.schema import RuntimeConfig
from relicctl.errors import UsageError


def resolve_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("There is no CUDA device here.", "Use --device cpu, or check the driver and torch's build.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_num_workers(runtime: RuntimeConfig, device: torch.device, cache: str) -> int:
    """Auto: none where images are cropped on the device; else one beside a CPU's own training, all cores for CUDA."""
    if runtime.workers != "auto":
        return runtime.workers
    if device.type == "cpu":
        return 1 if cache == "none" else 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, (os.cpu_count() or 1) // processes))


def select_progress_metrics(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of a log line that fit on one line of a terminal."""
    shown: dict[str, Any] = {}
    for name in ("loss", "nll", "kl", "lr", "knn20", "probe_top1"):
        if name in figures:
            shown[name] = figures[name]
    if "images_per_s" in figures:
        minutes, seconds = divmod(round(figures["eta_s"]), 60)
        shown |= {
            "images/s": figures["images_per_s"],
            "data_wait": f"{figures['data_wait']:.1%}",
            "eta": f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}",
        }
    return shown
