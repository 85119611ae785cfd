"""One safetensors file with torchvision's names, for torchvision's own models and ``strict=True``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from relicctl.core.tensor_file import save_tensors
from relicctl.export.bundle import EncoderOutputs, ExportBundle, format_transform, quote_python_string


def get_unsupported_reason(bundle: ExportBundle) -> str | None:
    """Return why torchvision has no such model, or None."""
    if bundle.encoder.stem != "imagenet":
        return f"torchvision's ResNets have the 7x7 stem with a max-pool, not {bundle.encoder.stem}"
    if bundle.encoder.conv1.out_channels != 64:
        return "torchvision widens only the inner convolutions, not every stage and the stem"
    return None


def write(bundle: ExportBundle, path: Path) -> None:
    save_tensors(path, bundle.state_dict(), {**bundle.metadata, "format": "pt"})


def compute_outputs(path: Path, bundle: ExportBundle, images: Tensor) -> EncoderOutputs:
    model = _build_torchvision_model(bundle)
    if bundle.head is None:
        model.fc = nn.Identity()
    model.load_state_dict(load_file(path), strict=True)
    model.eval()
    classifier, model.fc = model.fc, nn.Identity()
    features = model(images)
    return EncoderOutputs(features, classifier(features) if bundle.head else None)


def format_usage(path: Path, bundle: ExportBundle) -> list[str]:
    classes = f"num_classes={len(bundle.classes)}" if bundle.head else ""
    if bundle.encoder.arch == "resnet200":
        models, depths = "torchvision.models.resnet", list(bundle.depths)
        build = f"{models}.ResNet({models}.Bottleneck, {depths}{', ' * bool(classes)}{classes})"
    else:
        build = f"torchvision.models.{bundle.encoder.arch}({classes})"
    without_head = "" if bundle.head else "; model.fc = torch.nn.Identity()"
    return [
        "import torch, torchvision, safetensors.torch",
        f"model = {build}{without_head}",
        f"model.load_state_dict(safetensors.torch.load_file({quote_python_string(path)}), strict=True); model.eval()",
        *format_transform(bundle),
    ]


def _build_torchvision_model(bundle: ExportBundle) -> Any:
    from torchvision.models import resnet

    classes = len(bundle.classes) or 1
    if bundle.encoder.arch == "resnet200":  # torchvision has no function for it
        return resnet.ResNet(resnet.Bottleneck, list(bundle.depths), num_classes=classes)
    return getattr(resnet, bundle.encoder.arch)(num_classes=classes)
