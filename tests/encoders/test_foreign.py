"""Encoders in checkpoints of other projects: found under their prefix, reported, and checked as strictly as any."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from relicctl.encoders.file import load_encoder
from relicctl.errors import UsageError
from relicctl.models.resnet import build_encoder

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Tensors:
    torch.manual_seed(0)
    return dict(build_encoder("resnet18", 0.125).state_dict())


def put_under(prefix: str, tensors: Tensors, scale: float = 1.0) -> Tensors:
    return {prefix + name: scale * tensor if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def load(path: Path, network: str = "online") -> tuple[Tensors, list[str]]:
    said: list[str] = []
    return dict(load_encoder(path, network, said.append).state_dict()), said


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "prefix", ["module.", "module.encoder_q.", "backbone.", "encoder.", "student.", "teacher.", "a.b.c."]
)
def test_a_prefix_is_removed_and_reported(prefix: str, suffix: str, weights: Tensors, tmp_path: Path) -> None:
    path = tmp_path / f"w.{suffix}"
    head = {f"{prefix}fc.weight": torch.zeros(3, 64), f"{prefix}fc.2.bias": torch.zeros(3), "queue": torch.zeros(4)}
    (torch.save if suffix == "pth" else save_file)(put_under(prefix, weights) | head, path)
    found, said = load(path)
    assert_equal(found, weights)
    assert said == [f"{path}: the encoder is what lies under {prefix!r}; 3 other tensors are left out"]


@pytest.mark.parametrize("projector", [{}, {"module.projector.0.weight": torch.zeros(2, 2)}])
def test_the_network_is_found_among_all_that_a_training_saves(
    projector: Tensors, weights: Tensors, tmp_path: Path
) -> None:
    content: dict[str, Any] = {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": put_under("module.backbone.", weights) | projector,
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(lr=0.1),
    }
    torch.save(content, tmp_path / "w.ckpt")
    found, said = load(tmp_path / "w.ckpt")
    assert_equal(found, weights)
    assert "'state_dict.module.backbone.'" in said[0]
    assert f"{len(projector)} other tensors" in said[0]


@pytest.mark.parametrize(
    ("online", "target"),
    [
        ("state_dict.module.encoder_q.", "state_dict.module.encoder_k."),
        ("student.module.backbone.", "teacher.backbone."),
        ("module.base_encoder.", "module.momentum_encoder."),
        ("backbone.", "momentum_backbone."),
        ("online.", "ema."),
    ],
)
def test_of_two_networks_the_one_that_is_asked_for_is_taken(
    online: str, target: str, weights: Tensors, tmp_path: Path
) -> None:
    torch.save(put_under(online, weights) | put_under(target, weights, 2.0), tmp_path / "w.pth")
    assert_equal(load(tmp_path / "w.pth")[0], weights)
    assert_equal(load(tmp_path / "w.pth", "target")[0], put_under("", weights, 2.0))
    assert load_encoder(tmp_path / "w.pth", "target").metadata["network"] == "target"


def test_heads_beside_the_encoder_are_left_out_and_reported_but_for_torchvisions_classifier(
    weights: Tensors, tmp_path: Path
) -> None:
    classifier = {"fc.weight": torch.zeros(3, 64), "fc.bias": torch.zeros(3)}
    torch.save(weights | classifier, tmp_path / "w")
    assert load(tmp_path / "w")[1] == []
    torch.save(weights | {"fc.0.weight": torch.zeros(3), "prototypes.weight": torch.zeros(3)}, tmp_path / "v")
    found, said = load(tmp_path / "v")
    assert_equal(found, weights)
    assert said == [f"{tmp_path / 'v'}: 2 tensors that are not the encoder's are left out"]


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_encoder(path)
    assert len(str(caught.value)) < 700
    return caught.value.what


def test_two_networks_without_known_names_are_refused(weights: Tensors, tmp_path: Path) -> None:
    torch.save(put_under("left.", weights) | put_under("right.", weights, 2.0), tmp_path / "w")
    assert "left., right." in refusal(tmp_path / "w")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer1.0.se.weight": torch.zeros(1)}, "layer1.0.se.weight is unexpected"),
        ({"conv2.weight": torch.zeros(1)}, "conv2.weight is unexpected"),
        ({"layer2.0.bn1.bias": torch.zeros(3)}, "layer2.0.bn1.bias is [3] instead of [16]"),
        ({"layer2.0.bn1.bias": None}, "layer2.0.bn1.bias is missing"),
    ],
)
def test_what_lies_under_the_prefix_is_checked_as_strictly(
    change: dict[str, torch.Tensor | None], said: str, weights: Tensors, tmp_path: Path
) -> None:
    changed = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
    torch.save({"state_dict": put_under("module.", changed)}, tmp_path / "w")
    assert said in refusal(tmp_path / "w")


def test_other_architectures_are_refused_in_one_short_sentence(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = torchvision.models.wide_resnet50_2().state_dict()
    torch.save({k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in shapes.items()}, tmp_path / "w")
    assert "and 171 more" in refusal(tmp_path / "w")
    save_file({"module.blocks.0.attn.qkv.weight": torch.zeros(3)}, tmp_path / "v")
    assert "neither" in refusal(tmp_path / "v")


def test_torchscript_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "w.pt"))
    assert "TorchScript" in refusal(tmp_path / "w.pt")


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    for content in ({"epoch": 3}, {}, torch.zeros(3), {"state_dict": {"model": {}}}):
        torch.save(content, tmp_path / "w.pth")
        assert "no dictionary of tensors" in refusal(tmp_path / "w.pth")
