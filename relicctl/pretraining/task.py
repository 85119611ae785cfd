"""What pretraining trains: networks, objective, optimiser and schedule; one task for every objective."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from relicctl.config.pretrain import PretrainConfig
from relicctl.core import objectives
from relicctl.core.counter_rng import Stream, derive_seed, fork_seeded_rng
from relicctl.core.distributed import SINGLE_PROCESS, DistributedGather, World
from relicctl.core.hardware import pick_precision
from relicctl.core.loop import Task
from relicctl.core.loss import relicv2_loss
from relicctl.core.optim import build_optimizer, compute_ema_gamma, compute_learning_rate
from relicctl.data.augment import load_triton_kernels
from relicctl.data.views import Batch
from relicctl.encoders.file import load_encoder
from relicctl.errors import UsageError
from relicctl.evaluation import online
from relicctl.models.layers import convert_sync_batchnorm
from relicctl.models.resnet import ResNet, build_encoder
from relicctl.models.siamese import MLPHead, Siamese

STRIDE_BEFORE_LAST_STAGE = {"imagenet": 16, "stride2": 8, "cifar": 4}
COMPILE_MIN_STEPS = 10_000  # steps: compiling takes a minute or two


class PretrainTask(Task):
    """The loop's task: online and target networks, the objective and the optimiser, on their schedule.

    ``classes``: of the training images, for supervised training; ``precision``: "fp32" or "bf16", of the forward pass.
    """

    def __init__(
        self,
        config: PretrainConfig,
        schedule: Schedule,
        *,
        classes: int,
        device: torch.device,
        precision: str,
        world: World = SINGLE_PROCESS,
    ) -> None:
        optim = config.optim
        self._config, self._schedule, self._world = config, schedule, world
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        self._gather = DistributedGather(world) if world.size > 1 else None
        self._generator = torch.Generator(device)
        self._last_outputs: tuple[Tensor, Tensor] | None = None

        self.model: Siamese = build_networks(config, classes)
        if world.size > 1:
            self.model = convert_sync_batchnorm(self.model, device)
        self.model = self.model.to(device).to(memory_format=torch.channels_last)
        if resolve_compile(config, device, world, schedule.total_steps):
            self.model.compile_encoders()
        self._online: nn.Module = DistributedDataParallel(self.model) if world.size > 1 else self.model
        self.optimizer = build_optimizer(
            optim.name, self.model.online.named_parameters(), schedule.peak_lr, optim.momentum, optim.weight_decay
        )

    @property
    def encoder(self) -> ResNet:
        encoder = self.model.online["encoder"]
        assert isinstance(encoder, ResNet)
        return encoder

    @property
    def num_candidates(self) -> int | None:
        """Return how many images the likelihood is over: the positive and its negatives. None for other objectives."""
        if self._config.objective not in ("relicv2", "relic"):
            return None
        negatives = self._config.loss.negatives
        return self._config.optim.batch_size if negatives == "all" else negatives + 1

    def compute_loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return scalars of this batch: ``loss`` and, where the objective has them, its parts."""
        return self.compute_objective(*self.embed(batch), batch.labels, step)

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return both networks' outputs of the views: online [V, B, D], and target [L, B, D] where there is one."""
        with self._autocast:
            features, outputs = self._online(batch.views)
            target = self.model.forward_target(batch.views[0]) if self.model.target is not None else None
        self._last_outputs = features.detach(), outputs.detach()
        return outputs, target

    def compute_objective(
        self, outputs: Tensor, target: Tensor | None, labels: Tensor | None, step: int
    ) -> dict[str, Tensor]:
        """Return the objective's scalars: ``loss``, and its parts where it has them."""
        name, loss = self._config.objective, self._config.loss
        if name in ("relicv2", "relic"):
            assert target is not None
            self._generator.manual_seed(derive_seed(self._config.seed, Stream.NEGATIVES, step))
            return relicv2_loss(
                outputs, target, large=len(target), temperature=loss.temperature, alpha=loss.alpha, beta=loss.beta,
                negatives=loss.negatives, generator=self._generator, invariance=loss.invariance, gather=self._gather,
            )  # fmt: skip
        if name == "byol":
            assert target is not None
            return objectives.byol_loss(outputs, target)
        if name == "simclr":
            return objectives.simclr_loss(outputs, temperature=loss.temperature, gather=self._gather)
        assert labels is not None, "supervised pretraining was started without labels"
        return objectives.supervised_loss(outputs, labels)

    def get_learning_rate(self, step: int) -> float:
        return self._schedule.compute_learning_rate(step)

    def after_step(self, step: int) -> None:
        if self.model.target is not None:
            self.model.update_target(self._schedule.compute_ema(step))

    def compute_metrics(self, step: int) -> dict[str, float]:
        """Return the target's decay, and the collapse monitor's metrics on one view of the latest batch."""
        assert self._last_outputs is not None
        counts = [self._last_outputs[0].shape[1]] * self._world.size
        features, outputs = (self._world.gather_rows(views[0], counts) for views in self._last_outputs)
        metrics = {
            "rankme": round(online.compute_rankme(features), 3),
            "embedding_std": round(online.compute_normalized_std(outputs), 5),
            "feature_std": round(online.compute_normalized_std(features), 5),
        }
        if self.model.target is not None:
            metrics["ema"] = round(self._schedule.compute_ema(step), 8)
        return metrics


