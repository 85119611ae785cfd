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
from relicctl.data.augment import IMAGENET_MEAN, IMAGENET_STD
from relicctl.encoder import build_encoder_from_tensors, load_encoder
from relicctl.errors import UsageError

NETWORKS = ("online", "target")


@dataclass(frozen=True)
class ResolvedEncoder:
    """``encoder``: as ``load_encoder`` gives it; ``run``: the folder of its run, where that is known."""

    encoder: ResNet
    path: Path
    run: Path | None

    def load_record(self) -> dict[str, Any]:
        """What the run noted at its start: version, preset, data fingerprint; {} where it is not known."""
        return _load_run_record(self.run) if self.run else {}

    def load_results(self) -> dict[str, Any]:
        """The run's results.json; {} before its end."""
        file = self.run / "results.json" if self.run else None
        return json.loads(file.read_text("utf-8")) if file and file.is_file() else {}


def read_path_from_stdin(source: str) -> str:
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


def open_deepmind_encoder(source: str) -> ResolvedEncoder:
    """The online encoder of a checkpoint that ReLICv2's or BYOL's authors published. Raises UsageError."""
    from relicctl.export.deepmind import read_deepmind

    path = Path(read_path_from_stdin(source))
    if not path.is_file():
        raise UsageError(f"{path} is no file.", "Give the .pkl file that the authors published.")
    return ResolvedEncoder(build_encoder_from_tensors(*read_deepmind(path), path), path, None)


def open_trained_encoder(source: str, *, network: str = "online", warn: Callable[[str], None]) -> ResolvedEncoder:
    """The encoder that ``source`` names, in eval mode.

    A run's online network is that of its end, or of its newest checkpoint that can be read while it has not
    ended; its target network lies in checkpoints alone. Raises UsageError for everything that gives no such encoder.
    """
    if network not in NETWORKS:
        raise UsageError(f"There is no network {network!r}.", "Give --network online or target.")
    path = Path(read_path_from_stdin(source))
    if not path.exists():
        raise UsageError(f"{path} does not exist.", "Give a run's folder, a checkpoint or a file of weights.")
    if path.is_dir():
        weights = path / "encoder.safetensors"
        if network == "online" and weights.is_file():
            return ResolvedEncoder(load_encoder(weights), path, path)
        return _open_run_encoder(path, network, warn)
    if _is_checkpoint(path):
        run = path.parent.parent
        if not (run / "config.yaml").is_file():
            raise UsageError(
                f"{path} lies in no run's folder, whose config.yaml says what network it holds.",
                "Give a checkpoint in RUN/checkpoints.",
            )
        return ResolvedEncoder(_extract_encoder(checkpoint.load_checkpoint(path)[0], run, network, path), path, run)
    parent = path.parent if (path.parent / "config.yaml").is_file() else None
    return ResolvedEncoder(load_encoder(path, network), path, parent)


def _open_run_encoder(run: Path, network: str, warn: Callable[[str], None]) -> ResolvedEncoder:
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{run} is no run's folder: it has no config.yaml.", "Give the folder of a run.")
    found = checkpoint.load_newest_valid(run / "checkpoints", warn)
    if found is None:
        raise UsageError(
            f"{run} has no checkpoint that can be read.",
            f"Let the run write one: relicctl pretrain --resume {run}.",
        )
    path, tensors, _ = found
    return ResolvedEncoder(_extract_encoder(tensors, run, network, path), path, run)


def _extract_encoder(tensors: dict[str, Tensor], run: Path, network: str, path: Path) -> ResNet:
    """The encoder in a checkpoint. Raises UsageError if there is none, or one of another architecture."""
    config, record = load_run_config(run / "config.yaml"), _load_run_record(run)
    prefix = f"state.{network}.encoder."
    encoder_tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if not encoder_tensors:
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
        "mean": str(list(IMAGENET_MEAN)),
        "std": str(list(IMAGENET_STD)),
    }
    return build_encoder_from_tensors(encoder_tensors, metadata, path)


def _load_run_record(run: Path) -> dict[str, Any]:
    config = run / "config.yaml"
    return plain_yaml.load_mapping(config).get("run", {}) if config.is_file() else {}


def _is_checkpoint(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as handle:
            return (handle.metadata() or {}).get("format") == checkpoint.FORMAT
    except (SafetensorError, OSError):
        return False  # load_encoder says what is wrong with it
