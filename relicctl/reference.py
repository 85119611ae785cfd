"""Where a command's encoder comes from: a run's folder, a checkpoint, weights, or ``-``, a path on stdin."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from relicctl.config import plain_yaml
from relicctl.config.resolve import load_run_config
from relicctl.core import checkpoint
from relicctl.core.models.resnet import ResNet
from relicctl.data.augment import MEAN, STD
from relicctl.encoder import assembled, load_encoder
from relicctl.errors import UsageError

NETWORKS = ("online", "target")


@dataclass(frozen=True)
class Reference:
    """``encoder``: as ``load_encoder`` gives it; ``run``: the folder of its run, where that is known."""

    encoder: ResNet
    path: Path
    run: Path | None

    def record(self) -> dict[str, Any]:
        """What the run noted at its start: version, preset, data fingerprint; {} where it is not known."""
        return _record(self.run) if self.run else {}

    def results(self) -> dict[str, Any]:
        """The run's results.json; {} before its end."""
        file = self.run / "results.json" if self.run else None
        return json.loads(file.read_text("utf-8")) if file and file.is_file() else {}


def named(source: str) -> str:
    """``source``, or for ``-`` the last line on stdin that is not blank. UsageError if there is none."""
    if source != "-":
        return source
    fix = "Pipe a command into it that prints a path, or give the path instead of -."
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("- reads a path from stdin, but nothing is piped in.", fix)
    lines = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not lines:
        raise UsageError("- reads a path from stdin, but nothing came: the command before it may have failed.", fix)
    return lines[-1].strip()


def open_deepmind(source: str) -> Reference:
    """The online encoder of a checkpoint that ReLICv2's or BYOL's authors published. Raises UsageError."""
    from relicctl.export.deepmind import read_deepmind

    path = Path(named(source))
    if not path.is_file():
        raise UsageError(f"{path} is no file.", "Give the .pkl file that the authors published.")
    return Reference(assembled(*read_deepmind(path), path), path, None)


def open_reference(source: str, *, network: str = "online", warn: Callable[[str], None]) -> Reference:
    """The encoder that ``source`` names, in eval mode.

    A run's online network is that of its end, or of its newest checkpoint that can be read while it has not
    ended; its target network lies in checkpoints alone. Raises UsageError for everything that gives no such encoder.
    """
    if network not in NETWORKS:
        raise UsageError(f"There is no network {network!r}.", "Give --network online or target.")
    path = Path(named(source))
    if not path.exists():
        raise UsageError(f"{path} does not exist.", "Give a run's folder, a checkpoint or a file of weights.")
    if path.is_dir():
        weights = path / "encoder.safetensors"
        if network == "online" and weights.is_file():
            return Reference(load_encoder(weights), path, path)
        return _from_run(path, network, warn)
    if _is_checkpoint(path):
        run = path.parent.parent
        if not (run / "config.yaml").is_file():
            raise UsageError(
                f"{path} lies in no run's folder, whose config.yaml says what network it holds.",
                "Give a checkpoint in RUN/checkpoints.",
            )
        return Reference(_encoder(checkpoint.load(path)[0], run, network, path), path, run)
    parent = path.parent if (path.parent / "config.yaml").is_file() else None
    return Reference(load_encoder(path, network), path, parent)


def _from_run(run: Path, network: str, warn: Callable[[str], None]) -> Reference:
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{run} is no run's folder: it has no config.yaml.", "Give the folder of a run.")
    found = checkpoint.newest_valid(run / "checkpoints", warn)
    if found is None:
        raise UsageError(
            f"{run} has no checkpoint that can be read.",
            f"Let the run write one: relicctl pretrain --resume {run}.",
        )
    path, tensors, _ = found
    return Reference(_encoder(tensors, run, network, path), path, run)


def _encoder(tensors: dict[str, Tensor], run: Path, network: str, path: Path) -> ResNet:
    """The encoder in a checkpoint. Raises UsageError if there is none, or one of another architecture."""
    config, record = load_run_config(run / "config.yaml"), _record(run)
    prefix = f"state.{network}.encoder."
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if not own:
        raise UsageError(f"{path} has no {network} encoder (objective {config.objective}).", "Give --network online.")
    model = config.model
    metadata = {
        "arch": model.arch,
        "width": str(model.width),
        "stem": model.stem,
        "padding": model.padding,
        "version": str(record.get("version", "")),
        "preset": str(record.get("preset") or ""),
        "objective": config.objective,
        "network": network,
        "size": str(config.eval.size or config.views.large.size),
        "crop_ratio": str(config.eval.crop_ratio),
        "mean": str(list(MEAN)),
        "std": str(list(STD)),
    }
    return assembled(own, metadata, path)


def _record(run: Path) -> dict[str, Any]:
    config = run / "config.yaml"
    return plain_yaml.load_mapping(config).get("run", {}) if config.is_file() else {}


def _is_checkpoint(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as handle:
            return (handle.metadata() or {}).get("format") == checkpoint.FORMAT
    except (SafetensorError, OSError):
        return False  # load_encoder says what is wrong with it