class Schedule:
    """Learning rate and target decay as functions of the step, and where a run ends.

    ``total_steps`` (by default those of all epochs) shapes both; ``last_step`` is earlier where optim.max_steps cuts
    a run short, which does not change the schedule.
    """

    def __init__(self, config: PretrainConfig, steps_per_epoch: int, total_steps: int | None = None) -> None:
        optim = config.optim
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps or optim.epochs * steps_per_epoch
        self.last_step = min(self.total_steps, optim.max_steps or self.total_steps)
        self.warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
        self.peak_lr = optim.base_lr * optim.batch_size / 256
        self.initial_ema = self._resolve_ema(config.target.ema)

    def compute_learning_rate(self, step: int) -> float:
        return compute_learning_rate(step, self.peak_lr, self.warmup_steps, self.total_steps)

    def compute_ema(self, step: int) -> float:
        return compute_ema_gamma(step, self.initial_ema, self.total_steps)

    def _resolve_ema(self, setting: float | str) -> float:
        """Resolve "auto": a decay g averages over 1 / (1 - g) steps, here one and a thousandth of the run's.

        Our choice, close to BYOL's published values: .996 for 312,000 steps (here .9968), .99 for 94,000 (.9895).
        """
        return self.total_steps / (self.total_steps + 1000) if isinstance(setting, str) else setting


def build_networks(config: PretrainConfig, classes: int = 0) -> Siamese:
    """Return encoder, heads and target of the objective, initialised as a pure function of the seed."""
    model = config.model
    with fork_seeded_rng(derive_seed(config.seed, Stream.INIT)):
        encoder = build_encoder(model.arch, model.width, model.stem, model.padding)
        encoder.activation_checkpointing = config.runtime.activation_checkpointing
        if config.objective == "supervised":
            networks = Siamese(encoder, nn.Linear(encoder.feature_dim, classes), None, False)
        else:
            projector = MLPHead(encoder.feature_dim, model.projector.hidden, model.projector.out)
            predictor = MLPHead(model.projector.out, model.predictor.hidden, model.predictor.out)
            has_target = config.objective != "simclr"
            networks = Siamese(encoder, projector, predictor if has_target else None, has_target)
    networks.microbatch = config.optim.microbatch
    networks.per_view = model.bn_batch == "view"
    for module in networks.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = model.bn_momentum
    return networks


def load_initial_weights(weights: str | None, task: PretrainTask, warn: Callable[[str], None]) -> None:
    """Load the encoder of ``weights``, if given, into both networks. Raises UsageError if it does not fit."""
    if weights is None:
        return
    initial, current = load_encoder(weights, warn=warn).state_dict(), task.encoder.state_dict()
    if {name: t.shape for name, t in initial.items()} != {name: t.shape for name, t in current.items()}:
        what = f"The weights of {weights} do not fit this encoder."
        raise UsageError(what, "Set model.arch, model.width and model.stem to theirs.")
    for network in (task.model.online, task.model.target):
        if network is not None:
            network["encoder"].load_state_dict(initial)


def resolve_compile(config: PretrainConfig, device: torch.device, world: World, total_steps: int) -> bool:
    """Resolve ``runtime.compile``. "auto" never compiles on several ranks: with SyncBatchNorm that is untested."""
    setting = config.runtime.compile
    if setting != "auto":
        return setting
    return world.size == 1 and total_steps >= COMPILE_MIN_STEPS and load_triton_kernels(device) is not None


def resolve_precision(config: PretrainConfig, device: torch.device) -> str:
    """Return "bf16" or "fp32" for the networks' forward pass.

    On a CPU, oneDNN's bf16 convolution of one pixel at stride 2 reads uninitialised memory for its gradients (seen
    with torch 2.14), so views that shrink to one pixel before the last stage are computed in fp32. Raises UsageError
    if bf16 was asked for.
    """
    precision = pick_precision(config.runtime.precision, device)
    smallest = min(view.size for view in (config.views.large, config.views.small) if view.count)
    if precision == "fp32" or device.type != "cpu" or smallest > STRIDE_BEFORE_LAST_STAGE[config.model.stem]:
        return precision
    if config.runtime.precision == "auto":
        return "fp32"
    what = f"Views of {smallest} px are one pixel before the last stage, where a CPU's bf16 gradients are wrong."
    raise UsageError(what, "Set runtime.precision=fp32, or larger views.")
