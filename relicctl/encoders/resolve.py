"""Where a command's encoder comes from: a run's folder, a checkpoint, weights, or ``-``, a path on stdin."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from relicctl.config import yaml_io
from relicctl.config.base import EncoderConfig
from relicctl.config.resolve import load_run_config
from relicctl.core import checkpoint
from relicctl.core.counter_rng import Stream, derive_seed, fork_seeded_rng
from relicctl.encoders.deepmind import read_deepmind
from relicctl.encoders.file import build_encoder_from_tensors, describe_network, describe_transform, load_encoder
from relicctl.errors import DataError, UsageError
from relicctl.models.resnet import ResNet, build_encoder
from relicctl.runs.status import read_status

NETWORKS = ("online", "target")
BASELINES = ("random", "pixels", "torchvision")
MAX_PIXEL_SIDE = 32  # most pixels of a side whose values are features


@dataclass(frozen=True)
class ResolvedEncoder:
    """An encoder as ``load_encoder`` returns it, and the folder of its run, where that is known."""

    encoder: ResNet
    path: Path
    run: Path | None

    def load_record(self) -> dict[str, Any]:
        """Load what the run recorded at its start: version, preset, data fingerprint; {} where it is not known."""
        return _load_run_record(self.run) if self.run else {}

    def load_results(self) -> dict[str, Any]:
        """Load the run's results.json; {} before its end."""
        file = self.run / "results.json" if self.run else None
        return json.loads(file.read_text("utf-8")) if file and file.is_file() else {}


class BaselineSpec(NamedTuple):
    """How ``random`` and ``pixels`` are built and fed, where no run says it."""

    model: EncoderConfig
    seed: int
    size: int | None
    crop_ratio: float = 0.875


def read_path_from_stdin(source: str) -> str:
    """Return ``source``, or for ``-`` the last line on stdin that is not blank. UsageError if there is none."""
    if source != "-":
        return source
    fix = "Pipe a command into it that prints a path, or give the path instead of -."
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("- reads a path from stdin, but nothing is piped in.", fix)
    lines = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not lines:
        raise UsageError("- reads a path from stdin, but got none: the command before it may have failed.", fix)
    return lines[-1].strip()


def open_deepmind_encoder(source: str) -> ResolvedEncoder:
    """Open the online encoder of a checkpoint that ReLICv2's or BYOL's authors published. Raises UsageError."""
    path = Path(read_path_from_stdin(source))
    if not path.is_file():
        raise UsageError(f"{path} is no file.", "Give the .pkl file that the authors published.")
    return ResolvedEncoder(build_encoder_from_tensors(*read_deepmind(path), path), path, None)


def open_trained_encoder(source: str, *, network: str = "online", warn: Callable[[str], None]) -> ResolvedEncoder:
    """Open the encoder that ``source`` names, in eval mode. Raises UsageError.

    A run's online network is that of its end, before that of its newest valid checkpoint; its target network is in
    checkpoints alone.
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
            what = f"{path} lies in no run's folder, whose config.yaml says what network it holds."
            raise UsageError(what, "Give a checkpoint in RUN/checkpoints.")
        return ResolvedEncoder(_extract_encoder(checkpoint.load_checkpoint(path)[0], run, network, path), path, run)
    parent = path.parent if (path.parent / "config.yaml").is_file() else None
    return ResolvedEncoder(load_encoder(path, network, warn), path, parent)


def _open_run_encoder(run: Path, network: str, warn: Callable[[str], None]) -> ResolvedEncoder:
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{run} is no run's folder: it has no config.yaml.", "Give the folder of a run.")
    loaded = checkpoint.load_newest_valid(run / "checkpoints", warn)
    if loaded is None:
        what = f"{run} has no checkpoint that can be read."
        raise UsageError(what, f"Let the run write one: relicctl pretrain --resume {run}.")
    path, tensors, header = loaded
    if not (run / "encoder.safetensors").is_file():
        total = read_status(run).get("total")
        warn(f"{run} is not finished: {path} is used, step {header['step']}{f' of {total}' if total else ''}")
    return ResolvedEncoder(_extract_encoder(tensors, run, network, path), path, run)


def _extract_encoder(tensors: dict[str, Tensor], run: Path, network: str, path: Path) -> ResNet:
    """Build the encoder in a checkpoint. Raises UsageError if there is none, or one of another architecture."""
    config, record = load_run_config(run / "config.yaml"), _load_run_record(run)
    prefix = f"state.{network}.encoder."
    encoder_tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if not encoder_tensors:
        raise UsageError(f"{path} has no {network} encoder (objective {config.objective}).", "Give --network online.")
    origin = {"version": str(record.get("version", "")), "preset": str(record.get("preset") or "")}
    metadata = {**describe_network(config.model), **origin, "objective": config.objective, "network": network}
    metadata |= describe_transform(
        config.eval.size or config.views.large.size, config.eval.crop_pct, config.data.decoding.white_point
    )
    return build_encoder_from_tensors(encoder_tensors, metadata, path)


def _load_run_record(run: Path) -> dict[str, Any]:
    config = run / "config.yaml"
    return yaml_io.load_mapping(config).get("run", {}) if config.is_file() else {}


def _is_checkpoint(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as handle:
            return (handle.metadata() or {}).get("format") == checkpoint.FORMAT
    except (SafetensorError, OSError):
        return False  # load_encoder says what is wrong with it


class Pixels(nn.Module):
    """The image itself as its features: ``[N, 3, s, s]`` -> ``[N, 3 s s]``, averaged down to 32 px."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._side = min(size, MAX_PIXEL_SIDE)
        self.feature_dim = 3 * self._side**2

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, self._side).flatten(1)


