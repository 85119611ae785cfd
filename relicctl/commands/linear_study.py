"""How a linear evaluation trains classifiers on what it sees of the images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from relicctl.commands.common import resolve_num_workers, select_progress_metrics
from relicctl.commands.linear_job import open_linear_folder
from relicctl.commands.processes import load_newest_checkpoint
from relicctl.config.linear import LinearEvalConfig
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.distributed import World
from relicctl.core.loop import Batches, LoopConfig, TrainState, restore_state, train
from relicctl.data.augment import AugmentConfig
from relicctl.data.feed import CropSpec, ViewLoader, ViewSpec
from relicctl.data.sampler import Sampler
from relicctl.evaluation.labelled import LabelledDataset
from relicctl.evaluation.linear import (
    EncodedFeatureLoader,
    FeatureLoader,
    LinearClassifierGrid,
    LinearTask,
    StandardScaler,
)
from relicctl.evaluation.look import ExtractedFeatures, FeatureExtractor
from relicctl.evaluation.sweep import SweepResult, evaluate_rates, split_holdout_rows
from relicctl.runs import RunFolder


class LinearTrainer:
    """Trains classifiers on rows of the training images, by either protocol, through the training loop.

    Several processes split the batches of protocol imagenet. That of fast costs less than its gradients would on
    their way: every process trains the same classifiers on all features, and they only agree on stopping.
    """

    def __init__(
        self,
        config: LinearEvalConfig,
        images: LabelledDataset,
        train_features: ExtractedFeatures,
        extractor: FeatureExtractor,
        record: dict[str, Any],
        run: RunFolder,
        console: Console,
    ) -> None:
        self._config, self._images, self._train_features = config, images, train_features
        self._extractor, self._record, self._run, self._console = extractor, record, run, console
        self.batch_size, self.num_val_images = config.optim.batch_size, 0
        if config.protocol == "fast":
            self.batch_size = min(self.batch_size, len(train_features.labels))

    def sweep_rates(self) -> SweepResult:
        """All rates on the training images but a held-out part, compared on that part; a run within the run."""
        world = self._extractor.world
        folder = open_linear_folder(self._run.path / "sweep", world, resumed=True, overwrite=False, config=self._config)
        folder.write_text(folder.config_path, self._run.config_path.read_text("utf-8"))
        train_rows, val_rows = split_holdout_rows(
            len(self._train_features.labels), self._config.sweep.holdout, self._config.seed
        )
        self._console.info(f"{len(self._config.sweep.rates)} learning rates, compared on {len(val_rows)} images")
        classifiers, standard = self.fit(folder, train_rows, self._config.sweep.rates)
        features, labels = (
            t[torch.from_numpy(val_rows).to(t.device)]
            for t in (self._train_features.features, self._train_features.labels)
        )
        self.num_val_images = len(val_rows)
        folder.close()
        choice = evaluate_rates(classifiers, standard(features) if standard else features, labels)
        return SweepResult(*map(tuple, world.broadcast_from_main(lambda: (choice.rates, choice.accuracy))))

    def fit(
        self, folder: RunFolder, rows: np.ndarray, rates: tuple[float, ...]
    ) -> tuple[LinearClassifierGrid, StandardScaler | None]:
        """The classifiers, and what standardises the features that they take."""
        config, device, world = self._config, self._extractor.device, self._extractor.world
        batch_size = min(self.batch_size, len(rows)) if config.protocol == "fast" else self.batch_size
        sampler = Sampler(config.seed, len(rows), batch_size)
        batches, standard = self._build_batches(rows, sampler)
        scheduled = sampler.steps_per_epoch * config.optim.epochs
        task = LinearTask(
            self._train_features.features.shape[1],
            len(self._images.classes),
            rates,
            batch_size=batch_size,
            momentum=config.optim.momentum,
            total_steps=scheduled,
            device=device,
            split=config.protocol == "imagenet" and world.size > 1,
        )
        plan = LoopConfig(
            total=min(scheduled, config.optim.max_steps or scheduled),
            steps_per_epoch=sampler.steps_per_epoch,
            batch_size=batch_size,
            log_every=config.runtime.log_every,
            checkpoint_every=config.checkpoint.every_steps,
            checkpoint_minutes=config.checkpoint.every_minutes,
            resume_command=f"relicctl linear-eval --resume {self._run.path}",
        )
        progress = resume_linear_training(folder, task, rates, world, self._console)
        with self._console.progress(plan.total, progress.step) as bar:
            train(
                task,
                batches,
                plan,
                folder,
                state=progress,
                device=device,
                world=world,
                on_log=lambda step, figures: bar.update(step, select_progress_metrics(figures)),
            )
        return task.model, standard

    def _build_batches(self, rows: np.ndarray, sampler: Sampler) -> tuple[Batches, StandardScaler | None]:
        config, extractor, train_features = self._config, self._extractor, self._train_features
        if config.protocol == "fast":
            indices = torch.from_numpy(rows).to(extractor.device)
            features = train_features.features[indices]
            standard = StandardScaler.from_features(features)
            return FeatureLoader(standard(features), train_features.labels[indices], sampler), standard
        size = CropSpec(1, extractor.size, config.crop.area)
        flip = AugmentConfig(flip=config.crop.flip, jitter=0, grayscale=0, blur=(0, 0), solarize=(0, 0))
        feed = ViewLoader(
            self._images.source.select(train_features.rows[rows]),
            sampler,
            ViewSpec((size,), config.crop.aspect, flip),
            seed=config.seed,
            device=extractor.device,
            world=extractor.world,
            cache=self._record["cache"],
            workers=resolve_num_workers(config.runtime, extractor.device, self._record["cache"]),
            bad=extractor.collect_bad_images(self._images),
        )
        autocast = torch.autocast(extractor.device.type, torch.bfloat16, enabled=self._record["precision"] == "bf16")
        return EncodedFeatureLoader(feed, extractor.encoder, autocast), None


def resume_linear_training(
    folder: RunFolder, task: LinearTask, rates: tuple[float, ...], world: World, console: Console
) -> TrainState:
    """From the newest checkpoint of these rates that can be read; else from the start."""
    loaded = load_newest_checkpoint(
        folder, world, console.warn, lambda tensors: tensors["state.rates"].tolist() == list(rates)
    )
    progress = TrainState() if loaded is None else restore_state(task, loaded[1], loaded[2], str(loaded[0]))
    if world.is_main:
        for stale in checkpoint.list_checkpoints(folder.checkpoints_dir) if loaded is None else []:
            stale.unlink()
        folder.truncate_metrics(progress.step if progress.step else -1)
    if loaded is not None:
        console.info(f"resumed from {loaded[0]} at step {progress.step}")
    return progress
