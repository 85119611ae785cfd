"""Encoders, classifiers and run folders as pretraining leaves them, made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from relicctl.config.resolve import dump_yaml, resolve_config
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.counter_rng import fork_seeded_rng
from relicctl.core.distributed import SINGLE_PROCESS, World
from relicctl.encoders.file import save_encoder
from relicctl.models.resnet import ResNet, build_encoder
from relicctl.runs.distributed import RunContext

SIZE = 56


def cpu_context(world: World = SINGLE_PROCESS) -> RunContext:
    """A quiet context on the CPU, for tasks that need no run's folder."""
    return RunContext(torch.device("cpu"), world, Console(quiet=True), None)


def lively_encoder(
    arch: str, width: float = 1.0, stem: str = "imagenet", padding: str = "symmetric", seed: int = 0
) -> ResNet:
    """Random weights whose BatchNorms have seen images, with scales and shifts that tell every channel apart."""
    with fork_seeded_rng(seed):
        encoder = build_encoder(arch, width, stem, padding)
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
                torch.nn.init.uniform_(module.weight, 0.3, 0.8)
                torch.nn.init.normal_(module.bias, 0, 0.1)
        with torch.no_grad():
            encoder.train()(torch.randn(8, 3, SIZE, SIZE))
    return encoder.eval()


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A run folder of an encoder given by arch, width, stem and padding; checkpoints hold a target as well."""

    def make(arch: str, width: float = 1.0, stem: str = "imagenet", padding: str = "symmetric") -> Path:
        run = tmp_path / "run"
        online = lively_encoder(arch, width, stem, padding)
        target = lively_encoder(arch, width, stem, padding, seed=1)
        model = [f"model.arch={arch}", f"model.width={width}", f"model.stem={stem}", f"model.padding={padding}"]
        resolved = resolve_config(sets=[*model, f"views.large.size={SIZE}", "views.small.count=0"])
        record = {"run": {"version": "0.1.0", "preset": "demo", "data_fingerprint": "f1e2d3"}}
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.yaml").write_text(dump_yaml(resolved.config) + yaml.safe_dump(record))
        (run / "results.json").write_text(json.dumps({"knn20": 0.471, "probe_top1": None, "preset": "demo"}))
        tensors = {f"state.{name}.encoder.{key}": tensor
                   for name, network in (("online", online), ("target", target))
                   for key, tensor in network.state_dict().items()}  # fmt: skip
        checkpoint.save_checkpoint(run / "checkpoints" / checkpoint.format_checkpoint_name(5), tensors, {"step": 5})
        metadata = {
            "version": "0.1.0",
            "preset": "demo",
            "objective": "relicv2",
            "network": "online",
            "size": str(SIZE),
            "crop_ratio": "0.875",
            "mean": "[0.485, 0.456, 0.406]",
            "std": "[0.229, 0.224, 0.225]",
        }
        save_encoder(run / "encoder.safetensors", online, metadata)
        return run

    return make


@pytest.fixture
def make_classifier(tmp_path: Path) -> Callable[[int], Path]:
    """The folder of a linear evaluation over that many features: three classes."""

    def make(features: int) -> Path:
        run = tmp_path / "linear"
        run.mkdir()
        head = {"weight": torch.randn(3, features), "bias": torch.randn(3)}
        save_file(head, run / "classifier.safetensors", {"classes": json.dumps(["cat", 'the "dog"', "été"])})
        (run / "results.json").write_text(json.dumps({"top1": 0.625}))
        return run

    return make
