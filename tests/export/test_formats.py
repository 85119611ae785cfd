"""Exported and loaded again, by the lines that are printed: the same features and logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relicctl.commands import export as command
from relicctl.encoders.file import load_encoder
from relicctl.errors import UsageError
from relicctl.export.bundle import load_head


def export(source: str, **options: object) -> dict:
    return command.export(source, command.ExportOptions(**options))  # type: ignore[arg-type]


def export_and_load(source: Path, out: Path, **options: object) -> dict:
    """What the printed lines define, with the result of the export under ``result``."""
    result = export(str(source), out=out, quiet=True, **options)
    names: dict = {"images": options.get("images"), "result": result}
    exec("\n".join(result["load"]), names)
    return names


def some_images(count: int, size: int = 56) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvision_loads_strictly_and_agrees(arch, make_run, make_classifier, tmp_path):
    run = make_run(arch)
    encoder = load_encoder(run)
    features = encoder(some_images(2))
    bare = export_and_load(run, tmp_path / "bare.safetensors", format="torchvision")["model"]
    torch.testing.assert_close(bare(some_images(2)), features, rtol=0, atol=1e-5)

    folder = make_classifier(encoder.feature_dim)
    model = export_and_load(run, tmp_path / "full.safetensors", format="torchvision", classifier=folder)["model"]
    head = load_head(folder, encoder.feature_dim)
    torch.testing.assert_close(model(some_images(2)), features @ head.weight.T + head.bias, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "width", "stem"),
    [("resnet18", 1.0, "imagenet"), ("resnet50", 0.25, "imagenet"), ("resnet50", 0.25, "stride2")],
)
def test_timm_agrees_and_prepares_images_alike(arch, width, stem, make_run, make_classifier, tmp_path):
    pytest.importorskip("timm")
    run = make_run(arch, width, stem)
    encoder = load_encoder(run)
    features = encoder(some_images(2))
    loaded = export_and_load(run, tmp_path / "bare", format="timm")
    torch.testing.assert_close(loaded["model"](some_images(2)), features, rtol=0, atol=1e-5)
    assert_alike(loaded["transform"](picture()), encoder.transform(picture()))

    folder = make_classifier(encoder.feature_dim)
    loaded = export_and_load(run, tmp_path / "full", format="timm", classifier=folder)
    head = load_head(folder, encoder.feature_dim)
    expected = features @ head.weight.T + head.bias
    torch.testing.assert_close(loaded["model"](some_images(2)), expected, rtol=0, atol=1e-4)
    assert loaded["model"].pretrained_cfg["label_names"] == ["cat", 'the "dog"', "été"]


@pytest.mark.parametrize(("arch", "width"), [("resnet18", 1.0), ("resnet50", 0.25)])
def test_transformers_agrees_and_prepares_images_alike(arch, width, make_run, make_classifier, tmp_path):
    pytest.importorskip("transformers")
    run = make_run(arch, width)
    encoder = load_encoder(run)
    features = encoder(some_images(2))
    loaded = export_and_load(run, tmp_path / "bare", format="transformers")
    found = loaded["model"](some_images(2)).pooler_output.flatten(1)
    torch.testing.assert_close(found, features, rtol=0, atol=1e-5)
    prepared = loaded["processor"](picture(), return_tensors="pt")["pixel_values"][0]
    assert_alike(prepared, encoder.transform(picture()))

    folder = make_classifier(encoder.feature_dim)
    model = export_and_load(run, tmp_path / "full", format="transformers", classifier=folder)["model"]
    head = load_head(folder, encoder.feature_dim)
    torch.testing.assert_close(model(some_images(2)).logits, features @ head.weight.T + head.bias, rtol=0, atol=1e-4)
    assert model.config.id2label == {0: "cat", 1: 'the "dog"', 2: "été"}


def test_onnx_takes_any_encoder_and_any_batch(make_run, make_classifier, tmp_path):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    run = make_run("resnet18", 0.25, "stride2", "same")
    encoder = load_encoder(run)
    folder = make_classifier(encoder.feature_dim)
    head = load_head(folder, encoder.feature_dim)
    result = export(str(run), format="onnx", out=tmp_path / "net.onnx", classifier=folder, quiet=True)
    for count in (1, 5):
        names: dict = {"images": some_images(count).numpy()}
        exec("\n".join(result["load"]), names)
        assert names["transform"](Image.new("RGB", (90, 70))).shape == (
            3,
            encoder.transform.size,
            encoder.transform.size,
        )
        features = encoder(some_images(count))
        torch.testing.assert_close(torch.from_numpy(names["features"]), features, rtol=0, atol=1e-5)
        logits = names["session"].run(["logits"], {"images": names["images"]})[0]
        expected = features @ head.weight.T + head.bias
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)
    assert names["session"].get_modelmeta().custom_metadata_map["padding"] == "same"


@pytest.mark.parametrize(
    ("format", "network", "reason"),
    [
        ("torchvision", ("resnet18", 0.25, "imagenet"), "widens only the inner"),
        ("torchvision", ("resnet18", 1.0, "cifar"), "7x7 stem"),
        ("timm", ("resnet18", 0.25, "imagenet"), "only at width 1"),
        ("timm", ("resnet50", 0.25, "cifar"), "no cifar stem"),
        ("transformers", ("resnet18", 0.25, "cifar"), "7x7 stem"),
    ],
)
def test_what_a_library_cannot_express_is_refused(format, network, reason, make_run, tmp_path):
    with pytest.raises(UsageError, match=reason):
        export(str(make_run(*network)), format=format, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def picture() -> Image.Image:
    """Smooth, 192 x 128: at 56 px and a crop ratio of 0.875 every library's crop falls on whole pixels."""
    y, x = np.mgrid[0:128, 0:192] / 192
    return Image.fromarray((np.stack([x, y, (x + y) / 2], -1) * 255).astype(np.uint8))


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within two grey levels, 0.0175 each after normalisation."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 0.036
