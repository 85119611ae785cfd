"""``relicctl transfer --protocol finetune``: every rate, decay and length, chosen on validation, trained anew."""

from __future__ import annotations

import itertools
import json
import shutil
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from relicctl.commands.common import readable, worker_count
from relicctl.commands.processes import newest_checkpoint, owned
from relicctl.config.transfer import TransferConfig
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.hardware import pick_precision
from relicctl.core.loop import Plan, Progress, restore, train
from relicctl.data.augment import Photometric
from relicctl.data.feed import Feed, ViewPlan, ViewSize, choose_cache
from relicctl.data.sampler import Sampler
from relicctl.data.sources import Source
from relicctl.errors import Diverged
from relicctl.evaluation.features import EvalImages, extract
from relicctl.evaluation.finetune import FinetuneTask, Tuning
from relicctl.evaluation.labelled import Labelled
from relicctl.evaluation.look import Look
from relicctl.evaluation.metrics import measure
from relicctl.evaluation.parts import DataSet, Division
from relicctl.evaluation.protocols import Outcome, best
from relicctl.runs import RunFolder


@dataclass(frozen=True)
class Hyper:
    """What is chosen; of no ``epochs`` the training has finetune.steps."""

    rate: float
    decay: float
    epochs: int | None

    @property
    def figures(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.figures.items())


@dataclass(frozen=True)
class Tuner:
    """Fine-tunes one encoder, all processes together. Trainings leave checkpoints in ``folder`` to go on from.

    ``run``: the folder of the whole comparison, which is what goes on.
    """

    look: Look
    config: TransferConfig
    folder: Path
    run: Path
    console: Console

    def __call__(self, data: DataSet, division: Division, metric: str) -> Outcome:
        told = self.config.finetune
        grid = [Hyper(*chosen) for chosen in itertools.product(told.rates, told.decays, told.epochs or (None,))]
        tried, warnings = [], []
        for number, hyper in enumerate(grid, 1):
            self.console.note(f"fine-tuning {number} of {len(grid)}: {hyper}")
            name = "-".join(f"{figure:g}" for figure in hyper.figures.values())
            value = self._value(name, data, division.fit, hyper, metric, division.chosen_on)
            if value is None:
                warnings.append(f"{hyper} diverged and is out of the choice")
            else:
                tried.append(hyper.figures | {"value": value})
        if not tried:
            raise Diverged("Every fine-tuning diverged.", "Go on by --resume with --set finetune.rates=[...] lower.")
        won = best(tried)
        chosen = next(hyper for hyper in grid if hyper.figures | {"value": won["value"]} == won)
        self.console.note(f"fine-tuning the best, {chosen}, on all but the test")
        both = np.concatenate([division.fit, division.chosen_on])
        value = self._value("final", data, both, chosen, metric, None)
        assert value is not None, "without a choice a divergence ends it"
        if len(told.rates) > 2 and chosen.rate in (min(told.rates), max(told.rates)):
            warnings.append(f"the best rate, {chosen.rate:g}, is at the end of those tried: add to finetune.rates")
        return Outcome(value, chosen.figures, tried, warnings)

    def _value(
        self, name: str, data: DataSet, rows: np.ndarray, hyper: Hyper, metric: str, asked: np.ndarray | None
    ) -> float | None:
        """The metric on ``asked`` rows of the known images, or on the test images, after a training on ``rows``.

        None where a training that is to be judged on ``asked`` rows diverged.
        """
        done, world = self.folder / name / "value.json", self.look.world
        finished = world.lead(lambda: [json.loads(done.read_text("utf-8"))] if done.is_file() else [])
        if finished:
            return finished[0]
        try:
            network = self._train(self.folder / name, data.known, np.sort(rows), hyper, metric)
        except Diverged:
            if asked is None:
                raise
            return world.lead(lambda: self._keep(done, None))
        known = data.known
        source, labels = (
            (data.test.source, data.test.labels) if asked is None else (known.source.select(asked), known.labels[asked])
        )
        value = self._score(network, source, labels, metric)
        return world.lead(lambda: self._keep(done, value))

    @staticmethod
    def _keep(done: Path, value: float | None) -> float | None:
        checkpoint.atomically(done, lambda temporary: temporary.write_text(json.dumps(value), "utf-8"))
        shutil.rmtree(done.parent / "checkpoints", ignore_errors=True)  # a large grid would fill the disk
        return value

    def _score(self, network: nn.Module, source: Source, labels: np.ndarray, metric: str) -> float:
        crops = EvalImages(source, self.look.size, self.look.crop_ratio)
        scores = extract(network, crops, self.look.device, self.look.world)
        rows = np.array([row for row in range(len(crops)) if row not in crops.bad])
        return measure(metric, scores.cpu()[rows], torch.from_numpy(labels[rows]))

    def _train(self, path: Path, known: Labelled, rows: np.ndarray, hyper: Hyper, metric: str) -> nn.Module:
        told, runtime = self.config.finetune, self.config.runtime
        device, world = self.look.device, self.look.world
        source = known.source.select(rows)
        sampler = Sampler(self.config.seed, len(rows), min(told.batch_size, len(rows)))
        steps = told.steps if hyper.epochs is None else hyper.epochs * sampler.steps_per_epoch
        tuning = Tuning(
            hyper.rate, hyper.decay, told.momentum, steps, sampler.steps_per_epoch, metric == "map11",
            self.config.seed, pick_precision(runtime.precision, device),
        )  # fmt: skip
        task = FinetuneTask(self.look.encoder, len(known.classes), tuning, device, world)
        cache = world.lead(lambda: choose_cache(self.config.data.cache, source, device))
        flip = Photometric(flip=told.flip, jitter=0, grayscale=0, blur=(0, 0), solarize=(0, 0))
        feed = Feed(
            source, sampler, ViewPlan((ViewSize(1, self.look.size, told.area),), told.aspect, flip),
            seed=self.config.seed, device=device, world=world, cache=cache,
            workers=worker_count(runtime, device, cache),
            bad=self.look.bad_images(Labelled(source, known.labels[rows], known.classes)),
        )  # fmt: skip
        saving = self.config.checkpoint
        plan = Plan(
            total=steps, steps_per_epoch=sampler.steps_per_epoch, batch_size=sampler.batch_size,
            log_every=runtime.log_every, checkpoint_every=saving.every_steps, checkpoint_minutes=saving.every_minutes,
            resume_command=f"relicctl transfer --resume {self.run}", rate_key="finetune.rates",
        )  # fmt: skip

        def opened() -> RunFolder:
            path.mkdir(parents=True, exist_ok=True)
            run = RunFolder(path, keep=saving.keep, writer=True)
            run.resume = f"--resume {self.run}"
            return run

        with closing(owned(world, opened, path, saving.keep)) as run:
            found = newest_checkpoint(run, world, self.console.warn)
            progress = Progress() if found is None else restore(task, found[1], found[2], str(found[0]))
            if world.is_main:
                run.rewind_metrics(progress.step or -1)
            with self.console.progress(plan.total, progress.step) as bar:
                train(
                    task,
                    feed,
                    plan,
                    run,
                    progress=progress,
                    device=device,
                    world=world,
                    show=lambda step, figures: bar.update(step, readable(figures)),
                )
        return task.state.eval()
