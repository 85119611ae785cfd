"""Segmentation and detection in a comparison: each cell is one encoder, trained with new layers on one data set."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relicctl.config.renamed import restore_old_names
from relicctl.config.resolve import get_command
from relicctl.config.transfer import DetectionConfig, SegmentationConfig
from relicctl.core.loop import LoopConfig
from relicctl.data.loader import LoaderConfig, resolve_cache
from relicctl.data.sampler import Sampler
from relicctl.encoders.resolve import Pixels
from relicctl.errors import UsageError
from relicctl.evaluation.cells import (
    Cell,
    LoadedEncoder,
    TransferTask,
    compute_digest,
    load_or_compute_cell,
    open_subfolder,
)
from relicctl.evaluation.dense.data import CachedDenseDataset, DenseDataset, DenseLoader
from relicctl.evaluation.dense.detection import DetectionTask, check_pycocotools
from relicctl.evaluation.dense.segmentation import SegmentationTask
from relicctl.evaluation.dense.training import DenseTask
from relicctl.evaluation.features import compute_encoder_hash, make_bad_images
from relicctl.runs.distributed import RunContext, Session, resolve_num_workers
from relicctl.runs.training import resume_and_train
from relicctl.version import __version__

DENSE_TASKS: dict[type[Any], type[DenseTask]] = {SegmentationConfig: SegmentationTask, DetectionConfig: DetectionTask}


class DenseTransfer(TransferTask):
    """Trains one network for each cell of the table; trainings leave checkpoints to resume from."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._task_class = DENSE_TASKS[type(config)]
        self._splits: dict[str, tuple[DenseDataset, DenseDataset]] = {}
        self.resume_option = f"--task {self._task_class.name} "
        if isinstance(config, DetectionConfig):
            check_pycocotools()

    def load_encoder(self, name: str, encoder: Any) -> LoadedEncoder:
        if isinstance(encoder, Pixels):
            raise UsageError(f"{name} produces no feature maps.", "Leave it out of dense tasks.")
        digest = compute_encoder_hash(encoder, 0, 1.0)
        return LoadedEncoder(name, encoder, digest, {"sha256": digest})

    def open_data(self, session: Session, download: bool) -> None:
        self._splits = {
            name: self._task_class.open_splits(name, spec, self.config.data, session.console)
            for name, spec in self.config.data.datasets.items()
        }

    def compute_cells(self, encoders: Sequence[LoadedEncoder], context: RunContext) -> list[Cell]:
        return [self._compute_cell(encoder, name, context) for name in self._splits for encoder in encoders]

    def _compute_cell(self, encoder: LoadedEncoder, name: str, context: RunContext) -> Cell:
        train, val = self._splits[name]
        kind, metric = self._task_class.name, self._task_class.metric
        settings = restore_old_names(
            get_command(type(self.config)), self.config.model_dump(exclude={"runtime", "checkpoint", "data"})
        )
        key = compute_digest(
            encoder.hash, train.compute_fingerprint(), val.compute_fingerprint(), train.classes, kind, settings,
            context.precision, __version__,
        )  # fmt: skip
        title = f"{encoder.name} on {name}, {kind}"
        folder = context.run.path / kind / key

        def compute() -> Cell:
            context.console.info(f"{title}: {len(train)} images to train on, {len(val)} to test on")
            task = self._task_class(encoder.encoder, len(val.classes), self.config, context)
            losses = self._train(task, train, folder, context)
            metrics, num_bad = context.world.broadcast_from_main(lambda: self._score(task, val, context))
            return {
                "encoder": encoder.name, "data": name, "protocol": kind, "labels": "all", "metric": metric,
                "value": metrics[metric], "figures": metrics, "frozen": self.config.model.freeze_encoder,
                "images": {"fit": len(train), "test": len(val) - num_bad}, "loss": losses, "warnings": [],
            }  # fmt: skip

        cell = load_or_compute_cell(key, title, {"encoder": encoder.name, "data": name}, context, compute)
        if context.world.is_main:  # the cell is saved, and the disk is finite
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return cell

    def _score(self, task: DenseTask, val: DenseDataset, context: RunContext) -> tuple[dict[str, Any], int]:
        """The metrics, and how many images could not be decoded."""
        bad: dict[int, str] = {}
        metrics = task.score(val, bad)
        report = make_bad_images(context.run, len(val), self.config.data.max_corrupt_fraction)
        for row, reason in bad.items():
            report.add(val.source.get_name(row), reason)
        return metrics, len(bad)

    def _train(self, task: DenseTask, train: DenseDataset, folder: Path, context: RunContext) -> list[float]:
        """Train to the end, from the newest checkpoint; returns the loss of the first and of the last log line."""
        config, device, world = self.config, context.device, context.world
        sampler = Sampler(config.seed, len(train), min(config.optim.batch_size, len(train)))
        cache = world.broadcast_from_main(lambda: resolve_cache(config.data.cache, train.source, device))
        samples = train if cache == "none" else CachedDenseDataset(train)
        workers = resolve_num_workers(config.runtime, device, cache)
        loader = DenseLoader(
            samples, sampler, task.build_transform(config), task.collate,
            LoaderConfig(config.seed, device, world, workers=workers),
            make_bad_images(context.run, len(train), config.data.max_corrupt_fraction),
        )  # fmt: skip
        loop_config = LoopConfig.from_sections(
            config.checkpoint, config.runtime, total=config.optim.steps, steps_per_epoch=sampler.steps_per_epoch,
            batch_size=sampler.batch_size,
            resume_command=f"relicctl transfer {self.resume_option}{context.run.resume_option}",
        )  # fmt: skip
        with open_subfolder(context, folder, config.checkpoint.keep) as subfolder:
            resume_and_train(task, loader, loop_config, subfolder)
            losses = world.broadcast_from_main(lambda: [record["loss"] for record in subfolder.run.read_metrics()])
        return [losses[0], losses[-1]]

    def describe_data(self) -> dict[str, Any]:
        specs = self.config.data.datasets
        return {
            name: {"source": specs[name], "classes": list(val.classes), "train": len(train), "val": len(val)}
            for name, (train, val) in self._splits.items()
        }

    def format_notes(self, cells: Sequence[Cell], abbreviations: list[str]) -> list[str]:
        optim = self.config.optim
        notes = [
            *abbreviations,
            "the encoder is frozen" if self.config.model.freeze_encoder else "the encoder is fine-tuned",
            f"{optim.steps} steps of {optim.batch_size} images; tested on val after the last",
        ]
        for cell in cells:
            metrics = ", ".join(f"{k} {v:.3f}" for k, v in cell["figures"].items() if isinstance(v, float))
            first, last = cell["loss"]
            losses = f"loss {first:.3f} at first, {last:.3f} at last"
            notes.append(f"{cell['encoder']} on {cell['data']}: {metrics}; {losses}")
        return notes
