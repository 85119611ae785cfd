"""What both dense tasks train with: learning rate schedule, SGD, and an encoder that may be frozen."""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from relicctl.config.transfer import DenseEncoderConfig, DenseOptimConfig
from relicctl.console import Console
from relicctl.core.counter_rng import Stream, derive_seed, fork_seeded_rng
from relicctl.core.distributed import World
from relicctl.core.loop import Task
from relicctl.evaluation.dense.data import Collate, DenseDataset, Transform
from relicctl.models.layers import convert_sync_batchnorm
from relicctl.runs.distributed import RunContext


class DenseTask(Task):
    """Base class of the loop's dense tasks; this rank's rows of a batch are ``collate`` of transformed samples."""

    name: ClassVar[str]
    metric: ClassVar[str]
    open_splits: Callable[[str, str, Any, Console], tuple[DenseDataset, DenseDataset]]  # name, spec, config.data
    build_transform: Callable[[Any], Transform]  # from a config
    collate: Collate

    def __init__(self, encoder: Any, classes: int, config: Any, context: RunContext) -> None:
        device, world = context.device, context.world
        self.config, self.device, self.world, self.classes = config, device, world, classes
        self.mean, self.std = get_normalization(encoder, device)
        body = prepare_encoder(encoder, config.model, device, world)
        with fork_seeded_rng(derive_seed(config.seed, Stream.INIT, 1)):
            self.model = self.build_network(body).to(device).train()
        self.network = DistributedDataParallel(self.model) if world.size > 1 else self.model
        self.optimizer = torch.optim.SGD(
            [p for p in self.model.parameters() if p.requires_grad], config.optim.base_lr, config.optim.momentum,
            weight_decay=config.optim.weight_decay, foreach=True,
        )  # fmt: skip
        self.autocast = context.autocast()

    @abstractmethod
    def build_network(self, encoder: Any) -> nn.Module: ...

    @abstractmethod
    def score(self, samples: Any, bad: dict[int, str]) -> dict[str, Any]:
        """Return metrics on whole images; those that cannot be decoded are added to ``bad`` and left out."""

    def get_learning_rate(self, step: int) -> float:
        return compute_multistep_lr(step, self.config.optim)


def compute_multistep_lr(step: int, schedule: DenseOptimConfig) -> float:
    """Return the learning rate: linear warm-up to ``base_lr``, then a tenth of it after each of ``milestones``."""
    drops = sum(step >= fraction * schedule.steps for fraction in schedule.milestones)
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    return float(schedule.base_lr * warmup / 10**drops)


def prepare_encoder(encoder: Any, config: DenseEncoderConfig, device: torch.device, world: World) -> Any:
    """Return a copy of ``encoder`` to train as configured; frozen BatchNorm layers never leave eval mode."""
    encoder = copy.deepcopy(encoder).train().requires_grad_(not config.freeze_encoder)
    if not (config.freeze_encoder or config.freeze_bn):
        return convert_sync_batchnorm(encoder, device) if world.size > 1 else encoder
    for module in encoder.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False).eval()
            vars(module)["train"] = lambda mode=True, module=module: module  # whatever mode its parents are set to
    return encoder


def get_normalization(encoder: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation ``[3, 1, 1]`` of pixels in [0, 1] that the encoder was trained with."""
    mean, std = (torch.tensor(json.loads(encoder.metadata[name]), device=device) for name in ("mean", "std"))
    return mean.view(3, 1, 1), std.view(3, 1, 1)
