"""THE training loop: pretraining, mask networks, linear evaluation and fine-tuning all run through ``train``.

The loop knows steps, not models: a ``Task`` says what the loss of a batch is. Losses stay on the device;
numbers are read back only in the logging branch, so an ordinary step waits for nothing.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn

from relicctl.core import checkpoint
from relicctl.core.distributed import Agreement, World
from relicctl.core.hardware import return_freed_memory
from relicctl.errors import Diverged, Interrupted


class Batches(Protocol):
    """The data of a run: batches from any step on, and the seconds spent waiting for them."""

    @property
    def waited(self) -> float: ...

    def from_step(self, step: int, stop: int) -> Iterator[Any]: ...


class Task(Protocol):
    """What is trained.

    ``state`` holds every module whose tensors make up the run. ``loss`` returns scalars, among them ``loss``,
    which is minimised; the rest is logged as means. ``learning_rate`` and ``after_step`` are functions of the step.
    """

    optimizer: torch.optim.Optimizer

    @property
    def state(self) -> nn.Module: ...

    def loss(self, batch: Any, step: int) -> dict[str, torch.Tensor]: ...

    def learning_rate(self, step: int) -> float: ...

    def after_step(self, step: int) -> None: ...

    def describe(self, step: int) -> dict[str, float]:
        """More figures for the log line of this step; may wait for the device."""
        ...


class Journal(Protocol):
    """Where a run leaves its traces; only the main process's writes."""

    def metrics(self, record: dict[str, Any]) -> None: ...

    def save(self, step: int, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None: ...

    def last_checkpoint(self) -> str | None: ...


@dataclass(frozen=True)
class Plan:
    """When the loop does what; steps are counted from 0, and ``total`` is where the run ends."""

    total: int
    steps_per_epoch: int
    batch_size: int
    log_every: int = 50
    evaluate_every: int = 0
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = None
    resume_command: str = ""
    rate_key: str = "optim.base_lr"  # which to lower where a training diverges


@dataclass
class Progress:
    """What a run remembers besides its tensors: the next step, sums since the last log line, facts found so far."""

    step: int = 0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    since: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def train(
    task: Task,
    batches: Batches,
    plan: Plan,
    journal: Journal,
    *,
    progress: Progress,
    device: torch.device,
    world: World | None = None,
    evaluate: Callable[[int], dict[str, Any]] | None = None,
    show: Callable[[int, dict[str, Any]], None] = lambda step, record: None,
) -> Progress:
    """Train from ``progress.step`` to ``plan.total``; leaves a checkpoint at the end.

    Raises Diverged when the loss or a gradient was not finite, Interrupted after saving when a signal asked to stop.
    """
    world = world or World()
    parameters = [p for group in task.optimizer.param_groups for p in group["params"]]
    bad_step = torch.full((), -1, dtype=torch.int64, device=device)
    clock = Clock(progress.step, batches)
    saved_at = time.monotonic()

    def refuse_divergence() -> None:
        """Of losses, gradients and, since the last step may have spoilt them, weights."""
        _refuse_divergence(_note_if_not_finite(bad_step, progress.step - 1, parameters), journal, plan)

    def save() -> None:
        refuse_divergence()
        _average(progress, world)
        if world.is_main:
            journal.save(progress.step, *snapshot(task, progress))

    agreement = Agreement(world)
    with StopSignals() as signals:
        for batch in batches.from_step(progress.step, plan.total):
            step = progress.step
            learning_rate = task.learning_rate(step)
            for group in task.optimizer.param_groups:
                group["lr"] = learning_rate
            losses = task.loss(batch, step)
            losses["loss"].backward()
            bad_step = note_divergence(bad_step, step, losses["loss"], parameters)
            task.optimizer.step()
            task.optimizer.zero_grad(set_to_none=True)
            task.after_step(step)
            _accumulate(progress, losses)
            progress.step = step + 1

            last = progress.step == plan.total
            if progress.step % plan.log_every == 0 or last:
                _refuse_divergence(bad_step, journal, plan)
                _average(progress, world)
                record = {
                    "step": progress.step,
                    "epoch": round(progress.step / plan.steps_per_epoch, 4),
                    **_means(progress),
                    "lr": learning_rate,
                    **task.describe(step),
                    **clock.rates(progress.step, plan),
                }
                if world.is_main:
                    journal.metrics(record)
                show(progress.step, record)
            if evaluate and (last or (plan.evaluate_every and progress.step % plan.evaluate_every == 0)):
                refuse_divergence()
                figures = evaluate(progress.step)
                progress.facts.update(figures)
                if world.is_main:
                    record = {"step": progress.step, "epoch": round(progress.step / plan.steps_per_epoch, 4)}
                    journal.metrics(record | figures)
                show(progress.step, figures)
                return_freed_memory()
                clock.restart(progress.step)

            stopping = agreement.largest(signals.received or 0)
            minutes = (time.monotonic() - saved_at) / 60
            due = (plan.checkpoint_every and progress.step % plan.checkpoint_every == 0) or (
                plan.checkpoint_minutes and minutes >= plan.checkpoint_minutes
            )
            if last or due or stopping:
                save()
                saved_at = time.monotonic()
            if stopping and not last:
                agreement.close()  # a launcher kills the rest as soon as one process has ended: not before all is saved
                raise Interrupted(
                    f"Stopped by a signal after step {progress.step} of {plan.total}; everything is saved.",
                    f"Go on with: {plan.resume_command}",
                    stopping,
                )
    agreement.close()
    return progress


def snapshot(task: Task, progress: Progress) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Everything needed to go on: tensors of the modules, the optimiser and the running sums; and the header."""
    tensors = {f"state.{name}": t for name, t in task.state.state_dict().items()}
    tensors |= {f"optim.{name}": t for name, t in checkpoint.optimizer_tensors(task.optimizer).items()}
    tensors |= {f"sums.{name}": t for name, t in progress.sums.items()}
    return tensors, {"step": progress.step, "since": progress.since, "facts": progress.facts}


def restore(task: Task, tensors: dict[str, torch.Tensor], header: dict[str, Any], where: str) -> Progress:
    """Inverse of ``snapshot``. Raises BrokenCheckpoint, before anything is loaded, if the networks differ."""
    saved = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    own = task.state.state_dict()
    wrong = sorted(saved.keys() ^ own.keys()) + sorted(
        name for name in saved.keys() & own.keys() if saved[name].shape != own[name].shape
    )
    if wrong:
        raise checkpoint.BrokenCheckpoint(
            f"{where} is of another architecture: {len(wrong)} tensors differ, {wrong[0]} among them.",
            "Resume with the configuration that wrote it, or use --init-from to start from its weights.",
        )
    task.state.load_state_dict(saved)
    checkpoint.restore_optimizer(
        task.optimizer,
        {name.removeprefix("optim."): t for name, t in tensors.items() if name.startswith("optim.")},
    )
    device = next(iter(own.values())).device
    sums = {name.removeprefix("sums."): t.to(device) for name, t in tensors.items() if name.startswith("sums.")}
    return Progress(header["step"], sums, header["since"], header["facts"])


class StopSignals:
    """SIGINT and SIGTERM ask the loop to stop after its step; a second one ends the process at once.

    A scheduler may send SIGTERM to a job's processes more than once: two within TWICE_SECONDS are one. torchrun hands
    on to its workers what a scheduler has sent to them already: under it no second one counts, and it kills them itself
    if they take longer than its patience.
    """

    TWICE_SECONDS = 5.0

    def __init__(self) -> None:
        self.received: int | None = None
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received == number == signal.SIGTERM and now - self._when < self.TWICE_SECONDS:
            return
        if self.received is not None and "TORCHELASTIC_RUN_ID" in os.environ:
            return
        if self.received is not None:
            os._exit(128 + number)
        self.received, self._when = number, now


class Clock:
    """Images per second, and the share of time spent waiting for data, since the last log line."""

    def __init__(self, step: int, batches: Batches) -> None:
        self._batches = batches
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._start, self._waited = step, time.perf_counter(), self._batches.waited

    def rates(self, step: int, plan: Plan) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        speed = (step - self._step) / seconds
        rates = {
            "images_per_s": float(f"{speed * plan.batch_size:.4g}"),
            "data_wait": round((self._batches.waited - self._waited) / seconds, 4),
            "eta_s": round((plan.total - step) / speed, 1),
        }
        self.restart(step)
        return rates


def note_divergence(
    bad_step: torch.Tensor, step: int, loss: torch.Tensor, parameters: list[nn.Parameter]
) -> torch.Tensor:
    """Remember, on the device, the first step whose loss or any gradient is not finite."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return _note_if_not_finite(bad_step, step, [loss.detach(), *gradients])


@torch.no_grad()
def _note_if_not_finite(bad_step: torch.Tensor, step: int, tensors: list[Any]) -> torch.Tensor:
    """``bad_step``, or ``step`` where it was unset and a tensor holds a NaN or an infinity.

    By the kernel with which PyTorch's gradient scaler checks: one pass over all, and exact where a sum of squares would
    overflow. It scales them as well, here by 1.
    """
    found = torch.zeros((), device=bad_step.device)
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, torch.ones_like(found))
    fine = found == 0
    return torch.where((bad_step < 0) & ~fine, step, bad_step)


