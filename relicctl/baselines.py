"""Encoders to compare with: an untrained network, raw pixels, torchvision's supervised weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torchvision
from torch import Tensor, nn

from relicctl.config.resolve import load_run_config
from relicctl.config.schema import EncoderConfig
from relicctl.core.counted import Stream, derive_seed
from relicctl.core.models.resnet import ResNet, build_encoder, fork_seeded_rng
from relicctl.data.augment import IMAGENET_MEAN, IMAGENET_STD
from relicctl.encoder import load_encoder
from relicctl.errors import DataError, UsageError
from relicctl.reference import ResolvedEncoder, open_trained_encoder

BASELINES = ("random", "pixels", "torchvision")
MAX_PIXEL_SIDE = 32  # most pixels of a side whose values are features


class Pixels(nn.Module):
    """The image itself as its features: ``[N, 3, s, s]`` -> ``[N, 3 s s]``, averaged down to 32 px."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._side = min(size, MAX_PIXEL_SIDE)
        self.feature_dim = 3 * self._side**2

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, self._side).flatten(1)


def open_encoder(
    source: str, *, network: str, model: EncoderConfig, size: int | None, seed: int, warn: Callable[[str], None],
    crop_ratio: float | None = None,
) -> ResolvedEncoder:  # fmt: skip
    """What ``open_trained_encoder`` opens; and ``random``, ``pixels``, ``torchvision:NAME``.

    ``random:RUN`` is RUN's network before its first step, ``pixels:RUN`` goes with RUN's images. Without a run
    ``random`` is a ``model`` from ``seed``; both are made for ``size`` px of the centre square ``crop_ratio``.
    """
    kind, _, rest = source.partition(":")
    if kind not in BASELINES or Path(source).exists():
        return open_trained_encoder(source, network=network, warn=warn)
    if kind == "torchvision":
        return ResolvedEncoder(load_encoder(find_cached_weights(rest)), Path(source), None)
    run, crop_ratio = Path(rest) if rest else None, crop_ratio or 0.875
    if run is not None:
        config = load_run_config(run / "config.yaml")
        model, seed = config.model, config.seed
        size, crop_ratio = config.eval.size or config.views.large.size, config.eval.crop_ratio
    if kind == "pixels":
        return _make_baseline(Pixels(size or MAX_PIXEL_SIDE), source, run, size or MAX_PIXEL_SIDE, crop_ratio)
    with fork_seeded_rng(derive_seed(seed, Stream.INIT)):
        encoder = build_encoder(model.arch, model.width, model.stem, model.padding)
    return _make_baseline(encoder, source, run, size or 224, crop_ratio)


def find_cached_weights(name: str) -> Path:
    """The file that torchvision downloaded for its ResNet ``name``. Nothing is fetched."""
    try:
        entries = list(torchvision.models.get_model_weights(name))
    except ValueError:
        entries = []
    if not entries or not name.startswith("resnet"):
        raise UsageError(f"torchvision has no ResNet {name!r}.", "Give torchvision:resnet50, or 18, 34, 101 or 152.")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for entry in entries:  # the first are those that papers compare with
        file = folder / entry.url.rpartition("/")[2]
        if file.is_file():
            return file
    raise DataError(
        f"torchvision's weights of {name} are not in its cache {folder}.",
        f"Fetch {entries[0].url} into it, or give the path of such a file.",
    )


def _make_baseline(encoder: nn.Module, source: str, run: Path | None, size: int, crop_ratio: float) -> ResolvedEncoder:
    metadata = {
        "arch": getattr(encoder, "arch", "pixels"),
        "network": "none",
        "size": str(size),
        "crop_ratio": str(crop_ratio),
        "mean": json.dumps(IMAGENET_MEAN),
        "std": json.dumps(IMAGENET_STD),
    }
    vars(encoder)["metadata"] = metadata
    return ResolvedEncoder(cast(ResNet, encoder.eval()), Path(source), run)
