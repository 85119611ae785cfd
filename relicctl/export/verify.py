"""Does the exported form give the same features? Compared on images, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relicctl.config.resolve import load_run_config
from relicctl.data.bad_images import load_or_next
from relicctl.data.sources import open_dataset
from relicctl.errors import RelicError
from relicctl.export.bundle import EncoderOutputs, ExportBundle
from relicctl.reference import ResolvedEncoder

TOLERANCE = 1e-4  # of the largest feature where that is above 1: float32 keeps no fixed number of decimals
NUM_IMAGES = 4


def sample_images(reference: ResolvedEncoder) -> tuple[Tensor, str]:
    """Prepared images ``[4, 3, s, s]`` and where they are from: the run's own data, else the demo data."""
    transform: Any = reference.encoder.transform
    run = reference.run
    if run is not None and (run / "config.yaml").is_file():
        try:
            data = load_run_config(run / "config.yaml").data
            for spec, split in ((data.val, "val"), (data.train, "train")):
                if spec is not None:
                    return _load_sample_images(transform, spec, split), f"{NUM_IMAGES} images of {spec}"
        except RelicError:
            pass  # moved, or of another machine
    images = _load_sample_images(transform, "shapes", "val")
    return images, f"{NUM_IMAGES} images of the demo data, as the run's own cannot be read here"


def compute_max_difference(expected: EncoderOutputs, actual: EncoderOutputs) -> float:
    """The largest absolute difference of features and logits, each over max(1, its own largest value)."""
    assert (expected.logits is None) == (actual.logits is None)
    pairs = [(a, b) for a, b in zip(expected, actual, strict=True) if a is not None and b is not None]
    assert all(a.shape == b.shape for a, b in pairs), [(a.shape, b.shape) for a, b in pairs]
    largest = max(float((a - b).abs().max() / a.abs().max().clamp_min(1.0)) for a, b in pairs)
    return largest if np.isfinite(largest) else float("inf")


def format_padding_change(original: torch.nn.Module, changed: ExportBundle, images: Tensor) -> str:
    """In words, how far features move when TensorFlow's padding is replaced by the symmetric one."""
    with torch.inference_mode():
        before, after = original(images), changed.encoder(images)
    cosine = torch.nn.functional.cosine_similarity(before, after).mean()
    relative = (before - after).norm(dim=1) / before.norm(dim=1)
    return f"mean cosine {cosine:.4f} to the original features, mean relative difference {relative.mean():.1%}"


def _load_sample_images(transform: Callable[[Any], Tensor], spec: str, split: Any) -> Tensor:
    source = open_dataset(spec, split=split)
    chosen = np.linspace(0, len(source) - 1, NUM_IMAGES).astype(int)
    return torch.stack([transform(load_or_next(source, int(index))[0]) for index in chosen])
