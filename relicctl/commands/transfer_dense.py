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
from relicctl.commands.common import resolve_num_workers, select_progress_metrics
from relicctl.commands.options import TransferOptions
from relicctl.commands.processes import load_newest_checkpoint, open_distributed_session, open_on_main
from relicctl.commands.transfer import compute_digest
from relicctl.commands.transfer_job import (
    TransferJob,
    close_with_resume_hint,
    make_transfer_record,
    match_architecture,
    open_transfer_folder,
    resolve_transfer_job,
    resume_transfer_config,
)
from relicctl.config.dense import DetectionConfig, SegmentationConfig
from relicctl.config.resolve import ResolvedConfig, dump_yaml
from relicctl.config.schema import Section
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.core.hardware import pick_precision
from relicctl.core.loop import LoopConfig, TrainState, restore_state, train
from relicctl.data.bad_images import BadImages
from relicctl.data.feed import resolve_cache
from relicctl.data.sampler import Sampler
from relicctl.errors import UsageError
from relicctl.evaluation import chart
from relicctl.evaluation.dense import detection, segmentation
from relicctl.evaluation.dense.average_precision import check_pycocotools
from relicctl.evaluation.dense.boxes import open_detection_data
from relicctl.evaluation.dense.feed import DenseLoader
from relicctl.evaluation.dense.masks import open_segmentation_data
from relicctl.evaluation.dense.samples import CachedDenseDataset, DenseDataset
from relicctl.evaluation.kept import compute_encoder_hash
from relicctl.reference import ResolvedEncoder
from relicctl.runs import RunFolder


@dataclass(frozen=True)
class DenseTaskSpec:
    """What tells the tasks apart."""

    name: str
    metric: str
    open_splits: Callable[[str, str, Any, Console], tuple[Any, Any]]
    task_class: Callable[..., Any]
    build_transform: Callable[[Any], Callable[..., Any]]
    collate: Callable[[list[Any]], Any]


DENSE_TASKS: dict[type[Section], DenseTaskSpec] = {
    SegmentationConfig: DenseTaskSpec(
        "segmentation",
        "miou",
        lambda name, spec, config, console: open_segmentation_data(name, spec, config.data, console.info),
        segmentation.SegmentationTask,
        lambda config: segmentation.SegmentationTransform(config.crop),
        segmentation.collate_segmentation,
    ),
    DetectionConfig: DenseTaskSpec(
        "detection",
        "ap",
        lambda name, spec, config, console: open_detection_data(name, spec, config.data, console.warn),
        detection.DetectionTask,
        lambda config: detection.DetectionTransform(config.images.flip),
        detection.collate_detection,
    ),
}


@dataclass(frozen=True)
class DenseEncoder:
    name: str
    encoder: Any
    hash: str


def transfer_dense(resolved: ResolvedConfig, options: TransferOptions) -> dict[str, Any]:
    """Run or resume a comparison; returns ``run`` (the folder of results) and the content of results.json."""
    if isinstance(resolved.config, DetectionConfig):
        check_pycocotools()
    resolved = resume_transfer_config(resolved, options)
    with open_distributed_session(resolved.config.runtime, options.quiet) as (world, device, console):
        return _run_dense_transfer(resolved.config, options, device, console, world)


def _run_dense_transfer(
    config: Any, options: TransferOptions, device: torch.device, console: Console, world: World
) -> dict[str, Any]:
    task_spec = DENSE_TASKS[type(config)]
    job, out = resolve_transfer_job(config, options, world)
    encoders = load_dense_encoders(job, config, console)
    sets = {name: task_spec.open_splits(name, spec, config, console) for name, spec in config.data.sets.items()}
    with close_with_resume_hint(open_transfer_folder(out, options, config, world), f"--task {task_spec.name} ") as run:
        run.write_text(
            run.config_path, dump_yaml(config) + yaml.safe_dump({"run": make_transfer_record(job)}, sort_keys=False)
        )
        trainer = DenseTrainer(task_spec, config, device, run, console, world)
        cells = [trainer.evaluate_cell(learner, name, *parts) for name, parts in sets.items() for learner in encoders]
        results = {
            "cells": cells,
            "relative": chart.list_relative_improvements(cells, job.encoders, job.baselines),
            "encoders": {learner.name: {"sha256": learner.hash} for learner in encoders},
            "baselines": list(job.baselines),
            "data": {name: make_dense_data_record(config.data.sets[name], *parts) for name, parts in sets.items()},
            "version": __version__,
        }
        run.write_json(run.results_path, results)
        if world.is_main:
            report_dense_transfer(cells, job, config, run, console)
    return {"run": str(run.path), **results}


