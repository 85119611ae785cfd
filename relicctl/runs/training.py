"""Every training of every command: say what starts, resume from the newest checkpoint, train, show progress."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from torch import Tensor

from relicctl.config.resolve import ResolvedConfig, get_command
from relicctl.console import Console
from relicctl.core.loop import Batches, LoopConfig, Task, TrainState, restore_state, train
from relicctl.runs.distributed import RunContext, load_newest_checkpoint, select_progress_metrics
from relicctl.runs.resume import TrainingOptions, find_unfinished_run


def log_start(
    resolved: ResolvedConfig, options: TrainingOptions, context: RunContext, *, images: int, steps: int
) -> None:
    """Log what starts; for a new run also an unfinished one of the same preset, which could be resumed instead."""
    context.console.info(f"{images:,} images, {context.device}, {steps:,} steps, run folder {context.run.path}")
    if options.resume is None and options.out is None:
        command = get_command(type(resolved.config))
        if other := find_unfinished_run(resolved.preset, command):
            resume = f"relicctl {command} --resume {shlex.quote(str(other))}"
            context.console.info(f"{other} is not finished; to continue it instead: {resume}")


def restore_or_start(
    task: Task, context: RunContext, is_compatible: Callable[[dict[str, Tensor]], bool] = lambda _: True, first: int = 0
) -> TrainState:
    """Load the newest readable, compatible checkpoint into ``task`` and return its state; else that of step ``first``.

    Metrics logged after that step are removed, since they will be written again.
    """
    loaded = load_newest_checkpoint(context.run, context.world, context.console.warn, is_compatible)
    state = TrainState(first)
    if loaded is not None and loaded[2]["step"] > first:
        path, tensors, header = loaded
        state = restore_state(task, tensors, header, str(path))
        context.console.info(f"resumed from {path} at step {state.step}")
    context.run.truncate_metrics(state.step or -1)
    return state


def train_with_progress(
    task: Task,
    batches: Batches,
    config: LoopConfig,
    context: RunContext,
    state: TrainState,
    *,
    evaluate: Callable[[int], dict[str, Any]] | None = None,
    on_log: Callable[[int, dict[str, Any]], None] = lambda step, metrics: None,
) -> TrainState:
    """Call ``core.loop.train`` with a progress bar; ``on_log`` gets the metrics of every log line."""
    if state.step >= config.total:
        context.console.info(f"nothing is left to train: step {state.step} of {config.total}")
    with context.console.progress(config.total, state.step) as bar:

        def show(step: int, metrics: dict[str, Any]) -> None:
            bar.update(step, select_progress_metrics(metrics))
            on_log(step, metrics)

        return train(
            task, batches, config, context.run, state=state, device=context.device, world=context.world,
            evaluate=evaluate, on_log=show,
        )  # fmt: skip


def warn_of_late_end(max_steps: int | None, last_step: int, console: Console) -> None:
    """Warn where optim.max_steps lies after the last step of the schedule, which ends the training all the same."""
    if max_steps is not None and max_steps > last_step:
        console.warn(
            f"optim.max_steps {max_steps} only cuts a training short, and the schedule ends at step {last_step} "
            "(optim.epochs): to train longer, start another one"
        )


def resume_and_train(task: Task, batches: Batches, config: LoopConfig, context: RunContext) -> TrainState:
    """Train from the newest checkpoint of ``context.run``, or from the start, to the end."""
    return train_with_progress(task, batches, config, context, restore_or_start(task, context))
