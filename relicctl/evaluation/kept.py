"""Features that are extracted once and kept on the disk, by the encoder's weights and the images' names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from relicctl.core.checkpoint import write_atomically
from relicctl.core.distributed import World
from relicctl.errors import DataError, RunFailed


def compute_encoder_hash(encoder: nn.Module, size: int, crop_ratio: float) -> str:
    """SHA-256 (hex) over the weights and how images are shown: what decides the features."""
    digest = hashlib.sha256(f"{type(encoder).__name__} {size} {crop_ratio}".encode())
    for attribute in ("arch", "stem", "padding"):
        digest.update(f"{attribute}={getattr(encoder, attribute, None)}".encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_or_extract(
    path: Path, device: torch.device, extract: Callable[[], tuple[Tensor, np.ndarray]], world: World
) -> tuple[Tensor, np.ndarray] | None:
    """What ``make`` gives, features ``[N, F]`` and their rows int64 ``[N]``, from ``path`` if it is there and whole.

    All processes of ``world`` make them; the main one alone reads, writes and gets them, the others get None.
    Raises DataError for features that are not finite, RunFailed when they cannot be written.
    """
    found = _load_features(path, device) if world.is_main else None
    if not world.broadcast_from_main(lambda: found is not None):
        extracted = extract()
        world.broadcast_from_main(lambda: _save_features(path, *extracted))
        found = extracted if world.is_main else None
    return found


def _load_features(path: Path, device: torch.device) -> tuple[Tensor, np.ndarray] | None:
    try:
        tensors = load_file(path, device=str(device))
        return tensors["features"], tensors["rows"].cpu().numpy()
    except (FileNotFoundError, SafetensorError, KeyError):
        return None  # not there, or damaged


def _save_features(path: Path, features: Tensor, rows: np.ndarray) -> None:
    bad = int((~features.isfinite().all(1)).sum())
    if bad:
        raise DataError(
            f"The encoder gives features that are not finite for {bad} of {len(rows)} images.",
            "Its weights are damaged or it diverged in training: take an earlier checkpoint.",
        )
    tensors = {"features": features.cpu().contiguous(), "rows": torch.from_numpy(rows)}
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary))
    except (OSError, SafetensorError) as reason:
        raise RunFailed(
            f"Features cannot be kept in {path.parent} ({getattr(reason, 'strerror', None) or reason}).",
            "Make room or choose another --out; with --resume everything finished is taken over.",
        ) from None
