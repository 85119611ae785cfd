"""A command on the ranks that ``torchrun`` starts: the main process writes, prints and decides for all.

All ranks must see the run's folder. A process started without torchrun is the main process of one rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relicctl.config.base import RuntimeConfig
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.distributed import World, destroy_distributed, init_distributed
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImages, is_decodable
from relicctl.errors import Interrupted, RelicError, UsageError
from relicctl.runs.folder import RunFolder

LoadedCheckpoint = tuple[Path, dict[str, Tensor], dict[str, Any]]


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


class ErrorsOnlyConsole(Console):
    """The console of a process that is not the main one: errors only."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def warn(self, text: str) -> None:
        pass


@contextmanager
def open_distributed_session(runtime: RuntimeConfig, quiet: bool) -> Iterator[Session]:
    """Join the processes that torchrun started: yields this one's device, its rank among them and its console."""
    device = resolve_device(runtime.device)
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    world = init_distributed(device.type)
    try:
        if world.size > 1 and device.type == "cuda":
            device = torch.device("cuda", world.local_rank)
            torch.cuda.set_device(device)
        yield Session(device, world, Console(quiet) if world.is_main else ErrorsOnlyConsole())
    except Interrupted as stop:
        if world.is_main:
            raise
        raise SystemExit(stop.code) from None  # all stop together, and the main process reports it
    except RelicError as error:
        error.of_one_rank = True
        raise
    finally:
        destroy_distributed()


def open_or_create_run_folder(
    world: World, path: Path, *, resumed: bool, overwrite: bool = False, keep: int
) -> RunFolder:
    """Open the run folder at ``path`` on all ranks: the existing one if ``resumed``, else a new, empty one.

    The main process locks it and writes there; the others only read. Raises UsageError as ``RunFolder.reopen`` and
    ``RunFolder.create`` do.
    """

    def open_folder() -> RunFolder:
        if resumed:
            return RunFolder.reopen(path, keep=keep)
        return RunFolder.create(path, overwrite=overwrite, keep=keep)

    return world.run_on_main(open_folder) or RunFolder(path, keep=keep, writer=False)


def open_sub_run(world: World, path: Path, *, parent: Path, keep: int) -> RunFolder:
    """Open the folder of a training that is a part of the run at ``parent``, on all ranks; created if missing."""

    def open_folder() -> RunFolder:
        path.mkdir(parents=True, exist_ok=True)
        run = RunFolder(path, keep=keep, writer=True)
        run.resume_option = f"--resume {parent}"
        return run

    return world.run_on_main(open_folder) or RunFolder(path, keep=keep, writer=False)


def load_newest_checkpoint(
    run: RunFolder,
    world: World,
    warn: Callable[[str], None],
    is_compatible: Callable[[dict[str, Tensor]], bool] = lambda tensors: True,
) -> LoadedCheckpoint | None:
    """Return the newest checkpoint that the main process can read, if it is compatible; the same one on all ranks."""
    loaded = checkpoint.load_newest_valid(run.checkpoints_dir, warn) if world.is_main else None
    if loaded is not None and not is_compatible(loaded[1]):
        loaded = None
    path = world.broadcast_from_main(lambda: str(loaded[0]) if loaded else None)
    if loaded is None and path is not None:
        loaded = Path(path), *checkpoint.load_checkpoint(Path(path))
    return loaded


class SharedBadImages:
    """Shares bad images between ranks, so that ``bad`` counts those of all; the main process writes bad_images.txt."""

    def __init__(self, bad: BadImages, run: RunFolder, world: World) -> None:
        self._bad, self._run, self._world = bad, run, world
        self._new: list[tuple[str, str]] = []
        bad.report, bad.listed_in = self._record, str(run.bad_images_path)

    def load_recorded(self, source: ImageDataset) -> None:
        """Load what the run has listed before, except images that can be decoded by now."""
        self._bad.seen = set(self._world.broadcast_from_main(lambda: self._find_still_bad(source)))

    def sync(self) -> None:
        """Exchange new bad images between ranks. Raises DataError, on all of them, when there are too many."""
        if self._world.size == 1:
            return
        gathered, self._new = self._world.all_gather_object(self._new), []
        for rank, new in enumerate(gathered):
            for name, reason in new if rank != self._world.rank else []:
                self._bad.add(name, reason)
        self._new = []

    def _record(self, name: str, reason: str) -> None:
        self._new.append((name, reason))
        self._run.add_bad_image(name, reason)

    def _find_still_bad(self, source: ImageDataset) -> list[str]:
        if not (listed := self._run.read_bad_images()):
            return []
        numbered = enumerate(map(source.get_name, range(len(source))))
        repaired = {name for row, name in numbered if name in listed and is_decodable(source, row)}
        if repaired:
            self._run.remove_bad_images(repaired)
        return sorted(listed - repaired)


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("There is no CUDA device here.", "Use --device cpu, or check the driver and torch's build.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_num_workers(runtime: RuntimeConfig, device: torch.device, cache: str) -> int:
    """Return the number of data workers. Auto: on a CPU 1, or 0 for cached images; with CUDA this rank's cores."""
    if runtime.workers != "auto":
        return runtime.workers
    if device.type == "cpu":
        return 1 if cache == "none" else 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, (os.cpu_count() or 1) // processes))


def select_progress_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of a log line that fit on one line of a terminal."""
    names = ("loss", "nll", "kl", "lr", "knn20", "probe_top1")
    shown: dict[str, Any] = {name: metrics[name] for name in names if name in metrics}
    if "images_per_s" in metrics:
        minutes, seconds = divmod(round(metrics["eta_s"]), 60)
        shown |= {
            "images/s": metrics["images_per_s"],
            "data_wait": f"{metrics['data_wait']:.1%}",
            "eta": f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}",
        }
    return shown
