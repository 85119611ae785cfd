"""A folder for transformers' ``AutoModel``, ``AutoModelForImageClassification`` and ``AutoImageProcessor``.

Its ResNet has a free width, and the stride on the 3x3 as ours; its stem is always the 7x7 with a max-pool.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relicctl.core.tensor_file import save_tensors
from relicctl.export.bundle import WEIGHTS_FILE, EncoderOutputs, ExportBundle, quote_python_string


def get_unsupported_reason(bundle: ExportBundle) -> str | None:
    """Return why transformers has no such model, or None."""
    if bundle.encoder.stem != "imagenet":
        return f"transformers' ResNet has the 7x7 stem with a max-pool, not {bundle.encoder.stem}"
    return None


def write(bundle: ExportBundle, path: Path) -> None:
    prefix = "resnet." if bundle.head else ""
    tensors = {_to_transformers_name(name, prefix): tensor for name, tensor in bundle.state_dict().items()}
    save_tensors(path / WEIGHTS_FILE, tensors, {**bundle.metadata, "format": "pt"})
    configs = {"config": _build_transformers_config(bundle), "preprocessor_config": _build_processor_config(bundle)}
    for name, content in configs.items():
        (path / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def compute_outputs(path: Path, bundle: ExportBundle, images: Tensor) -> EncoderOutputs:
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = AutoModelForImageClassification if bundle.head else AutoModel
    model, report = kind.from_pretrained(path, local_files_only=True, output_loading_info=True)
    differing = [name for names in report.values() for name in names]
    if differing:
        raise RuntimeError(f"transformers did not take all tensors: {', '.join(map(str, differing))}")
    processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
    grey = torch.zeros(3, bundle.size + 9, bundle.size + 5, dtype=torch.uint8)
    if processor(grey, return_tensors="pt")["pixel_values"].shape[1:] != (3, bundle.size, bundle.size):
        raise RuntimeError("transformers prepares images of another size")
    model.eval()
    body = model.resnet if bundle.head else model
    features = body(images).pooler_output[:, :, 0, 0]
    return EncoderOutputs(features, model(images).logits if bundle.head else None)


def format_usage(path: Path, bundle: ExportBundle) -> list[str]:
    kind = "AutoModelForImageClassification" if bundle.head else "AutoModel"
    return [
        f"from transformers import AutoImageProcessor, {kind}",
        f"processor = AutoImageProcessor.from_pretrained({quote_python_string(path)})",
        f"model = {kind}.from_pretrained({quote_python_string(path)}).eval()",
    ]


def _build_transformers_config(bundle: ExportBundle) -> dict[str, Any]:
    planes, basic = bundle.encoder.conv1.out_channels, bundle.encoder.arch in ("resnet18", "resnet34")
    expansion = 1 if basic else 4
    return {
        "architectures": ["ResNetForImageClassification" if bundle.head else "ResNetModel"],
        "model_type": "resnet",
        "dtype": "float32",
        "num_channels": 3,
        "embedding_size": planes,
        "hidden_sizes": [planes * expansion * 2**stage for stage in range(4)],
        "depths": list(bundle.depths),
        "layer_type": "basic" if basic else "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "id2label": {str(index): name for index, name in enumerate(bundle.classes)},
        "label2id": {name: index for index, name in enumerate(bundle.classes)},
    }


def _build_processor_config(bundle: ExportBundle) -> dict[str, Any]:
    return {
        "image_processor_type": "BitImageProcessor",  # short side, then centre: for networks of any kind
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(bundle.size / bundle.crop_ratio)},
        "resample": 3,  # Pillow's number of bicubic
        "do_center_crop": True,
        "crop_size": {"height": bundle.size, "width": bundle.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": bundle.mean,
        "image_std": bundle.std,
    }


def _to_transformers_name(name: str, prefix: str) -> str:
    """Return transformers' name of the tensor that torchvision calls ``name``."""
    if name.startswith("fc."):
        return name.replace("fc.", "classifier.1.")
    name = re.sub(r"^(conv|bn)1\.", r"embedder.embedder.\1.", name)
    name = re.sub(r"^layer(\d)\.(\d+)", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}", name)
    name = name.replace("downsample.0", "shortcut.convolution").replace("downsample.1", "shortcut.normalization")
    name = re.sub(r"\.(conv|bn)(\d)\.", lambda m: f".layer.{int(m[2]) - 1}.{m[1]}.", name)
    return prefix + name.replace(".conv.", ".convolution.").replace(".bn.", ".normalization.")
