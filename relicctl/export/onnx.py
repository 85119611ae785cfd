"""One ONNX file: ``images`` [n, 3, size, size] to ``features`` [n, F] and, with a classifier, ``logits`` [n, C].

The batch is free, the size is fixed. It takes the encoder as it is, whatever its width, stem or padding.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from relicctl.export.bundle import EncoderOutputs, ExportBundle, format_transform, quote_python_string


def get_unsupported_reason(bundle: ExportBundle) -> str | None:
    return None


def write(bundle: ExportBundle, path: Path) -> None:
    import onnx

    example = torch.zeros(2, 3, bundle.size, bundle.size)  # a batch of one would be taken for a constant
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own parts
        torch.onnx.export(
            _Graph(bundle).eval(),
            (example,),
            path,
            dynamo=True,
            input_names=["images"],
            output_names=["features", "logits"] if bundle.head else ["features"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            external_data=False,
            verbose=False,
        )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, dict(sorted(bundle.metadata.items())))  # the same bytes every time
    onnx.save(model, path)
    onnx.checker.check_model(path)


def compute_outputs(path: Path, bundle: ExportBundle, images: Tensor) -> EncoderOutputs:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    # the first image alone, the others together: two sizes of a batch
    parts = [session.run(None, {"images": part.numpy()}) for part in images.split([1, len(images) - 1])]
    features, *logits = (torch.cat([torch.from_numpy(x) for x in part]) for part in zip(*parts, strict=True))
    return EncoderOutputs(features, logits[0] if logits else None)


def format_usage(path: Path, bundle: ExportBundle) -> list[str]:
    shape = f"float32 [n, 3, {bundle.size}, {bundle.size}], each from transform"
    return [
        "import onnxruntime",
        *format_transform(bundle),
        f'session = onnxruntime.InferenceSession({quote_python_string(path)}, providers=["CPUExecutionProvider"])',
        f'features = session.run(["features"], {{"images": images}})[0]  # images: {shape}',
    ]


class _Graph(nn.Module):
    """The encoder with its classifier, as tensors in and tensors out."""

    def __init__(self, bundle: ExportBundle) -> None:
        super().__init__()
        self.encoder = bundle.encoder
        self.head: nn.Linear | None = None
        if bundle.head:
            self.head = nn.Linear(bundle.encoder.feature_dim, len(bundle.classes))
            self.head.load_state_dict({"weight": bundle.head.weight, "bias": bundle.head.bias})

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.encoder(images)
        return (features,) if self.head is None else (features, self.head(features))
