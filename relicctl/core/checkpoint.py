"""Checkpoints: one safetensors file each, tensors and a JSON header, written atomically, verified on reading.

A checkpoint is either whole or absent: it is written under a temporary name, flushed to the disk, renamed,
and the folder flushed too. A checksum over all tensors detects a flipped bit; no pickle is involved anywhere.
"""

from __future__ import annotations

import errno
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from relicctl.core.atomic_io import write_atomically
from relicctl.core.tensor_file import save_tensors
from relicctl.errors import RunFailed, UsageError

FORMAT = "relicctl-checkpoint"
FORMAT_VERSION = 1
DISK_ERRNOS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM)  # the disk failed; the file may be sound


class BrokenCheckpoint(UsageError):
    """The file is truncated, damaged, foreign, or of a newer format."""


def save_checkpoint(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    """Write ``tensors`` and the JSON-able ``header`` to ``path`` atomically."""
    on_host = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    text = json.dumps(header)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "checksum": str(_compute_checksum(on_host)),
        "header": text,
        "header_checksum": str(zlib.crc32(text.encode())),
    }
    write_atomically(path, lambda temporary: save_tensors(temporary, on_host, metadata))


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors (on the CPU) and the header of a checkpoint.

    Raises BrokenCheckpoint if the file is foreign, of a newer format, truncated or damaged.
    """
    fix = "Use another checkpoint, or start a new run."
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise BrokenCheckpoint(f"{path} is not a checkpoint of relicctl.", fix)
            if int(metadata["format_version"]) > FORMAT_VERSION:
                raise BrokenCheckpoint(
                    f"{path} was written by a newer relicctl (format {metadata['format_version']}).",
                    "Update relicctl to read it.",
                )
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        text = metadata["header"]
        checksums = metadata["checksum"], metadata.get("header_checksum")  # the earliest files lack the second
        header = json.loads(text)
    except FileNotFoundError:
        raise BrokenCheckpoint(f"There is no checkpoint {path}.", fix) from None
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as reason:
        if isinstance(reason, OSError) and reason.errno in DISK_ERRNOS:  # no reason to fall back to an older one
            raise RunFailed(f"{path} cannot be read ({reason.strerror}).", "Check the disk and try again.") from None
        raise BrokenCheckpoint(f"{path} is truncated or no safetensors file ({reason}).", fix) from None
    computed = str(_compute_checksum(tensors)), str(zlib.crc32(text.encode())) if checksums[1] is not None else None
    if computed != checksums or not isinstance(header, dict):
        raise BrokenCheckpoint(f"{path} is damaged: its checksum does not match.", fix)
    return tensors, header


def load_newest_valid(
    folder: Path, warn: Callable[[str], None]
) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]] | None:
    """Load the newest checkpoint in ``folder`` that can be read; warn of every newer one that cannot."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, *load_checkpoint(path)
        except BrokenCheckpoint as broken:
            warn(f"{broken.what} Trying the previous one.")
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def format_checkpoint_name(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def parse_step(path: Path) -> int:
    """Return the step in a checkpoint's name; 0 for a name given by hand."""
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else 0


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and temporary files of killed processes."""
    for path in list_checkpoints(folder)[:-keep]:
        path.unlink()
    for path in (*folder.glob(".step-*.tmp"), *folder.glob(".tmp*")):  # ours and those of safetensors
        path.unlink()


def _compute_checksum(tensors: dict[str, torch.Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def flatten_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimiser's state under flat names: ``<parameter number>.<key>``."""
    states = optimizer.state_dict()["state"].items()
    entries = {f"{index}.{key}": value for index, state in states for key, value in state.items()}
    return {name: value for name, value in entries.items() if torch.is_tensor(value)}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Load what ``flatten_optimizer_state`` returned; hyper-parameters stay those of ``optimizer``."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
