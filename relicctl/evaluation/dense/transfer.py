"""The table of dense tasks: each cell is one encoder, trained with new layers on one data set."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from relicctl.config.base import Section
from relicctl.config.renamed import restore_old_names
from relicctl.config.resolve import get_command
from relicctl.config.transfer import DetectionConfig, SegmentationConfig
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.core.hardware import pick_precision
from relicctl.core.loop import LoopConfig, TrainState, restore_state, train
from relicctl.data.decoding import BadImages
from relicctl.data.loader import resolve_cache
from relicctl.data.sampler import Sampler
from relicctl.encoders.resolve import Pixels, ResolvedEncoder, TransferJob, match_architecture, open_encoder
from relicctl.errors import UsageError
from relicctl.evaluation.dense import detection, segmentation
from relicctl.evaluation.dense.data import CachedDenseDataset, DenseDataset, DenseLoader
from relicctl.evaluation.dense.detection_data import open_detection_data
from relicctl.evaluation.dense.segmentation_data import open_segmentation_data
from relicctl.evaluation.features import compute_encoder_hash
from relicctl.evaluation.transfer import compute_digest
from relicctl.runs.distributed import load_newest_checkpoint, open_sub_run, resolve_num_workers, select_progress_metrics
from relicctl.runs.folder import RunFolder
from relicctl.version import __version__


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
        lambda config: detection.DetectionTransform(config.images.hflip_prob),
        detection.collate_detection,
    ),
}


@dataclass(frozen=True)
class DenseEncoder:
    name: str
    encoder: Any
    hash: str


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
        settings = restore_old_names(
            get_command(type(self.config)), self.config.model_dump(exclude={"runtime", "checkpoint", "data"})
        )
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
            "frozen": self.config.model.freeze_encoder, "images": {"fit": len(fit), "test": len(val) - num_bad},
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

        with closing(open_sub_run(self.world, path, parent=self.run.path, keep=saving.keep)) as run:
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

        return BadImages(len(samples), self.config.data.max_corrupt_fraction, record_bad)
