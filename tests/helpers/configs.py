"""Configs of runs that end within seconds."""

from __future__ import annotations

from typing import Any

import yaml

DATA = "shapes:size=16,train=64,val=40"
TINY_PRETRAIN: dict[str, Any] = {
    "model": {
        "arch": "resnet18",
        "width": 0.125,
        "stem": "stride2",
        "projector": {"hidden": 16, "out": 8},
        "predictor": {"hidden": 16, "out": 8},
    },
    "views": {"large": {"count": 2, "size": 16}, "small": {"count": 1, "size": 8}},
    "loss": {"negatives": 4},
    "optim": {"name": "lars", "batch_size": 8, "base_lr": 2.0, "epochs": 2, "warmup_epochs": 0.5},
    "data": {"train": DATA, "val": DATA},
    "eval": {"every_epochs": 1},
    "checkpoint": {"every_steps": 3, "every_minutes": None},
    "runtime": {"device": "cpu", "log_every": 2, "precision": "fp32", "threads": 1},
}  # eight steps an epoch


def tiny_pretrain_yaml(**sections: dict[str, Any]) -> str:
    """A tiny pretraining as YAML: ``TINY_PRETRAIN``, with the keys of ``sections`` in place of its own."""
    merged = {name: {**keys, **sections.get(name, {})} for name, keys in TINY_PRETRAIN.items()}
    return yaml.safe_dump({**sections, **merged})
