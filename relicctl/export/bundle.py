"""What is exported: an encoder, perhaps with a linear classifier, and what is known about them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from relicctl.errors import UsageError
from relicctl.models.resnet import ARCHITECTURES, ResNet, build_encoder

WEIGHTS_FILE = "model.safetensors"  # of the formats that are folders


class EncoderOutputs(NamedTuple):
    """``features`` float32 ``[N, F]``; ``logits`` ``[N, C]``, or None without a classifier."""

    features: Tensor
    logits: Tensor | None


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier over features: ``weight`` ``[C, F]``, ``bias`` ``[C]``, C names."""

    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class ExportBundle:
    """``encoder`` in eval mode; ``metadata`` as in RUN/encoder.safetensors and more, all text."""

    encoder: ResNet
    head: LinearHead | None
    metadata: dict[str, str]

    @property
    def size(self) -> int:
        """Pixels of an input's side."""
        return int(self.metadata["size"])

    @property
    def crop_ratio(self) -> float:
        return float(self.metadata["crop_ratio"])

    @property
    def mean(self) -> list[float]:
        return list(json.loads(self.metadata["mean"]))

    @property
    def std(self) -> list[float]:
        return list(json.loads(self.metadata["std"]))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.head.classes if self.head else ()

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks in each stage."""
        return ARCHITECTURES[self.encoder.arch][1]

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors under torchvision's names, the classifier as ``fc``."""
        tensors = {name: t.detach().contiguous() for name, t in self.encoder.state_dict().items()}
        if self.head:
            tensors |= {"fc.weight": self.head.weight, "fc.bias": self.head.bias}
        return tensors

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> EncoderOutputs:
        """Compute from normalised images ``[N, 3, size, size]`` what every exported form has to give too."""
        features = self.encoder(images)
        logits = nn.functional.linear(features, self.head.weight, self.head.bias) if self.head else None
        return EncoderOutputs(features, logits)


def quote_python_string(text: str | Path) -> str:
    """Return a Python string literal, in double quotes."""
    return json.dumps(str(text), ensure_ascii=False)


def format_transform(bundle: ExportBundle) -> list[str]:
    """Return torchvision code that prepares an RGB image, as ``transform``."""
    side = round(bundle.size / bundle.crop_ratio)
    return [
        "from torchvision import transforms as T",
        f"transform = T.Compose([T.Resize({side}, T.InterpolationMode.BICUBIC), T.CenterCrop({bundle.size}), "
        f"T.ToTensor(), T.Normalize({bundle.mean}, {bundle.std})])",
    ]


def to_symmetric_padding(encoder: ResNet) -> ResNet:
    """Return the same weights behind PyTorch's padding: another function of the images than with TensorFlow's."""
    converted = build_encoder(encoder.arch, encoder.width, encoder.stem, "symmetric")
    converted.load_state_dict(encoder.state_dict())
    return converted.eval()


def load_head(path: Path, feature_dim: int) -> LinearHead:
    """Load the classifier of a linear-eval run, or of a file. Raises UsageError unless it takes such features."""
    file = path / "classifier.safetensors" if path.is_dir() else path
    fix = "Give --classifier the folder of a `relicctl linear-eval` run."
    try:
        with safe_open(file, framework="pt") as handle:
            weight, bias = handle.get_tensor("weight").float(), handle.get_tensor("bias").float()
            classes = tuple(json.loads((handle.metadata() or {})["classes"]))
    except FileNotFoundError:
        raise UsageError(f"There is no classifier {file}.", fix) from None
    except (SafetensorError, OSError, KeyError, ValueError) as reason:
        raise UsageError(f"{file} is no classifier ({reason}).", fix) from None
    if weight.shape != (len(classes), feature_dim) or bias.shape != (len(classes),):
        raise UsageError(
            f"The classifier {file} has shape {list(weight.shape)} for {len(classes)} classes, "
            f"but the encoder gives {feature_dim} features.",
            "Give the classifier that was trained on this encoder.",
        )
    return LinearHead(weight, bias, classes)
