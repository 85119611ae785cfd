"""Timing of the training step: its parts one by one, and the real loop with the real loader."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from relicctl.config.pretrain import PretrainConfig
from relicctl.core.loop import LoopConfig, TrainState, record_nonfinite, train
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImages
from relicctl.data.loader import LoaderConfig, ViewLoader
from relicctl.data.sampler import Sampler
from relicctl.data.views import Batch
from relicctl.pretraining.data import build_view_plan
from relicctl.pretraining.task import PretrainTask, Schedule

NETWORKS = ("networks forward", "networks backward")
Spread = dict[str, float]  # median, min, max and the number of values, ``runs``


@dataclass(frozen=True)
class Workload:
    """A config, the images it trains on and the device; measured with another batch (``with_batch_size``)."""

    config: PretrainConfig
    source: ImageDataset
    schedule: Schedule
    device: torch.device
    precision: str
    cache: str = "none"
    workers: int = 0

    def with_batch_size(self, size: int) -> Workload:
        """Return this with another batch, and fewer negatives where that batch has too few for the config's."""
        optim, loss = self.config.optim, self.config.loss
        microbatch = optim.microbatch if optim.microbatch and size % optim.microbatch == 0 else None
        negatives = loss.negatives if loss.negatives == "all" else min(loss.negatives, size - 1)
        sections = {
            "optim": optim.model_copy(update={"batch_size": size, "microbatch": microbatch}),
            "loss": loss.model_copy(update={"negatives": negatives}),
        }
        config = self.config.model_copy(update=sections)
        return replace(self, config=config, schedule=Schedule(config, self.schedule.steps_per_epoch))

    def build(self, workers: int) -> tuple[PretrainTask, ViewLoader]:
        """Return the training task, and the loader of its batches."""
        config, source, device = self.config, self.source, self.device
        classes = len(source.classes)
        task = PretrainTask(config, self.schedule, classes=classes, device=device, precision=self.precision)
        sampler = Sampler(config.seed, len(source), config.optim.batch_size)
        loading = LoaderConfig(config.seed, device, cache=self.cache, workers=workers)
        bad_images = BadImages(len(source), config.data.max_corrupt_fraction)
        return task, ViewLoader(source, sampler, build_view_plan(config), loading, bad_images)


def train_one_step(task: PretrainTask, batch: Batch, step: int) -> torch.Tensor:
    """Train on a batch, at the optimiser's learning rate; return the loss before."""
    loss = task.compute_loss(batch, step)["loss"]
    loss.backward()
    task.optimizer.step()
    task.optimizer.zero_grad(set_to_none=True)
    task.after_step(step)
    return loss


def measure_step_parts(
    task: PretrainTask, feed: ViewLoader, repeats: int, log_every: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of each part of a step (lists over ``repeats`` steps), without the wait for data.

    The work is that of the loop, and keeps a GPU as busy; the first step is not counted. Logging, for which the loop
    waits, is timed after all steps, and its cost is spread over the steps between two log lines.
    """
    bad_step = torch.full((), -1, dtype=torch.int64, device=device)
    parameters = [p for group in task.optimizer.param_groups for p in group["params"]]
    laps, data_wait = LapTimer(device), feed.data_wait_seconds
    for step, batch in enumerate(feed.iter_from_step(0, repeats + 1)):
        laps.record_lap("augmentation", excluded=feed.data_wait_seconds - data_wait)
        outputs, target = task.embed(batch)
        laps.record_lap("networks forward")
        ends = outputs.detach().requires_grad_()
        losses = task.compute_objective(ends, target, batch.labels, step)
        losses["loss"].backward()
        laps.record_lap("loss")
        outputs.backward(ends.grad)
        laps.record_lap("networks backward")
        bad_step = record_nonfinite(bad_step, step, [losses["loss"].detach(), *(p.grad for p in parameters)])
        laps.record_lap("check")
        task.optimizer.step()
        task.optimizer.zero_grad(set_to_none=True)
        laps.record_lap("optimiser")
        task.after_step(step)
        laps.record_lap("ema")
        data_wait = feed.data_wait_seconds
    for _ in range(repeats + 1):
        task.compute_metrics(step)
        bad_step.item()
        {name: value.item() for name, value in losses.items()}
        laps.record_lap("logging")
    parts = {name: seconds[1:] for name, seconds in laps.get_seconds().items()}
    parts["logging"] = [seconds / log_every for seconds in parts["logging"]]
    return parts


def summarize_step(parts: dict[str, list[float]], batch: int) -> dict[str, Any]:
    """Return images per second of the step alone (spread), and the fractions of its parts outside the networks."""
    whole = [sum(step) for step in zip(*parts.values(), strict=True)]
    usual = {name: statistics.median(seconds) for name, seconds in parts.items()}
    total = sum(usual.values())
    fractions = {name: round(seconds / total, 5) for name, seconds in usual.items() if name not in NETWORKS}
    return {
        "step_images_per_s": summarize_timings([batch / seconds for seconds in whole]),
        "outside_networks": round(sum(fractions.values()), 5),
        "outside_parts": fractions,
        "step_seconds": {name: summarize_timings(seconds) for name, seconds in parts.items()},
    }


def measure_train_loop(
    task: PretrainTask, feed: ViewLoader, batch: int, repeats: int, window: int, device: torch.device
) -> tuple[Spread, Spread]:
    """Run the training loop; return images per second and the fraction of data wait (spreads over windows of steps)."""
    records: list[dict[str, Any]] = []  # the log lines; no checkpoint is saved
    logger: Any = SimpleNamespace(write_metrics=records.append, save=lambda *_: None, get_last_checkpoint=lambda: None)
    config = LoopConfig((repeats + 1) * window, steps_per_epoch=sys.maxsize, batch_size=batch, log_every=window)
    train(task, feed, config, logger, state=TrainState(), device=device)
    speed, wait = ([record[name] for record in records[1:]] for name in ("images_per_s", "data_wait"))
    return summarize_timings(speed), summarize_timings(wait)


class LapTimer:
    """Seconds between laps, by name; a GPU is timed by its events, so that nothing has to wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._laps: list[tuple[str, Any, Any, float]] = []
        self._last = self._record_time()

    def record_lap(self, name: str, excluded: float = 0.0) -> None:
        """Record the time since the last lap, less ``excluded`` seconds."""
        now = self._record_time()
        self._laps.append((name, self._last, now, excluded))
        self._last = now

    def get_seconds(self) -> dict[str, list[float]]:
        """Return the seconds of all laps so far; waits for a GPU."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds_by_name: dict[str, list[float]] = {}
        for name, since, now, excluded in self._laps:
            taken = since.elapsed_time(now) / 1000 if self._cuda else now - since
            seconds_by_name.setdefault(name, []).append(max(0.0, taken - excluded))
        return seconds_by_name

    def _record_time(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def measure_cpu_seconds(function: Callable[[], object], repeats: int) -> list[float]:
    """Return the CPU seconds of this process for each of ``repeats`` calls, after one that is not counted.

    CPU time does not depend on what else runs, and does not include waiting for a disk.
    """
    function()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return seconds


def summarize_timings(values: Sequence[float]) -> Spread:
    """Return median, minimum and maximum, four digits each, and the number of values."""
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in spread.items()} | {"runs": len(values)}
