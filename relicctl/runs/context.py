"""What all parts of a command share, passed as one object: device, ranks, console, run folder, precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.runs.folder import RunFolder


@dataclass(frozen=True)
class Session:
    """The device, rank and console of a command's process."""

    device: torch.device
    world: World
    console: Console

    def with_run(self, run: RunFolder, precision: str = "fp32") -> RunContext:
        """Return the context of this session in ``run``, computing in ``precision`` ("fp32" or "bf16")."""
        return RunContext(self.device, self.world, self.console, run, precision)


@dataclass(frozen=True)
class RunContext(Session):
    """A session that has its run folder; ``precision`` is that of the networks' forward pass."""

    run: RunFolder
    precision: str = "fp32"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
