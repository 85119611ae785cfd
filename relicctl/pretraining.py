"""What pretraining minimises: one task for every objective, with the same networks, views and loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from relicctl.config.schema import Config
from relicctl.core import objectives
from relicctl.core.batchnorm import synchronised
from relicctl.core.counted import Stream, counted_seed
from relicctl.core.distributed import Gather, World
from relicctl.core.loss import relicv2_loss
from relicctl.core.models.heads import MLPHead
from relicctl.core.models.resnet import ResNet, build_encoder, seeded
from relicctl.core.models.siamese import Siamese
from relicctl.core.optim import build_optimizer
from relicctl.core.schedules import ema_gamma, learning_rate
from relicctl.data.feed import Batch
from relicctl.evaluation import collapse


class Pretraining:
    """The loop's task: online and target networks, the objective, the optimiser and the schedules.

    ``total_steps`` sets the schedules (a run may be cut short without changing them).
    """

    def __init__(
        self,
        config: Config,
        *,
        classes: int,
        steps_per_epoch: int,
        total_steps: int,
        device: torch.device,
        precision: str,
        world: World | None = None,
    ) -> None:
        world = world or World()
        optim = config.optim
        self._config, self._device = config, device
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        self._total = total_steps
        self._warmup = round(optim.warmup_epochs * steps_per_epoch)
        self._peak = optim.base_lr * optim.batch_size / 256
        self._gather = Gather(world) if world.size > 1 else None
        self._generator = torch.Generator(device)
        self._latest: tuple[Tensor, Tensor] | None = None

        self.state = build_networks(config, classes)
        if world.size > 1:
            self.state = synchronised(self.state, device)
        self.state = self.state.to(device).to(memory_format=torch.channels_last)
        if config.runtime.compile:
            self.state.online["encoder"].compile()
            if self.state.target is not None:
                self.state.target["encoder"].compile()
        self._online: nn.Module = self.state
        if world.size > 1:
            self._online = DistributedDataParallel(self.state)
        self.optimizer = build_optimizer(
            optim.name, self.state.online.named_parameters(), self._peak, optim.momentum, optim.weight_decay
        )

    @property
    def encoder(self) -> ResNet:
        encoder = self.state.online["encoder"]
        assert isinstance(encoder, ResNet)
        return encoder

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalars of this batch: ``loss`` and, where the objective has them, its parts."""
        large = batch.views[0].shape[0]
        with self._autocast:
            features, outputs = self._online(batch.views)
            target = self.state.target_forward(batch.views[0]) if self.state.target is not None else None
        self._latest = features.detach(), outputs.detach()

        name, loss = self._config.objective, self._config.loss
        if name in ("relicv2", "relic"):
            assert target is not None
            self._generator.manual_seed(counted_seed(self._config.seed, Stream.NEGATIVES, step))
            return relicv2_loss(
                outputs,
                target,
                large=large,
                temperature=loss.temperature,
                alpha=loss.alpha,
                beta=loss.beta,
                negatives=loss.negatives,
                generator=self._generator,
                invariance=loss.invariance,
                gather=self._gather,
            )
        if name == "byol":
            assert target is not None
            return objectives.byol_loss(outputs, target)
        if name == "simclr":
            return objectives.simclr_loss(outputs, temperature=loss.temperature, gather=self._gather)
        assert batch.labels is not None, "supervised pretraining was started without labels"
        return objectives.supervised_loss(outputs, batch.labels)

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, peak=self._peak, warmup_steps=self._warmup, total_steps=self._total)

    def after_step(self, step: int) -> None:
        if self.state.target is not None:
            gamma = ema_gamma(step, gamma0=self._config.target.ema, total_steps=self._total)
            self.state.update_target(gamma)

    def describe(self, step: int) -> dict[str, float]:
        """The target's decay, and the collapse monitor's figures on this process's part of the latest batch."""
        assert self._latest is not None
        features, outputs = self._latest
        figures = {
            "rank_me": round(collapse.rank_me(features[0]), 3),
            "deviation": round(collapse.spread(outputs[0]), 5),
        }
        if self.state.target is not None:
            gamma = ema_gamma(step, gamma0=self._config.target.ema, total_steps=self._total)
            figures["ema"] = round(gamma, 8)
        return figures


def build_networks(config: Config, classes: int = 0) -> Siamese:
    """Encoder, heads and target of an objective, initialised as a pure function of the seed."""
    model, objective, microbatch = config.model, config.objective, config.optim.microbatch
    with seeded(counted_seed(config.seed, Stream.INIT)):
        encoder = build_encoder(
            model.arch, model.width, model.stem, model.padding, config.runtime.activation_checkpointing
        )
        head, predictor = model.projector, model.predictor
        if objective == "supervised":
            return Siamese(encoder, nn.Linear(encoder.feature_dim, classes), None, False, microbatch)
        projector = MLPHead(encoder.feature_dim, head.hidden, head.out)
        if objective == "simclr":
            return Siamese(encoder, projector, None, False, microbatch)
        onward = MLPHead(head.out, predictor.hidden, predictor.out)
        return Siamese(encoder, projector, onward, True, microbatch)


def pick_precision(precision: str, device: torch.device) -> str:
    """Settle ``auto``: bf16 where the hardware computes in it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
