"""A command as one of several processes under ``torchrun``: the main one writes and speaks, and says what all go by.

All of them must see the folder of results; alone, a process is the main one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from relicctl.commands.common import pick_device
from relicctl.config.schema import Machine
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.distributed import World, join, leave
from relicctl.errors import Interrupted
from relicctl.runs import RunFolder

Found = tuple[Path, dict[str, Tensor], dict]


class Mute(Console):
    """What is said by a process that is not the main one: errors only."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def warn(self, text: str) -> None:
        pass


@contextmanager
def joined(runtime: Machine, quiet: bool) -> Iterator[tuple[World, torch.device, Console]]:
    """Among the processes that torchrun started: this one's place, its device, and how it speaks."""
    device = pick_device(runtime.device)
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    world = join(device.type)
    try:
        if world.size > 1 and device.type == "cuda":
            device = torch.device("cuda", world.local_rank)
            torch.cuda.set_device(device)
        yield world, device, Console(quiet) if world.is_main else Mute()
    except Interrupted as stop:
        if world.is_main:
            raise
        raise SystemExit(stop.code) from None  # all stop together, and one says so
    finally:
        leave()


def owned(world: World, open_it: Callable[[], RunFolder], path: Path, keep: int) -> RunFolder:
    """The folder at ``path``, opened and locked by the main process; the others only read there."""
    return world.only(open_it) or RunFolder(path, keep=keep, writer=False)


def newest_checkpoint(
    run: RunFolder,
    world: World,
    warn: Callable[[str], None],
    fits: Callable[[dict[str, Tensor]], bool] = lambda tensors: True,
) -> Found | None:
    """The newest that the main process can read, if its tensors fit; all go on from the same one."""
    found = checkpoint.newest_valid(run.checkpoints, warn) if world.is_main else None
    if found is not None and not fits(found[1]):
        found = None
    path = world.lead(lambda: str(found[0]) if found else None)
    if found is None and path is not None:
        found = Path(path), *checkpoint.load(Path(path))
    return found
