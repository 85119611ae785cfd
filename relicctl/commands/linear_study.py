"""How a linear evaluation looks at images, and how it trains classifiers on what it sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from relicctl.commands.common import readable, worker_count
from relicctl.commands.linear_job import open_folder
from relicctl.config.linear import LinearConfig
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.distributed import World
from relicctl.core.loop import Batches, Plan, Progress, restore, train
from relicctl.data.augment import Photometric
from relicctl.data.bad_images import BadImages
from relicctl.data.feed import Feed, ViewPlan, ViewSize
from relicctl.data.sampler import Sampler
from relicctl.evaluation.features import CHUNK, EvalImages, extract
from relicctl.evaluation.labelled import Labelled
from relicctl.evaluation.linear import Classifiers, EncodedBatches, FeatureBatches, LinearTask, Standard
from relicctl.evaluation.sweep import Choice, choose, hold_out
from relicctl.runs import RunFolder


@dataclass(frozen=True)
class Seen:
    """What the encoder makes of labelled images: ``features`` ``[N, F]``, ``labels`` ``[N]``, ``rows`` in the data."""

    features: Tensor
    labels: Tensor
    rows: np.ndarray


class Look:
    """The encoder, frozen, and how it is shown images. Those that cannot be decoded are left out and noted."""

    def __init__(
        self, encoder: Any, config: LinearConfig, device: torch.device, run: RunFolder, console: Console
    ) -> None:
        self.encoder: nn.Module = encoder.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.size = config.eval.size or int(encoder.metadata["size"])
        self.crop_ratio = config.eval.crop_ratio or float(encoder.metadata["crop_ratio"])
        self.device, self._console, self._max_bad = device, console, config.data.max_bad
        self._run, self._listed = run, run.read_bad_images()

    def bad_images(self, images: Labelled) -> BadImages:
        return BadImages(len(images.source), self._max_bad, self._list)

    def _list(self, name: str, reason: str) -> None:
        if name not in self._listed:
            self._listed.add(name)
            self._run.add_bad_image(name, reason)

    def __call__(self, images: Labelled) -> Seen:
        crops = EvalImages(images.source, self.size, self.crop_ratio)
        steps = -(-len(crops) // CHUNK)
        self._console.note(f"features of {len(crops)} images of {images.source.spec}, {CHUNK} a step")
        with self._console.progress(steps) as bar:

            def counted() -> Iterator[np.ndarray]:
                for step, chunk in enumerate(crops):
                    yield chunk
                    bar.update(step + 1, {})

            features = extract(self.encoder, counted(), self.device)
        rows = crops.good_rows(self.bad_images(images))
        picked = torch.from_numpy(rows).to(self.device)
        return Seen(features[picked], torch.from_numpy(images.labels[rows]).to(self.device), rows)


class Study:
    """Trains classifiers on rows of the training images, by either protocol, through the training loop."""

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
        folder = open_folder(self._run.path / "sweep", resumed=True, overwrite=False, config=self._config)
        folder.write_text(folder.config, self._run.config.read_text("utf-8"))
        kept, held = hold_out(len(self._known.labels), self._config.sweep.holdout, self._config.seed)
        self._console.note(f"{len(self._config.sweep.rates)} learning rates, compared on {len(held)} images")
        classifiers, standard = self.fit(folder, kept, self._config.sweep.rates)
        features, labels = (t[torch.from_numpy(held).to(t.device)] for t in (self._known.features, self._known.labels))
        self.held_out = len(held)
        folder.close()
        return choose(classifiers, standard(features) if standard else features, labels)

    def fit(self, folder: RunFolder, rows: np.ndarray, rates: tuple[float, ...]) -> tuple[Classifiers, Standard | None]:
        """The classifiers, and what standardises the features that they take."""
        config, device = self._config, self._look.device
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
        progress = go_on(folder, task, rates, self._console)
        with self._console.progress(plan.total, progress.step) as bar:
            train(
                task,
                batches,
                plan,
                folder,
                progress=progress,
                device=device,
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
            world=World(),
            cache=self._record["cache"],
            workers=worker_count(config.runtime, look.device, self._record["cache"]),
            bad=look.bad_images(self._images),
        )
        autocast = torch.autocast(look.device.type, torch.bfloat16, enabled=self._record["precision"] == "bf16")
        return EncodedBatches(feed, look.encoder, autocast), None


def go_on(folder: RunFolder, task: LinearTask, rates: tuple[float, ...], console: Console) -> Progress:
    """From the newest checkpoint of these rates that can be read; else from the start."""
    found = checkpoint.newest_valid(folder.checkpoints, console.warn)
    if found is not None and found[1]["state.rates"].tolist() == list(rates):
        progress = restore(task, found[1], found[2], str(found[0]))
    else:
        progress = Progress()
        for stale in checkpoint.listed(folder.checkpoints):
            stale.unlink()
    folder.rewind_metrics(progress.step if progress.step else -1)
    if progress.step:
        console.note(f"resumed from {found[0] if found else folder.path} at step {progress.step}")
    return progress
