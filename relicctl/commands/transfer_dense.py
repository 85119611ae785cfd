"""``relicctl transfer --task segmentation|detection``: does an encoder serve in dense tasks, and better than another?

Every encoder gets the same new layers and the same training on every data set; what is told is measured on val,
which decides nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from relicctl import __version__
from relicctl.baselines import Pixels, open_encoder
from relicctl.commands.common import readable, worker_count
from relicctl.commands.options import TransferOptions
from relicctl.commands.processes import joined, newest_checkpoint, owned
from relicctl.commands.transfer import digest
from relicctl.commands.transfer_job import Job, continued, like, noted, open_folder, resumable, settle
from relicctl.config.dense import DetectionConfig, SegmentationConfig
from relicctl.config.resolve import Resolved, dump_yaml
from relicctl.config.schema import Section
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.core.hardware import pick_precision
from relicctl.core.loop import Plan, Progress, restore, train
from relicctl.data.bad_images import BadImages
from relicctl.data.feed import choose_cache
from relicctl.data.sampler import Sampler
from relicctl.errors import UsageError
from relicctl.evaluation import chart
from relicctl.evaluation.dense import detection, segmentation
from relicctl.evaluation.dense.average_precision import require_pycocotools
from relicctl.evaluation.dense.boxes import open_boxed
from relicctl.evaluation.dense.feed import DenseFeed
from relicctl.evaluation.dense.masks import open_masked
from relicctl.evaluation.dense.samples import Remembered, Samples
from relicctl.evaluation.kept import encoder_hash
from relicctl.reference import Reference
from relicctl.runs import RunFolder


@dataclass(frozen=True)
class Kind:
    """What tells the tasks apart."""

    name: str
    metric: str
    open: Callable[[str, str, Any, Console], tuple[Any, Any]]
    task: Callable[..., Any]
    prepare: Callable[[Any], Callable[..., Any]]
    collate: Callable[[list[Any]], Any]


KINDS: dict[type[Section], Kind] = {
    SegmentationConfig: Kind(
        "segmentation",
        "miou",
        lambda name, spec, config, console: open_masked(name, spec, config.data, console.note),
        segmentation.SegmentationTask,
        lambda config: segmentation.ScaleCropFlip(config.crop),
        segmentation.stacked,
    ),
    DetectionConfig: Kind(
        "detection",
        "ap",
        lambda name, spec, config, console: open_boxed(name, spec, config.data, console.warn),
        detection.DetectionTask,
        lambda config: detection.Flip(config.images.flip),
        detection.listed,
    ),
}


@dataclass(frozen=True)
class Learner:
    name: str
    encoder: Any
    hash: str


def transfer_dense(resolved: Resolved, options: TransferOptions) -> dict[str, Any]:
    """Run or resume a comparison; returns ``run`` (the folder of results) and the content of results.json."""
    if isinstance(resolved.config, DetectionConfig):
        require_pycocotools()
    resolved = continued(resolved, options)
    with joined(resolved.config.runtime, options.quiet) as (world, device, console):
        return _run(resolved.config, options, device, console, world)


def _run(config: Any, options: TransferOptions, device: torch.device, console: Console, world: World) -> dict[str, Any]:
    kind = KINDS[type(config)]
    job, out = settle(config, options, world)
    learners = open_learners(job, config, console)
    sets = {name: kind.open(name, spec, config, console) for name, spec in config.data.sets.items()}
    with resumable(open_folder(out, options, config, world), f"--task {kind.name} ") as run:
        run.write_text(run.config, dump_yaml(config) + yaml.safe_dump({"run": noted(job)}, sort_keys=False))
        study = Study(kind, config, device, run, console, world)
        cells = [study.cell(learner, name, *parts) for name, parts in sets.items() for learner in learners]
        results = {
            "cells": cells,
            "relative": chart.improvements(cells, job.encoders, job.baselines),
            "encoders": {learner.name: {"sha256": learner.hash} for learner in learners},
            "baselines": list(job.baselines),
            "data": {name: facts(config.data.sets[name], *parts) for name, parts in sets.items()},
            "version": __version__,
        }
        run.write_json(run.results, results)
        if world.is_main:
            tell(cells, job, config, run, console)
    return {"run": str(run.path), **results}


def dry_run(resolved: Resolved, options: TransferOptions) -> str:
    """The resolved config and where each value comes from."""
    resolved = continued(resolved, options)
    settle(resolved.config, options, World())
    return dump_yaml(resolved.config, resolved.origin).rstrip()


def facts(spec: str, fit: Samples, val: Samples) -> dict[str, Any]:
    return {"source": spec, "classes": list(val.classes), "train": len(fit), "val": len(val)}


def open_learners(job: Job, config: Any, console: Console) -> list[Learner]:
    """``random`` is the untrained network of the first encoder that has a run. Raises UsageError for twins."""
    learners: list[Learner] = []
    references: list[Reference] = []
    home: Path | None = None
    known: dict[str, str] = {}
    for source in job.encoders:
        told = f"{source}:{home}" if home and source == "random" else source
        model = like(references, config.model)
        opened = open_encoder(told, network=job.network, model=model, size=None, seed=config.seed, warn=console.warn)
        references.append(opened)
        if isinstance(opened.encoder, Pixels):
            raise UsageError(f"{source} has no maps of features to find things in.", "Leave it out of dense tasks.")
        home = home or opened.run
        hashed = encoder_hash(opened.encoder, 0, 1.0)
        if hashed in known:
            raise UsageError(f"{known[hashed]} and {source} are the same encoder.", "Leave one of them out.")
        known[hashed] = source
        learners.append(Learner(source, opened.encoder, hashed))
    return learners


@dataclass(frozen=True)
class Study:
    """Trains one network for each cell of the table. What is trained leaves checkpoints, so that it goes on."""

    kind: Kind
    config: Any
    device: torch.device
    run: RunFolder
    console: Console
    world: World

    def cell(self, learner: Learner, name: str, fit: Samples, val: Samples) -> dict[str, Any]:
        """One figure of the table, from its file if it was finished before; the same on every process."""
        told = self.config.model_dump(exclude={"runtime", "checkpoint", "data"})
        precision = pick_precision(self.config.runtime.precision, self.device)
        key = digest(
            learner.hash, fit.fingerprint(), val.fingerprint(), fit.classes, self.kind.name, told, precision,
            __version__,
        )  # fmt: skip
        path = self.run.path / "cells" / f"{key}.json"
        finished = self.world.lead(lambda: json.loads(path.read_text("utf-8")) if path.is_file() else None)
        if finished:
            return finished | {"encoder": learner.name, "data": name}
        title = f"{learner.name} on {name}, {self.kind.name}"
        self.console.note(f"{title}: {len(fit)} images to train on, {len(val)} to test on")
        task = self.kind.task(learner.encoder, len(val.classes), self.config, self.device, precision, self.world)
        folder = self.run.path / self.kind.name / key
        losses = self.train(task, fit, folder)
        figures, unread = self.world.lead(lambda: self.score(task, val))
        content = {
            "encoder": learner.name, "data": name, "protocol": self.kind.name, "labels": "all",
            "metric": self.kind.metric, "value": figures[self.kind.metric], "figures": figures,
            "frozen": self.config.model.frozen, "images": {"fit": len(fit), "test": len(val) - unread},
            "loss": losses, "warnings": [],
        }  # fmt: skip
        self.run.write_json(path, content)
        if self.world.is_main:  # the figure is there, and the disk is finite
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self.console.note(f"{title}: {self.kind.metric} {figures[self.kind.metric]:.3f}")
        return content

    def score(self, task: Any, val: Samples) -> tuple[dict[str, Any], int]:
        """Figures, and how many images could not be read."""
        bad: dict[int, str] = {}
        figures = task.score(val, bad)
        report = self.bad_images(val)
        for row, reason in bad.items():
            report.add(val.key(row), reason)
        return figures, len(bad)

    def train(self, task: Any, fit: Samples, path: Path) -> list[float]:
        """To its end, from where it was; the loss of the first and of the last line of metrics."""
        config, saving = self.config, self.config.checkpoint
        sampler = Sampler(config.seed, len(fit), min(config.optim.batch_size, len(fit)))
        cache = self.world.lead(lambda: choose_cache(config.data.cache, fit.source, self.device))
        feed = DenseFeed(
            fit if cache == "none" else Remembered(fit), sampler, self.kind.prepare(config), self.kind.collate,
            seed=config.seed, device=self.device, world=self.world,
            workers=worker_count(config.runtime, self.device, cache), bad=self.bad_images(fit),
        )  # fmt: skip
        plan = Plan(
            total=config.optim.steps, steps_per_epoch=sampler.steps_per_epoch, batch_size=sampler.batch_size,
            log_every=config.runtime.log_every, checkpoint_every=saving.every_steps,
            checkpoint_minutes=saving.every_minutes,
            resume_command=f"relicctl transfer --task {self.kind.name} --resume {self.run.path}",
        )  # fmt: skip

        def opened() -> RunFolder:
            path.mkdir(parents=True, exist_ok=True)
            run = RunFolder(path, keep=saving.keep, writer=True)
            run.resume = f"--resume {self.run.path}"
            return run

        with closing(owned(self.world, opened, path, saving.keep)) as run:
            found = newest_checkpoint(run, self.world, self.console.warn)
            progress = Progress() if found is None else restore(task, found[1], found[2], str(found[0]))
            if self.world.is_main:
                run.rewind_metrics(progress.step or -1)
            with self.console.progress(plan.total, progress.step) as bar:
                train(
                    task,
                    feed,
                    plan,
                    run,
                    progress=progress,
                    device=self.device,
                    world=self.world,
                    show=lambda step, figures: bar.update(step, readable(figures)),
                )
            losses = self.world.lead(lambda: [record["loss"] for record in run.read_metrics()])
            return [losses[0], losses[-1]]

    def bad_images(self, samples: Samples) -> BadImages:
        listed = self.run.read_bad_images()

        def report(name: str, reason: str) -> None:
            if name not in listed:
                self.run.add_bad_image(name, reason)

        return BadImages(len(samples), self.config.data.max_bad, report)


def tell(cells: list[dict[str, Any]], job: Job, config: Any, run: RunFolder, console: Console) -> None:
    """The table on stderr and as table.md, and the chart."""
    header, rows = chart.table(cells, job.encoders, job.baselines)
    console.note("")
    console.table(header, rows)
    names = chart.short_names(job.encoders)
    notes = [f"{names[name]} = {name}" for name in job.encoders if names[name] != name]
    notes.append("the encoder is frozen" if config.model.frozen else "the encoder is fine-tuned")
    notes.append(f"{config.optim.steps} steps of {config.optim.batch_size} images; tested on val after the last")
    for cell in cells:
        figures = ", ".join(f"{k} {v:.3f}" for k, v in cell["figures"].items() if isinstance(v, float))
        first, last = cell["loss"]
        notes.append(f"{cell['encoder']} on {cell['data']}: {figures}; loss {first:.3f} at first, {last:.3f} at last")
    run.write_text(run.path / "table.md", chart.markdown(header, rows, notes))
    chart.draw(run.path / "chart.png", cells, job.encoders, job.baselines)
