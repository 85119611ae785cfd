"""What both dense tasks train with: learning rate schedule, SGD, and an encoder that may be frozen."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from relicctl.config.transfer import DenseEncoderConfig, DenseOptimConfig
from relicctl.core.distributed import World
from relicctl.models.layers import convert_sync_batchnorm


def compute_multistep_lr(step: int, schedule: DenseOptimConfig) -> float:
    """Return the learning rate: linear warm-up to ``base_lr``, then a tenth of it after each of ``milestones``."""
    drops = sum(step >= fraction * schedule.steps for fraction in schedule.milestones)
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    rate: float = schedule.base_lr * warmup / 10**drops
    return rate


def build_sgd(network: nn.Module, schedule: DenseOptimConfig) -> torch.optim.Optimizer:
    """Build SGD for all parameters that are trained."""
    return torch.optim.SGD(
        [p for p in network.parameters() if p.requires_grad], schedule.base_lr, schedule.momentum,
        weight_decay=schedule.weight_decay, foreach=True,
    )  # fmt: skip


def prepare_encoder(encoder: Any, config: DenseEncoderConfig, device: torch.device, world: World) -> Any:
    """Return a copy of ``encoder`` to train as configured; frozen BatchNorm layers never leave eval mode."""
    encoder = copy.deepcopy(encoder).train().requires_grad_(not config.freeze_encoder)
    if not (config.freeze_encoder or config.freeze_bn):
        return convert_sync_batchnorm(encoder, device) if world.size > 1 else encoder
    for module in encoder.modules():
        if isinstance(module, _BatchNorm):
            _freeze_in_eval_mode(module.requires_grad_(False))
    return encoder


def wrap_ddp(network: nn.Module, world: World) -> nn.Module:
    """Return ``network`` with gradients averaged over ranks."""
    return DistributedDataParallel(network) if world.size > 1 else network


def _freeze_in_eval_mode(module: nn.Module) -> None:
    """Set eval mode, whatever mode its parents are set to."""
    module.eval()
    vars(module)["train"] = lambda mode=True: module


def get_normalization(encoder: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation ``[3, 1, 1]`` of pixels in [0, 1] that the encoder was trained with."""
    mean, std = (torch.tensor(json.loads(encoder.metadata[name]), device=device) for name in ("mean", "std"))
    return mean.view(3, 1, 1), std.view(3, 1, 1)
