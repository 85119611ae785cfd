"""A folder for ``timm.create_model("local-dir:PATH", pretrained=True)``: config.json and model.safetensors.

timm's ResNet has torchvision's names and, like it, one stem: 7x7 with 64 channels. Its ByobNet is freer: its
``resnet50_clip_gap`` and ``resnet101_clip_gap``, with CLIP's stem and poolings overridden, are plain ResNets
of any width.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from relicctl.core.tensor_file import save_tensors
from relicctl.export.bundle import WEIGHTS_FILE, EncoderOutputs, ExportBundle, quote_python_string

_BYOB_STEMS = {"imagenet": ("7x7", "maxpool", "stem.conv1"), "stride2": ("3x3", "", "stem")}
_BYOB_CONVOLUTIONS = {"1": "conv1_1x1", "2": "conv2_kxk", "3": "conv3_1x1"}


def get_unsupported_reason(bundle: ExportBundle) -> str | None:
    """Return why timm has no such model, or None."""
    encoder = bundle.encoder
    if _is_torchvision_resnet(bundle):
        return None
    if encoder.arch not in ("resnet50", "resnet101"):
        return f"timm builds a {encoder.arch} only at width 1 and with the 7x7 stem"
    if encoder.stem not in _BYOB_STEMS:
        return f"timm has no {encoder.stem} stem (3x3 at stride 1)"
    return None


def write(bundle: ExportBundle, path: Path) -> None:
    tensors = bundle.state_dict()
    if not _is_torchvision_resnet(bundle):
        tensors = {_to_byobnet_name(name, bundle.encoder.stem): tensor for name, tensor in tensors.items()}
    save_tensors(path / WEIGHTS_FILE, tensors, {**bundle.metadata, "format": "pt"})
    (path / "config.json").write_text(json.dumps(_build_timm_config(bundle), indent=2) + "\n", "utf-8")


def compute_outputs(path: Path, bundle: ExportBundle, images: Tensor) -> EncoderOutputs:
    import timm

    model: Any = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    stored, loaded = load_file(path / WEIGHTS_FILE), model.state_dict()
    # create_model may adapt or leave out tensors in silence
    if stored.keys() != loaded.keys() or not all(torch.equal(stored[name], loaded[name]) for name in stored):
        raise RuntimeError("timm built a model that does not hold the tensors of the file")
    stages = model.forward_features(images)
    features = model.forward_head(stages, pre_logits=True)
    return EncoderOutputs(features, model.forward_head(stages) if bundle.head else None)


def format_usage(path: Path, bundle: ExportBundle) -> list[str]:
    return [
        "import timm",
        f"model = timm.create_model({quote_python_string(f'local-dir:{path}')}, pretrained=True).eval()",
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
    ]


def _is_torchvision_resnet(bundle: ExportBundle) -> bool:
    return bundle.encoder.stem == "imagenet" and bundle.encoder.conv1.out_channels == 64


def _build_timm_config(bundle: ExportBundle) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architecture": bundle.encoder.arch,
        "num_classes": len(bundle.classes),
        "num_features": bundle.encoder.feature_dim,
        "global_pool": "avg",
    }
    first, last = "conv1", "fc"
    if not _is_torchvision_resnet(bundle):
        stem, pool, layer = _BYOB_STEMS[bundle.encoder.stem]
        config["architecture"] += "_clip_gap"
        config["model_args"] = {
            "width_factor": bundle.encoder.conv1.out_channels / 64,
            "stem_chs": 64,
            "stem_type": stem,
            "stem_pool": pool,
            "downsample": "conv1x1",
            "aa_layer": "",
        }
        first, last = f"{layer}.conv", "head.fc"
    if bundle.classes:
        config["label_names"] = list(bundle.classes)
    config["pretrained_cfg"] = {
        "num_classes": len(bundle.classes),
        "input_size": [3, bundle.size, bundle.size],
        "pool_size": None,
        "interpolation": "bicubic",
        "crop_pct": bundle.crop_ratio,
        "crop_mode": "center",
        "mean": bundle.mean,
        "std": bundle.std,
        "fixed_input_size": False,
        "first_conv": first,
        "classifier": last,
        "license": bundle.metadata["license"],
    }
    return config


def _to_byobnet_name(name: str, stem: str) -> str:
    """Return ByobNet's name of the tensor that torchvision calls ``name``."""
    layer = _BYOB_STEMS[stem][2]
    name = re.sub(r"^conv1\.", f"{layer}.conv.", name)
    name = re.sub(r"^bn1\.", f"{layer}.bn.", name)
    name = re.sub(r"^fc\.", "head.fc.", name)
    name = re.sub(r"^layer(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.", name)
    name = re.sub(r"downsample\.([01])", lambda m: f"shortcut.{('conv', 'bn')[int(m[1])]}", name)
    return re.sub(r"(?<=\d)\.(conv|bn)([123])\.", lambda m: f".{_BYOB_CONVOLUTIONS[m[2]]}.{m[1]}.", name)
