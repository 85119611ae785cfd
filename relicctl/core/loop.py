"""The one training loop: pretraining, mask networks, linear evaluation and fine-tuning all run through ``train``.

The loop knows steps, not models: a ``Task`` computes the loss of a batch. Losses stay on the device and are read back
only to log, evaluate or save, so an ordinary step waits for nothing.
"""

from __future__ import annotations

import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn

from relicctl.core import checkpoint
from relicctl.core.distributed import SINGLE_PROCESS, StopConsensus, World
from relicctl.core.hardware import release_freed_memory
from relicctl.errors import Diverged, Interrupted


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
    bad_step = torch.full((), -1, dtype=torch.int64, device=device)
    meter, consensus, saved_at = ThroughputMeter(state.step, batches), StopConsensus(world), time.monotonic()

    def write(metrics: dict[str, Any]) -> None:
        record = {"step": state.step, "epoch": round(state.step / config.steps_per_epoch, 4), **metrics}
        if world.is_main:
            logger.write_metrics(record)
        on_log(state.step, record)

    with StopSignals() as signals:
        for batch in batches.iter_from_step(state.step, config.total):
            bad_step = _train_step(task, batch, state, bad_step)
            if config.is_due(state.step, config.log_every):
                _raise_if_diverged(bad_step, logger, config)
                write(_pop_log_metrics(task, state, world) | meter.compute_rates(state.step, config))
            if evaluate and config.is_due(state.step, config.evaluate_every):
                _check_weights(task, state, bad_step, logger, config)
                metrics = evaluate(state.step)
                state.eval_metrics.update(metrics)
                write(metrics)
                release_freed_memory()
                meter.reset(state.step)
            stopping = consensus.all_reduce_max(signals.received or 0)
            late = config.checkpoint_minutes and time.monotonic() - saved_at >= 60 * config.checkpoint_minutes
            if config.is_due(state.step, config.checkpoint_every) or late or stopping:
                _check_weights(task, state, bad_step, logger, config)
                _reduce_sums(state, world)
                if world.is_main:
                    logger.save(state.step, *snapshot_state(task, state))
                saved_at = time.monotonic()
            if stopping and state.step < config.total:
                consensus.close()  # a launcher kills all as soon as one process has ended: not before all is saved
                what = f"Stopped by a signal after step {state.step} of {config.total}; everything is saved."
                raise Interrupted(what, f"Resume with: {config.resume_command}", stopping)
    consensus.close()
    return state


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
    return tensors, {"step": state.step, "since": state.steps_since_log, "facts": state.eval_metrics}


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
    return TrainState(header["step"], sums, header["since"], header["facts"])


class StopSignals:
    """Turns SIGINT and SIGTERM into a request to stop after the step; a second signal ends the process at once.

    A scheduler may send SIGTERM to a job's processes more than once: two within REPEAT_SECONDS count as one. torchrun
    forwards to its workers what the scheduler has sent to them already: under it no second signal counts, and it kills
    workers that take too long itself.
    """

    REPEAT_SECONDS = 5.0

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._previous_handlers = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received == number == signal.SIGTERM and now - self._received_at < self.REPEAT_SECONDS:
            return
        if self.received is not None:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                return
            os._exit(128 + number)
        self.received, self._received_at = number, now


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


def _check_weights(
    task: Task, state: TrainState, bad_step: torch.Tensor, logger: RunLogger, config: LoopConfig
) -> None:
    """Raise Diverged if a loss or gradient so far was not finite, or a weight is not after the last step."""
    _raise_if_diverged(record_nonfinite(bad_step, state.step - 1, _list_parameters(task)), logger, config)


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
