"""relicctl's form: one safetensors file with torchvision's names that says how to build and feed the encoder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from relicctl.encoders.file import load_encoder, save_encoder
from relicctl.export.bundle import EncoderOutputs, ExportBundle, quote_python_string


def get_unsupported_reason(bundle: ExportBundle) -> str | None:
    """Return why this form cannot hold it, or None."""
    return "it holds encoders alone (leave out --classifier)" if bundle.head else None


def write(bundle: ExportBundle, path: Path) -> None:
    save_encoder(path, bundle.encoder, bundle.metadata)


def compute_outputs(path: Path, bundle: ExportBundle, images: Tensor) -> EncoderOutputs:
    encoder: nn.Module = load_encoder(path, bundle.metadata["network"])
    return EncoderOutputs(encoder(images), None)


def format_usage(path: Path, bundle: ExportBundle) -> list[str]:
    network = bundle.metadata["network"]
    argument = "" if network == "online" else f", network={quote_python_string(network)}"
    return [
        "from relicctl import load_encoder",
        f"model = load_encoder({quote_python_string(path)}{argument})",
        "prepare = model.transform  # PIL image of any mode -> tensor",
    ]
