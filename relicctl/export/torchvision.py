"""One safetensors file with torchvision's names, for torchvision's own models and ``strict=True``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from relicctl.export.bundle import Bundle, Outputs, quoted

KEEPS_PADDING = False  # TensorFlow's
FOLDER = False
WEIGHTS = ""  # the file with the weights, seen from the folder
WRITES_WITH: tuple[str, ...] = ()
READS_WITH = ("torchvision",)


def refusal(bundle: Bundle) -> str | None:
    """Why torchvision has no such model, or None."""
    if bundle.encoder.stem != "imagenet":
        return f"torchvision's ResNets have the 7x7 stem with a max-pool, not {bundle.encoder.stem}"
    if bundle.stem_channels != 64:
        return "torchvision widens only the inner convolutions, not every stage and the stem"
    return None


def write(bundle: Bundle, path: Path) -> None:
    save_file(bundle.tensors(), path, metadata={**bundle.metadata, "format": "pt"})


def read(path: Path, bundle: Bundle) -> Callable[[Tensor], Outputs]:
    model = _model(bundle)
    if bundle.head is None:
        model.fc = nn.Identity()
    model.load_state_dict(load_file(path), strict=True)
    model.eval()
    classifier, model.fc = model.fc, nn.Identity()

    @torch.inference_mode()
    def run(images: Tensor) -> Outputs:
        features = model(images)
        return Outputs(features, classifier(features) if bundle.head else None)

    return run


def usage(path: Path, bundle: Bundle) -> list[str]:
    classes = f"num_classes={len(bundle.classes)}" if bundle.head else ""
    if bundle.encoder.arch == "resnet200":
        models, depths = "torchvision.models.resnet", list(bundle.depths)
        build = f"{models}.ResNet({models}.Bottleneck, {depths}{', ' * bool(classes)}{classes})"
    else:
        build = f"torchvision.models.{bundle.encoder.arch}({classes})"
    bare = "" if bundle.head else "; model.fc = torch.nn.Identity()"
    return [
        "import torch, torchvision, safetensors.torch",
        f"model = {build}{bare}",
        f"model.load_state_dict(safetensors.torch.load_file({quoted(path)}), strict=True); model.eval()",
    ]


def _model(bundle: Bundle) -> Any:
    from torchvision.models import resnet

    classes = len(bundle.classes) or 1
    if bundle.encoder.arch == "resnet200":  # no function of its own
        return resnet.ResNet(resnet.Bottleneck, list(bundle.depths), num_classes=classes)
    return getattr(resnet, bundle.encoder.arch)(num_classes=classes)
