"""How a linear evaluation trains classifiers on what it sees of the images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from relicctl.commands.common import readable, worker_count
from relicctl.commands.linear_job import open_folder
from relicctl.commands.processes import newest_checkpoint
from relicctl.config.linear import LinearConfig
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.distributed import World
from relicctl.core.loop import Batches, Plan, Progress, restore, train
from relicctl.data.augment import Photometric
from relicctl.data.feed import Feed, ViewPlan, ViewSize
from relicctl.data.sampler import Sampler
from relicctl.evaluation.labelled import Labelled
from relicctl.evaluation.linear import Classifiers, EncodedBatches, FeatureBatches, LinearTask, Standard
from relicctl.evaluation.look import Look, Seen
from relicctl.evaluation.sweep import Choice, choose, hold_out
from relicctl.runs import RunFolder


class Study:
    """Trains classifiers on rows of the training images, by either protocol, through the training loop.

    Several processes split the batches of protocol imagenet. That of fast costs less than its gradients would on
    their way: every process trains the same classifiers on all features, and they only agree on stopping.
    """

    def __init__(
        self,
        config: LinearConfig,
        images: Labelled,
        known: Seen,
        look: Look,
        record: dict[str, Any],
        run: RunFolder,
        console: Console,
    ) -> None:
        self._config, self._images, self._known = config, images, known
        self._look, self._record, self._run, self._console = look, record, run, console
        self.batch_size, self.held_out = config.optim.batch_size, 0
        if config.protocol == "fast":
            self.batch_size = min(self.batch_size, len(known.labels))

    def sweep(self) -> Choice:
        """All rates on the training images but a held-out part, compared on that part; a run within the run."""
        world = self._look.world
        folder = open_folder(self._run.path / "sweep", world, resumed=True, overwrite=False, config=self._config)
        folder.write_text(folder.config, self._run.config.read_text("utf-8"))
        kept, held = hold_out(len(self._known.labels), self._config.sweep.holdout, self._config.seed)
        self._console.note(f"{len(self._config.sweep.rates)} learning rates, compared on {len(held)} images")
        classifiers, standard = self.fit(folder, kept, self._config.sweep.rates)
        features, labels = (t[torch.from_numpy(held).to(t.device)] for t in (self._known.features, self._known.labels))
        self.held_out = len(held)
        folder.close()
        choice = choose(classifiers, standard(features) if standard else features, labels)
        return Choice(*map(tuple, world.lead(lambda: (choice.rates, choice.accuracy))))

    def fit(self, folder: RunFolder, rows: np.ndarray, rates: tuple[float, ...]) -> tuple[Classifiers, Standard | None]:
        """The classifiers, and what standardises the features that they take."""
        config, device, world = self._config, self._look.device, self._look.world
        batch_size = min(self.batch_size, len(rows)) if config.protocol == "fast" else self.batch_size
        sampler = Sampler(config.seed, len(rows), batch_size)
        batches, standard = self._batches(rows, sampler)
        scheduled = sampler.steps_per_epoch * config.optim.epochs
        task = LinearTask(
            self._known.features.shape[1],
            len(self._images.classes),
            rates,
            batch_size=batch_size,
            momentum=config.optim.momentum,
            total_steps=scheduled,
            device=device,
            split=config.protocol == "imagenet" and world.size > 1,
        )
        plan = Plan(
            total=min(scheduled, config.optim.max_steps or scheduled),
            steps_per_epoch=sampler.steps_per_epoch,
            batch_size=batch_size,
            log_every=config.runtime.log_every,
            checkpoint_every=config.checkpoint.every_steps,
            checkpoint_minutes=config.checkpoint.every_minutes,
            resume_command=f"relicctl linear-eval --resume {self._run.path}",
        )
        progress = go_on(folder, task, rates, world, self._console)
        with self._console.progress(plan.total, progress.step) as bar:
            train(
                task,
                batches,
                plan,
                folder,
                progress=progress,
                device=device,
                world=world,
                show=lambda step, figures: bar.update(step, readable(figures)),
            )
        return task.state, standard

    def _batches(self, rows: np.ndarray, sampler: Sampler) -> tuple[Batches, Standard | None]:
        config, look, known = self._config, self._look, self._known
        if config.protocol == "fast":
            picked = torch.from_numpy(rows).to(look.device)
            features = known.features[picked]
            standard = Standard.of(features)
            return FeatureBatches(standard(features), known.labels[picked], sampler), standard
        size = ViewSize(1, look.size, config.crop.area)
        flip = Photometric(flip=config.crop.flip, jitter=0, grayscale=0, blur=(0, 0), solarize=(0, 0))
        feed = Feed(
            self._images.source.select(known.rows[rows]),
            sampler,
            ViewPlan((size,), config.crop.aspect, flip),
            seed=config.seed,
            device=look.device,
            world=look.world,
            cache=self._record["cache"],
            workers=worker_count(config.runtime, look.device, self._record["cache"]),
            bad=look.bad_images(self._images),
        )
        autocast = torch.autocast(look.device.type, torch.bfloat16, enabled=self._record["precision"] == "bf16")
        return EncodedBatches(feed, look.encoder, autocast), None


def go_on(folder: RunFolder, task: LinearTask, rates: tuple[float, ...], world: World, console: Console) -> Progress:
    """From the newest checkpoint of these rates that can be read; else from the start."""
    found = newest_checkpoint(
        folder, world, console.warn, lambda tensors: tensors["state.rates"].tolist() == list(rates)
    )
    progress = Progress() if found is None else restore(task, found[1], found[2], str(found[0]))
    if world.is_main:
        for stale in checkpoint.listed(folder.checkpoints) if found is None else []:
            stale.unlink()
        folder.rewind_metrics(progress.step if progress.step else -1)
    if found is not None:
        console.note(f"resumed from {found[0]} at step {progress.step}")
    return progress
