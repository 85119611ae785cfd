"""``relicctl doctor``: is this machine fit for a long run?"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from relicctl.benchmark.data_pipeline import GeneratedPhotos
from relicctl.config.resolve import ResolvedConfig
from relicctl.console import Console
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.datasets.joined import open_joined_dataset
from relicctl.data.datasets.open import open_dataset
from relicctl.doctor import environment, smoke_tests
from relicctl.doctor.environment import CheckResult, run_check
from relicctl.runs.distributed import resolve_num_workers

DEMO_DATA = "shapes:train=64"


def doctor(
    resolved: ResolvedConfig, data: tuple[str, ...] | None, *, quiet: bool, download: bool = False
) -> dict[str, Any]:
    """``checks``: name, state (ok, warn, fail), found and fix of each; ``failed`` and ``warned``: their names."""
    config, console = resolved.config, Console(quiet)
    warn = cache(console.warn)  # several checks open the same images
    on_gpu = config.runtime.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    workers = resolve_num_workers(config.runtime, device, "none")
    usable = environment.count_usable_cores()
    is_chosen = any(origin.startswith(("preset", "file", "--set")) for origin in resolved.origin.values())
    run_parent = Path("runs") if Path("runs").is_dir() else Path()

    def open_or_default(open_default: Callable[[], ImageDataset]) -> ImageDataset:
        if data is None:
            return open_default()
        return open_joined_dataset(data, split="train", download=download, decoding=config.data.decoding, warn=warn)

    checks: dict[str, Callable[[], CheckResult]] = {
        "python": environment.check_python,
        "torch": environment.check_versions,
        "cuda": lambda: environment.check_cuda(config.runtime.device),
        "nccl": environment.check_nccl,
        "bf16": lambda: environment.check_bf16(device, config.runtime.precision),
        "cores": environment.check_cores,
        "disk": lambda: environment.check_disk(run_parent.resolve(), config),
        "shared-memory": lambda: environment.check_shared_memory(config, workers),
        "memory": lambda: environment.check_preset_memory(config, device, wanted=is_chosen),
        "files": environment.check_open_files,
        "decoders": smoke_tests.check_decoders,
        "loader": lambda: smoke_tests.check_loader(open_or_default(lambda: GeneratedPhotos(64)), config, usable),
        "overfit": lambda: smoke_tests.check_overfit(open_or_default(lambda: open_dataset(DEMO_DATA)), device),
        "processes": lambda: smoke_tests.check_processes(device),
        "run-folder": lambda: smoke_tests.check_run_folder(run_parent.resolve()),
    }
    found = {name: run_check(check) for name, check in checks.items()}
    console.print_table(["check", "", "found"], [[name, f.state, f.message] for name, f in found.items()])
    for name, finding in found.items():
        if finding.fix:
            console.info(f"{name}: {finding.fix}")
    return {
        "ok": all(f.state != "fail" for f in found.values()),
        "failed": [name for name, f in found.items() if f.state == "fail"],
        "warned": [name for name, f in found.items() if f.state == "warn"],
        "checks": [{"name": name, "state": f.state, "found": f.message, "fix": f.fix} for name, f in found.items()],
    }
