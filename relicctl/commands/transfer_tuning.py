"""``relicctl transfer --protocol finetune``: every rate with every decay, chosen on validation, trained anew."""

from __future__ import annotations

import itertools
import json
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from relicctl.commands.common import readable, worker_count
from relicctl.commands.linear_study import Look
from relicctl.config.transfer import TransferConfig
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.distributed import World
from relicctl.core.hardware import pick_precision
from relicctl.core.loop import Plan, Progress, restore, train
from relicctl.data.augment import Photometric
from relicctl.data.feed import Feed, ViewPlan, ViewSize, choose_cache
from relicctl.data.sampler import Sampler
from relicctl.data.sources import Source
from relicctl.evaluation.features import EvalImages, extract
from relicctl.evaluation.finetune import FinetuneTask, Tuning
from relicctl.evaluation.labelled import Labelled
from relicctl.evaluation.metrics import measure
from relicctl.evaluation.parts import DataSet, Division
from relicctl.evaluation.protocols import Outcome, best
from relicctl.runs import RunFolder


@dataclass(frozen=True)
class Tuner:
    """Fine-tunes one encoder. Trainings leave checkpoints in ``folder``, so that a killed one goes on."""

    look: Look
    config: TransferConfig
    folder: Path
    resume_command: str
    console: Console

    def __call__(self, data: DataSet, division: Division, metric: str) -> Outcome:
        grid = list(itertools.product(self.config.finetune.rates, self.config.finetune.decays))
        tried = []
        for number, (rate, decay) in enumerate(grid, 1):
            self.console.note(f"fine-tuning {number} of {len(grid)}: rate {rate:g}, decay {decay:g}")
            value = self._value(f"{rate:g}-{decay:g}", data, division.fit, (rate, decay), metric, division.chosen_on)
            tried.append({"rate": rate, "decay": decay, "value": value})
        chosen = {name: best(tried)[name] for name in ("rate", "decay")}
        self.console.note(
            f"fine-tuning the best, rate {chosen['rate']:g}, decay {chosen['decay']:g}, on all but the test"
        )
        both = np.concatenate([division.fit, division.chosen_on])
        value = self._value("final", data, both, (chosen["rate"], chosen["decay"]), metric, None)
        warnings = []
        rates = self.config.finetune.rates
        if len(rates) > 2 and chosen["rate"] in (min(rates), max(rates)):
            warnings.append(f"the best rate, {chosen['rate']:g}, is at the end of those tried: add to finetune.rates")
        return Outcome(value, chosen, tried, warnings)

    def _value(
        self, name: str, data: DataSet, rows: np.ndarray, hyper: tuple[float, float], metric: str,
        asked: np.ndarray | None,
    ) -> float:  # fmt: skip
        """The metric on ``asked`` rows of the known images, or on the test images, after a training on ``rows``."""
        done = self.folder / name / "value.json"
        if done.is_file():
            return json.loads(done.read_text("utf-8"))
        network = self._train(self.folder / name, data.known, np.sort(rows), hyper, metric)
        known = data.known
        source, labels = (
            (data.test.source, data.test.labels) if asked is None else (known.source.select(asked), known.labels[asked])
        )
        value = self._score(network, source, labels, metric)
        checkpoint.atomically(done, lambda temporary: temporary.write_text(json.dumps(value), "utf-8"))
        shutil.rmtree(done.parent / "checkpoints")  # a large grid would fill the disk
        return value

    def _score(self, network: nn.Module, source: Source, labels: np.ndarray, metric: str) -> float:
        crops = EvalImages(source, self.look.size, self.look.crop_ratio)
        scores = extract(network, crops, self.look.device)
        rows = np.array([row for row in range(len(crops)) if row not in crops.bad])
        return measure(metric, scores.cpu()[rows], torch.from_numpy(labels[rows]))

    def _train(
        self, path: Path, known: Labelled, rows: np.ndarray, hyper: tuple[float, float], metric: str
    ) -> nn.Module:
        told, runtime, device = self.config.finetune, self.config.runtime, self.look.device
        source = known.source.select(rows)
        sampler = Sampler(self.config.seed, len(rows), min(told.batch_size, len(rows)))
        tuning = Tuning(
            *hyper, told.momentum, told.steps, sampler.steps_per_epoch, metric == "map11", self.config.seed,
            pick_precision(runtime.precision, device),
        )  # fmt: skip
        task = FinetuneTask(self.look.encoder, len(known.classes), tuning, device)
        cache = choose_cache(self.config.data.cache, source, device)
        flip = Photometric(flip=told.flip, jitter=0, grayscale=0, blur=(0, 0), solarize=(0, 0))
        feed = Feed(
            source, sampler, ViewPlan((ViewSize(1, self.look.size, told.area),), told.aspect, flip),
            seed=self.config.seed, device=device, world=World(), cache=cache,
            workers=worker_count(runtime, device, cache),
            bad=self.look.bad_images(Labelled(source, known.labels[rows], known.classes)),
        )  # fmt: skip
        saving = self.config.checkpoint
        plan = Plan(
            total=told.steps, steps_per_epoch=sampler.steps_per_epoch, batch_size=sampler.batch_size,
            log_every=runtime.log_every, checkpoint_every=saving.every_steps, checkpoint_minutes=saving.every_minutes,
            resume_command=self.resume_command,
        )  # fmt: skip
        path.mkdir(parents=True, exist_ok=True)
        with closing(RunFolder(path, keep=saving.keep, writer=True)) as run:
            found = checkpoint.newest_valid(run.checkpoints, self.console.warn)
            progress = Progress() if found is None else restore(task, found[1], found[2], str(found[0]))
            run.rewind_metrics(progress.step or -1)
            with self.console.progress(plan.total, progress.step) as bar:
                train(
                    task,
                    feed,
                    plan,
                    run,
                    progress=progress,
                    device=device,
                    show=lambda step, figures: bar.update(step, readable(figures)),
                )
        return task.state.eval()
