"""Fine-tuning on another data set: the whole network and a new linear layer, as a task for the training loop."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from relicctl.core.batchnorm import convert_sync_batchnorm
from relicctl.core.counted import Stream, derive_seed
from relicctl.core.distributed import World
from relicctl.core.models.resnet import fork_seeded_rng
from relicctl.core.schedules import compute_learning_rate
from relicctl.data.feed import Batch


@dataclass(frozen=True)
class FinetuneParams:
    """One training: ``rate`` falls along a cosine to 0 over ``steps``; ``decay`` is on all parameters.

    ``one_vs_rest``: each class has its own sigmoid.
    """

    lr: float
    weight_decay: float
    momentum: float
    steps: int
    steps_per_epoch: int
    one_vs_rest: bool
    seed: int
    precision: str


class FinetuneTask:
    """The loop's task. ``encoder`` itself is left as it is; ``state`` is a copy of it and a linear layer.

    Each process of ``world`` has its rows of the global batch; BatchNorm and gradients are taken over all of them.
    """

    def __init__(
        self, encoder: Any, classes: int, params: FinetuneParams, device: torch.device, world: World | None = None
    ) -> None:
        split = world is not None and world.size > 1
        self._params, self._classes = params, classes
        with fork_seeded_rng(derive_seed(params.seed, Stream.INIT)):
            head = nn.Linear(encoder.feature_dim, classes)
        network = nn.Sequential(copy.deepcopy(encoder).requires_grad_(True), head)
        if split:
            network = convert_sync_batchnorm(network, device)
        self.model: nn.Module = network.to(device).to(memory_format=torch.channels_last).train()
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = compute_bn_momentum(params.steps_per_epoch)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            network.parameters(),
            params.lr,
            params.momentum,
            weight_decay=params.weight_decay,
            nesterov=True,
            foreach=True,
        )
        self._network: nn.Module = DistributedDataParallel(self.model) if split else self.model
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=params.precision == "bf16")

    def compute_loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Cross-entropy of a softmax; of a sigmoid for each class where each is ranked by itself.

        Labels int8 ``[B, C]`` are 1 and -1, and 0 where an image does not count for a class: it adds 0 to the mean.
        """
        assert batch.labels is not None
        with self._autocast:
            logits = self._network(batch.views[0][0])
        if self._params.one_vs_rest:
            multi_label = batch.labels.ndim == 2
            truth = batch.labels if multi_label else one_hot(batch.labels, self._classes)
            valid = (truth != 0).float() if multi_label else None
            return {"loss": binary_cross_entropy_with_logits(logits.float(), (truth > 0).float(), valid)}
        return {"loss": cross_entropy(logits.float(), batch.labels)}

    def get_learning_rate(self, step: int) -> float:
        return compute_learning_rate(step, peak=self._params.lr, warmup_steps=0, total_steps=self._params.steps)

    def after_step(self, step: int) -> None:
        pass

    def compute_metrics(self, step: int) -> dict[str, float]:
        return {}


def compute_bn_momentum(steps_per_epoch: int) -> float:
    """Of BatchNorm's running statistics, 1 - decay as torch has it: BYOL's decay is max(1 - 10 / s, 0.9)."""
    return 1 - max(1 - 10 / steps_per_epoch, 0.9)