def format_dense_dry_run(resolved: ResolvedConfig, options: TransferOptions) -> str:
    """The resolved config and where each value comes from."""
    resolved = resume_transfer_config(resolved, options)
    resolve_transfer_job(resolved.config, options, World())
    return dump_yaml(resolved.config, resolved.origin).rstrip()


def make_dense_data_record(spec: str, fit: DenseDataset, val: DenseDataset) -> dict[str, Any]:
    return {"source": spec, "classes": list(val.classes), "train": len(fit), "val": len(val)}


def load_dense_encoders(job: TransferJob, config: Any, console: Console) -> list[DenseEncoder]:
    """``random`` is the untrained network of the first encoder that has a run. Raises UsageError for twins."""
    encoders: list[DenseEncoder] = []
    references: list[ResolvedEncoder] = []
    home: Path | None = None
    names_by_hash: dict[str, str] = {}
    for source in job.encoders:
        spec = f"{source}:{home}" if home and source == "random" else source
        model = match_architecture(references, config.model)
        opened = open_encoder(spec, network=job.network, model=model, size=None, seed=config.seed, warn=console.warn)
        references.append(opened)
        if isinstance(opened.encoder, Pixels):
            raise UsageError(f"{source} has no maps of features to find things in.", "Leave it out of dense tasks.")
        home = home or opened.run
        encoder_sha = compute_encoder_hash(opened.encoder, 0, 1.0)
        if encoder_sha in names_by_hash:
            raise UsageError(
                f"{names_by_hash[encoder_sha]} and {source} are the same encoder.", "Leave one of them out."
            )
        names_by_hash[encoder_sha] = source
        encoders.append(DenseEncoder(source, opened.encoder, encoder_sha))
    return encoders


