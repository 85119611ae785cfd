"""THE training loop: pretraining, mask networks, linear evaluation and fine-tuning all run through ``train``.

The loop knows steps, not models: a ``Task`` says what the loss of a batch is. Losses stay on the device;
numbers are read back only in the logging branch, so an ordinary step waits for nothing.
"""

from __future__ import annotations

import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
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
    """Where a run leaves its traces; only the main process's writes."""

    def write_metrics(self, record: dict[str, Any]) -> None: ...

    def save(self, step: int, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None: ...

    def get_last_checkpoint(self) -> str | None: ...


@dataclass(frozen=True)
class LoopConfig:
    """When the loop does what; steps are counted from 0, and ``total`` is where the run ends."""

    total: int
    steps_per_epoch: int
    batch_size: int
    log_every: int = 50
    evaluate_every: int = 0
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = None
    resume_command: str = ""
    lr_key: str = "optim.base_lr"  # which to lower where a training diverges

    @classmethod
    def from_sections(cls, checkpoint: Any, runtime: Any, **others: Any) -> LoopConfig:
        """With what a configuration's sections ``checkpoint`` and ``runtime`` say, and ``others`` as they are."""
        return cls(
            log_every=runtime.log_every,
            checkpoint_every=checkpoint.every_steps,
            checkpoint_minutes=checkpoint.every_minutes,
            **others,
        )


@dataclass
class TrainState:
    """What a run remembers besides its tensors: the next step, sums since the last log line, facts found so far."""

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
    """Train from ``state.step`` to ``config.total``; leaves a checkpoint at the end.

    Raises Diverged when the loss or a gradient was not finite, Interrupted after saving when a signal asked to stop.
    """
    parameters = [p for group in task.optimizer.param_groups for p in group["params"]]
    bad_step = torch.full((), -1, dtype=torch.int64, device=device)
    meter = ThroughputMeter(state.step, batches)
    saved_at = time.monotonic()

    def check_divergence() -> None:
        """Of losses, gradients and, since the last step may have spoilt them, weights."""
        _raise_if_diverged(_update_bad_step(bad_step, state.step - 1, parameters), logger, config)

    def save_state() -> None:
        check_divergence()
        _reduce_sums(state, world)
        if world.is_main:
            logger.save(state.step, *snapshot_state(task, state))

    consensus = StopConsensus(world)
    with StopSignals() as signals:
        for batch in batches.iter_from_step(state.step, config.total):
            step = state.step
            learning_rate = task.get_learning_rate(step)
            for group in task.optimizer.param_groups:
                group["lr"] = learning_rate
            losses = task.compute_loss(batch, step)
            losses["loss"].backward()
            bad_step = record_nonfinite(bad_step, step, losses["loss"], parameters)
            task.optimizer.step()
            task.optimizer.zero_grad(set_to_none=True)
            task.after_step(step)
            _accumulate_losses(state, losses)
            state.step = step + 1

            last = state.step == config.total
            if state.step % config.log_every == 0 or last:
                _raise_if_diverged(bad_step, logger, config)
                _reduce_sums(state, world)
                record = {
                    "step": state.step,
                    "epoch": round(state.step / config.steps_per_epoch, 4),
                    **_pop_means(state),
                    "lr": learning_rate,
                    **task.compute_metrics(step),
                    **meter.compute_rates(state.step, config),
                }
                if world.is_main:
                    logger.write_metrics(record)
                on_log(state.step, record)
            if evaluate and (last or (config.evaluate_every and state.step % config.evaluate_every == 0)):
                check_divergence()
                figures = evaluate(state.step)
                state.eval_metrics.update(figures)
                if world.is_main:
                    record = {"step": state.step, "epoch": round(state.step / config.steps_per_epoch, 4)}
                    logger.write_metrics(record | figures)
                on_log(state.step, figures)
                release_freed_memory()
                meter.reset(state.step)

            stopping = consensus.all_reduce_max(signals.received or 0)
            minutes = (time.monotonic() - saved_at) / 60
            due = (config.checkpoint_every and state.step % config.checkpoint_every == 0) or (
                config.checkpoint_minutes and minutes >= config.checkpoint_minutes
            )
            if last or due or stopping:
                save_state()
                saved_at = time.monotonic()
            if stopping and not last:
                consensus.close()  # a launcher kills the rest as soon as one process has ended: not before all is saved
                raise Interrupted(
                    f"Stopped by a signal after step {state.step} of {config.total}; everything is saved.",
                    f"Go on with: {config.resume_command}",
                    stopping,
                )
    consensus.close()
    return state


def snapshot_state(task: Task, state: TrainState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Everything needed to go on: tensors of the modules, the optimiser and the running sums; and the header."""
    tensors = {f"state.{name}": t for name, t in task.model.state_dict().items()}
    tensors |= {f"optim.{name}": t for name, t in checkpoint.flatten_optimizer_state(task.optimizer).items()}
    tensors |= {f"sums.{name}": t for name, t in state.sums.items()}
    return tensors, {"step": state.step, "since": state.steps_since_log, "facts": state.eval_metrics}


def restore_state(task: Task, tensors: dict[str, torch.Tensor], header: dict[str, Any], where: str) -> TrainState:
    """Inverse of ``snapshot``. Raises BrokenCheckpoint, before anything is loaded, if the networks differ."""
    saved = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    expected = task.model.state_dict()
    wrong = sorted(saved.keys() ^ expected.keys()) + sorted(
        name for name in saved.keys() & expected.keys() if saved[name].shape != expected[name].shape
    )
    if wrong:
        raise checkpoint.BrokenCheckpoint(
            f"{where} is of another architecture: {len(wrong)} tensors differ, {wrong[0]} among them.",
            "Resume with the configuration that wrote it, or use --init-from to start from its weights.",
        )
    task.model.load_state_dict(saved)
    checkpoint.load_optimizer_state(
        task.optimizer,
        {name.removeprefix("optim."): t for name, t in tensors.items() if name.startswith("optim.")},
    )
    device = next(iter(expected.values())).device
    sums = {name.removeprefix("sums."): t.to(device) for name, t in tensors.items() if name.startswith("sums.")}
    return TrainState(header["step"], sums, header["since"], header["facts"])


class StopSignals:
    """SIGINT and SIGTERM ask the loop to stop after its step; a second one ends the process at once.

    A scheduler may send SIGTERM to a job's processes more than once: two within REPEAT_SECONDS are one. torchrun hands
    on to its workers what a scheduler has sent to them already: under it no second one counts, and it kills them itself
    if they take longer than its patience.
    """

    REPEAT_SECONDS = 5.0

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received == number == signal.SIGTERM and now - self._received_at < self.REPEAT_SECONDS:
            return
        if self.received is not None and "TORCHELASTIC_RUN_ID" in os.environ:
            return
        if self.received is not None:
            os._exit(128 + number)
        self.received, self._received_at = number, now


class ThroughputMeter:
    """Images per second, and the share of time spent waiting for data, since the last log line."""

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


def record_nonfinite(
    bad_step: torch.Tensor, step: int, loss: torch.Tensor, parameters: list[nn.Parameter]
) -> torch.Tensor:
    """Remember, on the device, the first step whose loss or any gradient is not finite."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return _update_bad_step(bad_step, step, [loss.detach(), *gradients])


@torch.no_grad()
def _update_bad_step(bad_step: torch.Tensor, step: int, tensors: list[Any]) -> torch.Tensor:
    """``bad_step``, or ``step`` where it was unset and a tensor holds a NaN or an infinity.

    By the kernel with which PyTorch's gradient scaler checks: one pass over all, and exact where a sum of squares would
    overflow. It scales them as well, here by 1.
    """
    found = torch.zeros((), device=bad_step.device)
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, torch.ones_like(found))
    is_finite = found == 0
    return torch.where((bad_step < 0) & ~is_finite, step, bad_step)


def _raise_if_diverged(bad_step: torch.Tensor, logger: RunLogger, config: LoopConfig) -> None:
    step = int(bad_step.item())
    if step < 0:
        return
    last = logger.get_last_checkpoint()
    lower = f"--set {config.lr_key}=... lower, or --set runtime.precision=fp32"
    raise Diverged(
        f"The loss, a gradient or a weight was not finite at step {step}.",
        f"The last good checkpoint is {last}: go on from it by --resume with {lower}."
        if last
        else f"No checkpoint was written yet: start again with {lower}.",
    )


def _accumulate_losses(state: TrainState, losses: dict[str, torch.Tensor]) -> None:
    for name, value in losses.items():
        value = value.detach()
        state.sums[name] = state.sums[name] + value if name in state.sums else value.clone()
    state.steps_since_log += 1


def _reduce_sums(state: TrainState, world: World) -> None:
    """The sums over all processes' rows in place of this one's, which is the mean: every process has as many."""
    if world.size > 1 and state.sums:
        with torch.no_grad():
            shared = world.all_reduce_mean(torch.stack(list(state.sums.values())))
        state.sums = dict(zip(state.sums, shared.unbind(), strict=True))


def _pop_means(state: TrainState) -> dict[str, float]:
    means = {name: value.item() / state.steps_since_log for name, value in state.sums.items()}
    state.sums, state.steps_since_log = {}, 0
    return means
