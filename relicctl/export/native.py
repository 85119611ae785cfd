"""relicctl's own form: one safetensors file with torchvision's names that says how to build and feed the encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from relicctl.encoder import load_encoder, save_encoder
from relicctl.export.bundle import Bundle, Outputs, quoted

KEEPS_PADDING = True
FOLDER = False
WEIGHTS = ""  # the file with the weights, seen from the folder
WRITES_WITH: tuple[str, ...] = ()
READS_WITH = ("relicctl",)


def refusal(bundle: Bundle) -> str | None:
    """Why this form cannot hold it, or None."""
    return "it holds encoders alone (leave out --classifier)" if bundle.head else None


def write(bundle: Bundle, path: Path) -> None:
    save_encoder(path, bundle.encoder, bundle.metadata)


def read(path: Path, bundle: Bundle) -> Callable[[Tensor], Outputs]:
    encoder: nn.Module = load_encoder(path, bundle.metadata["network"])
    return lambda images: Outputs(encoder(images).detach(), None)


def usage(path: Path, bundle: Bundle) -> list[str]:
    network = "" if bundle.metadata["network"] == "online" else f", network={quoted(bundle.metadata['network'])}"
    return [
        "from relicctl import load_encoder",
        f"model = load_encoder({quoted(path)}{network})",
        "prepare = model.transform  # PIL image -> tensor",
    ]
