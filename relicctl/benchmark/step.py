"""The device's step: its parts one by one, and the real loop with the real feed."""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch

from relicctl.benchmark.timing import Laps, spread
from relicctl.core.loop import Plan, Progress, note_divergence, train
from relicctl.data.feed import Feed
from relicctl.pretraining import Pretraining

NETWORKS = ("networks forward", "networks backward")


def step_parts(task: Pretraining, feed: Feed, repeats: int, log_every: int, device: torch.device) -> dict[str, Any]:
    """Seconds of each part of a step (lists over ``repeats`` steps), the host's half left out.

    The same work as in the loop, and a GPU as busy; the first step is not counted. The log line, for which the loop
    waits, comes after all steps, and its cost is spread over the steps between two.
    """
    laps = Laps(device)
    bad_step = torch.full((), -1, dtype=torch.int64, device=device)
    parameters = [p for group in task.optimizer.param_groups for p in group["params"]]
    waited = feed.waited
    laps.restart()
    for step, batch in enumerate(feed.from_step(0, repeats + 1)):
        laps.lap("augmentation", without=feed.waited - waited)
        outputs, target = task.embed(batch)
        laps.lap("networks forward")
        ends = outputs.detach().requires_grad_()
        losses = task.compare(ends, target, batch.labels, step)
        losses["loss"].backward()
        laps.lap("loss")
        outputs.backward(ends.grad)
        laps.lap("networks backward")
        bad_step = note_divergence(bad_step, step, losses["loss"], parameters)
        laps.lap("check")
        task.optimizer.step()
        task.optimizer.zero_grad(set_to_none=True)
        laps.lap("optimiser")
        task.after_step(step)
        laps.lap("ema")
        waited = feed.waited
    for _ in range(repeats + 1):
        task.describe(step)
        bad_step.item()
        {name: value.item() for name, value in losses.items()}
        laps.lap("logging")
    parts = {name: seconds[1:] for name, seconds in laps.seconds().items()}
    parts["logging"] = [seconds / log_every for seconds in parts["logging"]]
    return parts


def step_figures(parts: dict[str, list[float]], batch: int) -> dict[str, Any]:
    """Images per second of the step alone (spread), and the shares of its parts that are outside the networks."""
    whole = [sum(step) for step in zip(*parts.values(), strict=True)]
    usual = {name: statistics.median(seconds) for name, seconds in parts.items()}
    total = sum(usual.values())
    shares = {name: round(seconds / total, 5) for name, seconds in usual.items() if name not in NETWORKS}
    return {
        "step_images_per_s": spread([batch / seconds for seconds in whole]),
        "outside_networks": round(sum(shares.values()), 5),
        "outside_parts": shares,
        "step_seconds": {name: spread(seconds) for name, seconds in parts.items()},
    }


def together(task: Pretraining, feed: Feed, batch: int, repeats: int, window: int, device: torch.device) -> Any:
    """The training loop as it is, fed as it is: images per second and data wait (spreads), windows of ``window``."""
    lines = _Lines()
    plan = Plan(total=(repeats + 1) * window, steps_per_epoch=sys.maxsize, batch_size=batch, log_every=window)
    train(task, feed, plan, lines, progress=Progress(), device=device)
    measured = lines.records[1:]
    return (
        spread([record["images_per_s"] for record in measured]),
        spread([record["data_wait"] for record in measured]),
    )


class _Lines:
    """A journal that keeps the log lines and saves nothing."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def metrics(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def save(self, step: int, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
        pass

    def last_checkpoint(self) -> str | None:
        return None
