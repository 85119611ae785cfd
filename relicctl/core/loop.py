"""The one training loop: pretraining, mask networks, linear evaluation and fine-tuning all run through ``train``.

The loop knows steps, not models: a ``Task`` computes the loss of a batch. Losses stay on the device and are read back
only to log, evaluate or save, so an ordinary step waits for nothing.
"""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from relicctl.core import checkpoint
from relicctl.core.distributed import SINGLE_PROCESS, StopConsensus, World
from relicctl.core.hardware import release_freed_memory
from relicctl.core.stop_signals import StopRequested, StopSignals
from relicctl.errors import Diverged, Interrupted

STOP_GRACE_SECONDS = 5.0  # how long one of several ranks waits for its batch after a signal


class Batches(Protocol):
    """The data of a run: batches from any step on, and the seconds spent waiting for them."""

    @property
    def data_wait_seconds(self) -> float: ...

    def iter_from_step(self, step: int, stop: int) -> Iterator[Any]: ...


class Task(ABC):
    """Base class of what is trained: a model, its optimiser and its loss."""

    model: nn.Module  # holds every module whose tensors make up the run
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def compute_loss(self, batch: Any, step: int) -> dict[str, torch.Tensor]:
        """Return scalars, among them ``loss``, which is minimised; all are logged as means over steps."""

    @abstractmethod
    def get_learning_rate(self, step: int) -> float:
        """Return the learning rate of ``step``, a function of nothing else."""

    def after_step(self, step: int) -> None:  # noqa: B027 (most tasks have nothing to do here)
        """Update what the optimiser does not, such as a moving average."""

    def compute_metrics(self, step: int) -> dict[str, float]:
        """Return more metrics for the log line of ``step``; may wait for the device."""
        return {}