def open_encoder(source: str, network: str, baseline: BaselineSpec, warn: Callable[[str], None]) -> ResolvedEncoder:
    """Open what ``open_trained_encoder`` opens; and ``random``, ``pixels``, ``torchvision:NAME``.

    ``random:RUN`` is RUN's network before its first step, ``pixels:RUN`` takes images of RUN's size.
    """
    kind, _, rest = source.partition(":")
    if kind not in BASELINES or Path(source).exists():
        return open_trained_encoder(source, network=network, warn=warn)
    if kind == "torchvision":
        return ResolvedEncoder(load_encoder(find_cached_weights(rest)), Path(source), None)
    model, seed, size, crop_ratio = baseline
    run = Path(rest) if rest else None
    if run is not None:
        config = load_run_config(run / "config.yaml")
        model, seed = config.model, config.seed
        size, crop_ratio = config.eval.size or config.views.large.size, config.eval.crop_pct
    if kind == "pixels":
        return _make_baseline(Pixels(size or MAX_PIXEL_SIDE), source, run, size or MAX_PIXEL_SIDE, crop_ratio)
    with fork_seeded_rng(derive_seed(seed, Stream.INIT)):
        encoder = build_encoder(model.arch, model.width, model.stem, model.padding)
    return _make_baseline(encoder, source, run, size or 224, crop_ratio)


def find_cached_weights(name: str) -> Path:
    """Return the file that torchvision downloaded for its ResNet ``name``. Nothing is downloaded."""
    try:
        entries = list(torchvision.models.get_model_weights(name))
    except ValueError:
        entries = []
    if not entries or not name.startswith("resnet"):
        raise UsageError(f"torchvision has no ResNet {name!r}.", "Give torchvision:resnet50, or 18, 34, 101 or 152.")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for entry in entries:  # the first are those that papers compare with
        file = folder / str(entry.url).rpartition("/")[2]
        if file.is_file():
            return file
    what = f"torchvision's weights of {name} are not in its cache {folder}."
    raise DataError(what, f"Fetch {entries[0].url} into it, or give the path of such a file.")


def _make_baseline(encoder: nn.Module, source: str, run: Path | None, size: int, crop_ratio: float) -> ResolvedEncoder:
    transform = describe_transform(size, crop_ratio)
    vars(encoder)["metadata"] = {"arch": getattr(encoder, "arch", "pixels"), "network": "none", **transform}
    return ResolvedEncoder(cast(ResNet, encoder.eval()), Path(source), run)


def open_encoders(
    sources: Sequence[str], network: str, baseline: BaselineSpec, warn: Callable[[str], None]
) -> list[ResolvedEncoder]:
    """Open all encoders. ``random`` is the untrained network of the first one that has a run; ``pixels`` has its size.

    Where none has a run, both are built like the first encoder, whose file says what it is.
    """
    references: list[ResolvedEncoder] = []
    for source in sources:
        run = next((reference.run for reference in references if reference.run), None)
        spec = f"{source}:{run}" if run and source in ("random", "pixels") else source
        references.append(open_encoder(spec, network, baseline, warn))
        if len(references) == 1:
            baseline = _match_encoder(baseline, references[0].encoder)
    return references


def _match_encoder(baseline: BaselineSpec, encoder: ResNet) -> BaselineSpec:
    """Return ``baseline`` with the size of the encoder's images, and with its architecture unless it is ``pixels``."""
    metadata, model = vars(encoder)["metadata"], baseline.model
    if isinstance(encoder, ResNet):
        model = model.model_copy(update={name: getattr(encoder, name) for name in EncoderConfig.model_fields})
    return BaselineSpec(model, baseline.seed, baseline.size or int(metadata["size"]), float(metadata["crop_ratio"]))
