"""``relicctl doctor``: is this machine fit for a long run?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from relicctl.benchmark.photos import GeneratedPhotos
from relicctl.commands.common import worker_count
from relicctl.config.resolve import Resolved
from relicctl.console import Console
from relicctl.data.sources import Source, open_source
from relicctl.doctor import machine, trials
from relicctl.doctor.check import Finding, find

SHAPES = "shapes:train=64"


def doctor(resolved: Resolved, data: str | None, *, quiet: bool, download: bool = False) -> dict[str, Any]:
    """``checks``: name, state (ok, warn, fail), found and fix of each; ``failed`` and ``warned``: their names."""
    config, console = resolved.config, Console(quiet)
    on_gpu = config.runtime.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    workers = worker_count(config.runtime, device, "none")
    usable = machine.usable_cores()
    place = Path("runs") if Path("runs").is_dir() else Path()

    def opened(otherwise: Callable[[], Source]) -> Source:
        return open_source(data, split="train", download=download) if data is not None else otherwise()

    checks: dict[str, Callable[[], Finding]] = {
        "python": machine.python,
        "torch": machine.versions,
        "cuda": lambda: machine.cuda(config.runtime.device),
        "nccl": machine.nccl,
        "bf16": lambda: machine.bf16(device, config.runtime.precision),
        "cores": machine.cores,
        "disk": lambda: machine.disk(place.resolve(), config),
        "shared-memory": lambda: machine.shared_memory(config, workers),
        "memory": lambda: machine.memory(config, device, wanted=resolved.preset is not None),
        "files": machine.files,
        "decoders": trials.decoders,
        "loader": lambda: trials.loader(opened(lambda: GeneratedPhotos(64)), config, usable),
        "overfit": lambda: trials.overfit(opened(lambda: open_source(SHAPES)), device),
        "processes": lambda: trials.processes(device),
        "run-folder": lambda: trials.run_folder(place.resolve()),
    }
    found = {name: find(check) for name, check in checks.items()}
    console.table(["check", "", "found"], [[name, f.state, f.found] for name, f in found.items()])
    for name, finding in found.items():
        if finding.fix:
            console.note(f"{name}: {finding.fix}")
    return {
        "ok": all(f.state != "fail" for f in found.values()),
        "failed": [name for name, f in found.items() if f.state == "fail"],
        "warned": [name for name, f in found.items() if f.state == "warn"],
        "checks": [{"name": name, "state": f.state, "found": f.found, "fix": f.fix} for name, f in found.items()],
    }