class RunLogger(Protocol):
    """Where metrics and checkpoints are written."""

    def write_metrics(self, record: dict[str, Any]) -> None: ...

    def save(self, step: int, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None: ...

    def get_last_checkpoint(self) -> str | None: ...


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, and how often to log, evaluate and save; steps are counted from 0."""

    total: int
    steps_per_epoch: int
    batch_size: int
    log_every: int = 50
    evaluate_every: int = 0
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = None
    resume_command: str = ""
    lr_key: str = "optim.base_lr"  # the config key of the learning rate, to lower when training diverges

    @classmethod
    def from_sections(cls, checkpoint: Any, runtime: Any, **others: Any) -> LoopConfig:
        """Return the config with what the sections ``checkpoint`` and ``runtime`` say; ``others`` as they are."""
        return cls(
            log_every=runtime.log_every,
            checkpoint_every=checkpoint.every_steps,
            checkpoint_minutes=checkpoint.every_minutes,
            **others,
        )

    def is_due(self, step: int, every: int | None) -> bool:
        """Whether ``step`` is the last one or a multiple of ``every``."""
        return step == self.total or bool(every and step % every == 0)


@dataclass
class TrainState:
    """What a run remembers besides its tensors: steps done, sums of losses since the last log line, latest metrics."""

    step: int = 0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    steps_since_log: int = 0
    eval_metrics: dict[str, Any] = field(default_factory=dict)
    evaluation_pending: bool = False  # a signal ended the evaluation of this step


def train(
    task: Task,
    batches: Batches,
    config: LoopConfig,
    logger: RunLogger,
    *,
    state: TrainState,
    device: torch.device,
    world: World = SINGLE_PROCESS,
    evaluate: Callable[[int], dict[str, Any]] | None = None,
    on_log: Callable[[int, dict[str, Any]], None] = lambda step, record: None,
) -> TrainState:
    """Train from ``state.step`` to ``config.total``; after the last step log, evaluate and save.

    Args:
        logger: writes metrics and checkpoints; called on the main process alone.
        evaluate: returns the metrics of the step that it is given.
        on_log: called on every rank with the step and its record of metrics.

    Returns:
        ``state``, brought up to date.

    Raises:
        Diverged: a loss, gradient or weight was not finite; it was not saved.
        Interrupted: a signal asked to stop; everything was saved.
    """
    loop = _Loop(task, batches, config, logger, state, device, world, evaluate, on_log)
    with StopSignals() as signals:
        loop.run(signals)
    return state


@dataclass
class _Loop:
    """One call of ``train``: its arguments, and what it keeps track of."""

    task: Task
    batches: Batches
    config: LoopConfig
    logger: RunLogger
    state: TrainState
    device: torch.device
    world: World
    evaluate: Callable[[int], dict[str, Any]] | None
    on_log: Callable[[int, dict[str, Any]], None]

    def __post_init__(self) -> None:
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self._meter, self._consensus = ThroughputMeter(self.state.step, self.batches), StopConsensus(self.world)
        self._saved_at = time.monotonic()

    def run(self, signals: StopSignals) -> None:
        """Train to the end. Raises what ``train`` raises."""
        state, config = self.state, self.config
        if state.evaluation_pending and self.evaluate:
            self._evaluate(signals)
            self._save_or_stop(signals)
        state.evaluation_pending = False  # also where evaluation was switched off since
        batches = self.batches.iter_from_step(state.step, config.total)
        while (batch := self._wait_for_batch(batches, signals)) is not None:
            self._bad_step = _train_step(self.task, batch, state, self._bad_step)
            if config.is_due(state.step, config.log_every):
                _raise_if_diverged(self._bad_step, self.logger, config)
                rates = self._meter.compute_rates(state.step, config)
                self._write(_pop_log_metrics(self.task, state, self.world) | rates)
            if self.evaluate and config.is_due(state.step, config.evaluate_every):
                self._evaluate(signals)
            self._save_or_stop(signals)
        self._consensus.close()

    def _wait_for_batch(self, batches: Iterator[Any], signals: StopSignals) -> Any:
        """Return the next batch, or None after the last. A signal meanwhile ends the run.

        Other ranks may have their batch already and be in the next step. This one waits a little for its own, so that
        all can stop after that step; if there is none, the main rank saves what the step before left.
        """
        grace_seconds = 0.0 if self.world.size == 1 else STOP_GRACE_SECONDS
        try:
            with signals.interruptible(grace_seconds):
                return next(batches, None)
        except StopRequested:
            if self.world.size == 1:
                self._save()
            elif self.world.is_main:
                self._check_weights()
                self._save_state()
            raise self._make_interrupted(signals.received) from None

    def _evaluate(self, signals: StopSignals) -> None:
        """Evaluate. A signal meanwhile ends it, to be done on resume; with several ranks it is finished first."""
        assert self.evaluate is not None
        self._check_weights()
        try:
            with signals.interruptible() if self.world.size == 1 else nullcontext():
                metrics = self.evaluate(self.state.step)
        except StopRequested:
            self.state.evaluation_pending = True
            return
        self.state.evaluation_pending = False
        self.state.eval_metrics.update(metrics)
        self._write(metrics)
        release_freed_memory()
        self._meter.reset(self.state.step)

    def _save_or_stop(self, signals: StopSignals) -> None:
        """Save where it is due, or because a signal asks all ranks to stop."""
        state, config = self.state, self.config
        stopping = self._consensus.all_reduce_max(signals.received or 0)
        late = config.checkpoint_minutes and time.monotonic() - self._saved_at >= 60 * config.checkpoint_minutes
        if config.is_due(state.step, config.checkpoint_every) or late or stopping:
            self._save()
        if stopping and (state.step < config.total or state.evaluation_pending):
            self._consensus.close()  # a launcher kills all as soon as one process has ended: not before all is saved
            raise self._make_interrupted(stopping)

    def _save(self) -> None:
        self._check_weights()
        _reduce_sums(self.state, self.world)
        if self.world.is_main:
            self._save_state()
        self._saved_at = time.monotonic()

    def _save_state(self) -> None:
        self.logger.save(self.state.step, *snapshot_state(self.task, self.state))

    def _check_weights(self) -> None:
        """Raise Diverged if a loss or gradient so far was not finite, or a weight is not after the last step."""
        bad_step = record_nonfinite(self._bad_step, self.state.step - 1, _list_parameters(self.task))
        _raise_if_diverged(bad_step, self.logger, self.config)

    def _write(self, metrics: dict[str, Any]) -> None:
        step = self.state.step
        record = {"step": step, "epoch": round(step / self.config.steps_per_epoch, 4), **metrics}
        if self.world.is_main:
            self.logger.write_metrics(record)
        self.on_log(step, record)

    def _make_interrupted(self, signum: int | None) -> Interrupted:
        step, config = self.state.step, self.config
        signum = signum or signal.SIGINT
        what = f"{signal.Signals(signum).name} after step {step} of {config.total}; everything is saved."
        return Interrupted(what, f"Resume with: {config.resume_command}", signum)


def _train_step(task: Task, batch: Any, state: TrainState, bad_step: torch.Tensor) -> torch.Tensor:
    """Train on one batch; nothing waits for the device. Returns ``bad_step`` as ``record_nonfinite`` does."""
    for group in task.optimizer.param_groups:
        group["lr"] = task.get_learning_rate(state.step)
    losses = task.compute_loss(batch, state.step)
    losses["loss"].backward()
    checked = losses["loss"].detach(), *(p.grad for p in _list_parameters(task))
    bad_step = record_nonfinite(bad_step, state.step, checked)
    task.optimizer.step()
    task.optimizer.zero_grad(set_to_none=True)
    task.after_step(state.step)
    for name, value in losses.items():
        value = value.detach()
        state.sums[name] = state.sums[name] + value if name in state.sums else value.clone()
    state.steps_since_log += 1
    state.step += 1
    return bad_step


def snapshot_state(task: Task, state: TrainState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return everything needed to resume: tensors of modules, optimiser and running sums; and the header."""
    tensors = {f"state.{name}": t for name, t in task.model.state_dict().items()}
    tensors |= {f"optim.{name}": t for name, t in checkpoint.flatten_optimizer_state(task.optimizer).items()}
    tensors |= {f"sums.{name}": t for name, t in state.sums.items()}
    header = {"step": state.step, "since": state.steps_since_log, "facts": state.eval_metrics}
    return tensors, header | ({"evaluation_pending": True} if state.evaluation_pending else {})


def restore_state(task: Task, tensors: dict[str, torch.Tensor], header: dict[str, Any], where: str) -> TrainState:
    """Load what ``snapshot_state`` returned. Raises BrokenCheckpoint, before anything is loaded, if networks differ."""

    def select(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    saved, expected = select("state."), task.model.state_dict()
    common = saved.keys() & expected.keys()
    wrong = sorted(saved.keys() ^ expected.keys())
    wrong += sorted(name for name in common if saved[name].shape != expected[name].shape)
    if wrong:
        raise checkpoint.BrokenCheckpoint(
            f"{where} is of another architecture: {len(wrong)} tensors differ, among them {wrong[0]}.",
            "Resume with the configuration that wrote it, or use --init-from to start from its weights.",
        )
    task.model.load_state_dict(saved)
    checkpoint.load_optimizer_state(task.optimizer, select("optim."))
    device = next(iter(expected.values())).device
    sums = {name: t.to(device) for name, t in select("sums.").items()}
    pending = header.get("evaluation_pending", False)
    return TrainState(header["step"], sums, header["since"], header["facts"], pending)


class ThroughputMeter:
    """Images per second, and the fraction of time spent waiting for data, since the last log line."""

    def __init__(self, step: int, batches: Batches) -> None:
        self._batches = batches
        self.reset(step)

    def reset(self, step: int) -> None:
        self._step, self._start, self._start_data_wait = step, time.perf_counter(), self._batches.data_wait_seconds

    def compute_rates(self, step: int, config: LoopConfig) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        speed = (step - self._step) / seconds
        rates = {
            "images_per_s": float(f"{speed * config.batch_size:.4g}"),
            "data_wait": round((self._batches.data_wait_seconds - self._start_data_wait) / seconds, 4),
            "eta_s": round((config.total - step) / speed, 1),
        }
        self.reset(step)
        return rates


@torch.no_grad()
def record_nonfinite(bad_step: torch.Tensor, step: int, tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """Return ``bad_step``, or ``step`` where it is -1 and a tensor holds a NaN or an infinity; all on the device.

    Uses the kernel of PyTorch's gradient scaler: one pass over all tensors, and exact where a sum of squares would
    overflow. It scales them as well, here by 1.
    """
    found = torch.zeros((), device=bad_step.device)
    there = [tensor for tensor in tensors if tensor is not None]
    torch._amp_foreach_non_finite_check_and_unscale_(there, found, torch.ones_like(found))
    return torch.where((bad_step < 0) & (found > 0), step, bad_step)


def _list_parameters(task: Task) -> list[nn.Parameter]:
    return [p for group in task.optimizer.param_groups for p in group["params"]]


def _raise_if_diverged(bad_step: torch.Tensor, logger: RunLogger, config: LoopConfig) -> None:
    step = int(bad_step.item())
    if step < 0:
        return
    start = "No checkpoint was written yet: start again with"
    if (last := logger.get_last_checkpoint()) is not None:
        start = f"The last good checkpoint is {last}: resume from it with --resume and"
    fix = f"{start} a lower learning rate (--set {config.lr_key}=...) or --set runtime.precision=fp32."
    raise Diverged(f"The loss, a gradient or a weight was not finite at step {step}.", fix)


def _reduce_sums(state: TrainState, world: World) -> None:
    """Replace this rank's sums by their mean over ranks, which have equally many rows of every batch."""
    if world.size > 1 and state.sums:
        with torch.no_grad():
            shared = world.all_reduce_mean(torch.stack(list(state.sums.values())))
        state.sums = dict(zip(state.sums, shared.unbind(), strict=True))


def _pop_log_metrics(task: Task, state: TrainState, world: World) -> dict[str, float]:
    """Return means of the losses since the last log line, the learning rate and the task's metrics; wait for them."""
    _reduce_sums(state, world)
    means = {name: value.item() / state.steps_since_log for name, value in state.sums.items()}
    state.sums, state.steps_since_log = {}, 0
    return means | {"lr": task.optimizer.param_groups[0]["lr"]} | task.compute_metrics(state.step - 1)