def _refuse_divergence(bad_step: torch.Tensor, journal: Journal, plan: Plan) -> None:
    step = int(bad_step.item())
    if step < 0:
        return
    last = journal.last_checkpoint()
    lower = f"--set {plan.rate_key}=... lower, or --set runtime.precision=fp32"
    raise Diverged(
        f"The loss, a gradient or a weight was not finite at step {step}.",
        f"The last good checkpoint is {last}: go on from it by --resume with {lower}."
        if last
        else f"No checkpoint was written yet: start again with {lower}.",
    )


def _accumulate(progress: Progress, losses: dict[str, torch.Tensor]) -> None:
    for name, value in losses.items():
        value = value.detach()
        progress.sums[name] = progress.sums[name] + value if name in progress.sums else value.clone()
    progress.since += 1


def _average(progress: Progress, world: World) -> None:
    """The sums over all processes' rows in place of this one's, which is the mean: every process has as many."""
    if world.size > 1 and progress.sums:
        with torch.no_grad():
            shared = world.mean(torch.stack(list(progress.sums.values())))
        progress.sums = dict(zip(progress.sums, shared.unbind(), strict=True))


def _means(progress: Progress) -> dict[str, float]:
    means = {name: value.item() / progress.since for name, value in progress.sums.items()}
    progress.sums, progress.since = {}, 0
    return means
