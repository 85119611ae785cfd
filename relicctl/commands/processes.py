"""A command as one of several processes under ``torchrun``: the main one writes and speaks, and says what all go by.

All of them must see the folder of results; alone, a process is the main one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from relicctl.commands.common import resolve_device
from relicctl.config.schema import RuntimeConfig
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.distributed import World, destroy_distributed, init_distributed
from relicctl.errors import Interrupted
from relicctl.runs import RunFolder

LoadedCheckpoint = tuple[Path, dict[str, Tensor], dict]


class ErrorsOnlyConsole(Console):
    """What is said by a process that is not the main one: errors only."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def warn(self, text: str) -> None:
        pass


@contextmanager
def open_distributed_session(runtime: RuntimeConfig, quiet: bool) -> Iterator[tuple[World, torch.device, Console]]:
    """Among the processes that torchrun started: this one's place, its device, and how it speaks."""
    device = resolve_device(runtime.device)
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    world = init_distributed(device.type)
    try:
        if world.size > 1 and device.type == "cuda":
            device = torch.device("cuda", world.local_rank)
            torch.cuda.set_device(device)
        yield world, device, Console(quiet) if world.is_main else ErrorsOnlyConsole()
    except Interrupted as stop:
        if world.is_main:
            raise
        raise SystemExit(stop.code) from None  # all stop together, and one says so
    finally:
        destroy_distributed()


def open_on_main(world: World, open_folder: Callable[[], RunFolder], path: Path, keep: int) -> RunFolder:
    """The folder at ``path``, opened and locked by the main process; the others only read there."""
    return world.run_on_main(open_folder) or RunFolder(path, keep=keep, writer=False)


def load_newest_checkpoint(
    run: RunFolder,
    world: World,
    warn: Callable[[str], None],
    is_compatible: Callable[[dict[str, Tensor]], bool] = lambda tensors: True,
) -> LoadedCheckpoint | None:
    """The newest that the main process can read, if its tensors fit; all go on from the same one."""
    loaded = checkpoint.load_newest_valid(run.checkpoints_dir, warn) if world.is_main else None
    if loaded is not None and not is_compatible(loaded[1]):
        loaded = None
    path = world.broadcast_from_main(lambda: str(loaded[0]) if loaded else None)
    if loaded is None and path is not None:
        loaded = Path(path), *checkpoint.load_checkpoint(Path(path))
    return loaded