@dataclass(frozen=True)
class DenseTrainer:
    """Trains one network for each cell of the table. What is trained leaves checkpoints, so that it goes on."""

    task_spec: DenseTaskSpec
    config: Any
    device: torch.device
    run: RunFolder
    console: Console
    world: World

    def evaluate_cell(self, encoder: DenseEncoder, name: str, fit: DenseDataset, val: DenseDataset) -> dict[str, Any]:
        """One figure of the table, from its file if it was finished before; the same on every process."""
        settings = self.config.model_dump(exclude={"runtime", "checkpoint", "data"})
        precision = pick_precision(self.config.runtime.precision, self.device)
        key = compute_digest(
            encoder.hash, fit.compute_fingerprint(), val.compute_fingerprint(), fit.classes, self.task_spec.name,
            settings, precision,
            __version__,
        )  # fmt: skip
        path = self.run.path / "cells" / f"{key}.json"
        finished = self.world.broadcast_from_main(
            lambda: json.loads(path.read_text("utf-8")) if path.is_file() else None
        )
        if finished:
            return finished | {"encoder": encoder.name, "data": name}
        title = f"{encoder.name} on {name}, {self.task_spec.name}"
        self.console.info(f"{title}: {len(fit)} images to train on, {len(val)} to test on")
        task = self.task_spec.task_class(
            encoder.encoder, len(val.classes), self.config, self.device, precision, self.world
        )
        folder = self.run.path / self.task_spec.name / key
        losses = self.train(task, fit, folder)
        figures, num_bad = self.world.broadcast_from_main(lambda: self.score(task, val))
        content = {
            "encoder": encoder.name, "data": name, "protocol": self.task_spec.name, "labels": "all",
            "metric": self.task_spec.metric, "value": figures[self.task_spec.metric], "figures": figures,
            "frozen": self.config.model.frozen, "images": {"fit": len(fit), "test": len(val) - num_bad},
            "loss": losses, "warnings": [],
        }  # fmt: skip
        self.run.write_json(path, content)
        if self.world.is_main:  # the figure is there, and the disk is finite
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self.console.info(f"{title}: {self.task_spec.metric} {figures[self.task_spec.metric]:.3f}")
        return content

    def score(self, task: Any, val: DenseDataset) -> tuple[dict[str, Any], int]:
        """Figures, and how many images could not be read."""
        bad: dict[int, str] = {}
        figures = task.score(val, bad)
        report = self._make_bad_images(val)
        for row, reason in bad.items():
            report.add(val.get_name(row), reason)
        return figures, len(bad)

    def train(self, task: Any, fit: DenseDataset, path: Path) -> list[float]:
        """To its end, from where it was; the loss of the first and of the last line of metrics."""
        config, saving = self.config, self.config.checkpoint
        sampler = Sampler(config.seed, len(fit), min(config.optim.batch_size, len(fit)))
        cache = self.world.broadcast_from_main(lambda: resolve_cache(config.data.cache, fit.source, self.device))
        feed = DenseLoader(
            fit if cache == "none" else CachedDenseDataset(fit), sampler, self.task_spec.build_transform(config),
            self.task_spec.collate,
            seed=config.seed, device=self.device, world=self.world,
            workers=resolve_num_workers(config.runtime, self.device, cache), bad=self._make_bad_images(fit),
        )  # fmt: skip
        plan = LoopConfig(
            total=config.optim.steps, steps_per_epoch=sampler.steps_per_epoch, batch_size=sampler.batch_size,
            log_every=config.runtime.log_every, checkpoint_every=saving.every_steps,
            checkpoint_minutes=saving.every_minutes,
            resume_command=f"relicctl transfer --task {self.task_spec.name} --resume {self.run.path}",
        )  # fmt: skip

        def open_cell_run() -> RunFolder:
            path.mkdir(parents=True, exist_ok=True)
            run = RunFolder(path, keep=saving.keep, writer=True)
            run.resume_option = f"--resume {self.run.path}"
            return run

        with closing(open_on_main(self.world, open_cell_run, path, saving.keep)) as run:
            loaded = load_newest_checkpoint(run, self.world, self.console.warn)
            progress = TrainState() if loaded is None else restore_state(task, loaded[1], loaded[2], str(loaded[0]))
            if self.world.is_main:
                run.truncate_metrics(progress.step or -1)
            with self.console.progress(plan.total, progress.step) as bar:
                train(
                    task,
                    feed,
                    plan,
                    run,
                    state=progress,
                    device=self.device,
                    world=self.world,
                    on_log=lambda step, figures: bar.update(step, select_progress_metrics(figures)),
                )
            losses = self.world.broadcast_from_main(lambda: [record["loss"] for record in run.read_metrics()])
            return [losses[0], losses[-1]]

    def _make_bad_images(self, samples: DenseDataset) -> BadImages:
        listed = self.run.read_bad_images()

        def record_bad(name: str, reason: str) -> None:
            if name not in listed:
                self.run.add_bad_image(name, reason)

        return BadImages(len(samples), self.config.data.max_bad, record_bad)


def report_dense_transfer(
    cells: list[dict[str, Any]], job: TransferJob, config: Any, run: RunFolder, console: Console
) -> None:
    """The table on stderr and as table.md, and the chart."""
    header, rows = chart.build_transfer_table(cells, job.encoders, job.baselines)
    console.info("")
    console.print_table(header, rows)
    names = chart.shorten_encoder_names(job.encoders)
    notes = [f"{names[name]} = {name}" for name in job.encoders if names[name] != name]
    notes.append("the encoder is frozen" if config.model.frozen else "the encoder is fine-tuned")
    notes.append(f"{config.optim.steps} steps of {config.optim.batch_size} images; tested on val after the last")
    for cell in cells:
        figures = ", ".join(f"{k} {v:.3f}" for k, v in cell["figures"].items() if isinstance(v, float))
        first, last = cell["loss"]
        notes.append(f"{cell['encoder']} on {cell['data']}: {figures}; loss {first:.3f} at first, {last:.3f} at last")
    run.write_text(run.path / "table.md", chart.format_markdown(header, rows, notes))
    chart.plot_transfer_chart(run.path / "chart.png", cells, job.encoders, job.baselines)
