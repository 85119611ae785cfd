"""How a linear evaluation trains classifiers on what it sees of the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from relicctl.config.linear_eval import LinearEvalConfig
from relicctl.console import Console
from relicctl.core import checkpoint
from relicctl.core.counter_rng import Stream, permutation
from relicctl.core.distributed import World
from relicctl.core.loop import Batches, LoopConfig, Task, TrainState, restore_state, train
from relicctl.core.optim import compute_learning_rate
from relicctl.data.loader import LoaderConfig, ViewLoader
from relicctl.data.photometric import AugmentConfig
from relicctl.data.sampler import Sampler
from relicctl.data.views import CropSpec, ViewSpec
from relicctl.evaluation.features import ExtractedFeatures, FeatureExtractor
from relicctl.evaluation.labelled_data import LabelledDataset
from relicctl.runs.distributed import (
    load_newest_checkpoint,
    open_or_create_run_folder,
    resolve_num_workers,
    select_progress_metrics,
)
from relicctl.runs.folder import RunFolder


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
        path, keep = self._run.path / "sweep", self._config.checkpoint.keep
        folder = open_or_create_run_folder(world, path, resumed=(path / "config.yaml").is_file(), keep=keep)
        folder.write_text(folder.config_path, self._run.config_path.read_text("utf-8"))
        train_rows, val_rows = split_holdout_rows(
            len(self._train_features.labels), self._config.sweep.val_fraction, self._config.seed
        )
        self._console.info(f"{len(self._config.sweep.lrs)} learning rates, compared on {len(val_rows)} images")
        classifiers, standard = self.fit(folder, train_rows, self._config.sweep.lrs)
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
        size = CropSpec(1, extractor.size, config.crop.scale)
        flip = AugmentConfig(
            hflip_prob=config.crop.hflip_prob,
            color_jitter_prob=0,
            grayscale_prob=0,
            blur_prob=(0, 0),
            solarize_prob=(0, 0),
        )
        feed = ViewLoader(
            self._images.source.select(train_features.rows[rows]),
            sampler,
            ViewSpec((size,), config.crop.ratio, flip),
            LoaderConfig(
                config.seed,
                extractor.device,
                extractor.world,
                cache=self._record["cache"],
                workers=resolve_num_workers(config.runtime, extractor.device, self._record["cache"]),
            ),
            extractor.collect_bad_images(self._images),
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


class LinearClassifierGrid(nn.Module):
    """Features ``[B, F]`` -> logits ``[B, C, R]``. All start at zero; ``rates`` ``[R]`` go into checkpoints too."""

    rates: Tensor

    def __init__(self, features: int, classes: int, rates: tuple[float, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features, classes * len(rates)))
        self.bias = nn.Parameter(torch.zeros(classes * len(rates)))
        self.register_buffer("rates", torch.tensor(rates, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        return torch.addmm(self.bias, features, self.weight).unflatten(1, (-1, len(self.rates)))

    def get_classifier(self, number: int) -> LinearClassifier:
        """The classifier of one rate."""
        weight, bias = (p.detach().unflatten(-1, (-1, len(self.rates)))[..., number] for p in (self.weight, self.bias))
        return LinearClassifier(weight.T.contiguous(), bias.contiguous())


@dataclass(frozen=True)
class LinearClassifier:
    """``weight`` ``[C, F]``, ``bias`` ``[C]``."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return nn.functional.linear(features, self.weight, self.bias)


@dataclass(frozen=True)
class StandardScaler:
    """Features brought to mean 0 and deviation 1 over the training images; constant ones stay 0."""

    mean: Tensor
    std: Tensor

    @classmethod
    def from_features(cls, features: Tensor) -> StandardScaler:
        deviation = features.std(0)
        return cls(features.mean(0), torch.where(deviation > 1e-6, deviation, 1.0))

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    def fold_into(self, linear: LinearClassifier) -> LinearClassifier:
        """The classifier of raw features that equals ``linear`` on standardised ones."""
        weight = linear.weight / self.std
        return LinearClassifier(weight, linear.bias - weight @ self.mean)


class LinearTask(Task):
    """The loop's task. ``rates`` are per 256 images; each falls along a cosine to 0 over ``total_steps``.

    With ``split`` each process has its rows of the global batch, and gradients are averaged over them.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        rates: tuple[float, ...],
        *,
        batch_size: int,
        momentum: float,
        total_steps: int,
        device: torch.device,
        split: bool = False,
    ) -> None:
        self.model: LinearClassifierGrid = LinearClassifierGrid(features, classes, rates).to(device)
        self._classifiers: nn.Module = DistributedDataParallel(self.model) if split else self.model
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.model.parameters(), 0.0, momentum, nesterov=True, foreach=True
        )
        self._peak_lr, self._total_steps = max(rates) * batch_size / 256, total_steps
        self._loss_weights = (self.model.rates / max(rates)).float()

    def compute_loss(self, batch: tuple[Tensor, Tensor], step: int) -> dict[str, Tensor]:
        """``nll``: mean cross-entropy of the rate that fits the batch best; ``loss``: all, weighted by their rates."""
        features, labels = batch
        targets = labels[:, None].expand(-1, len(self._loss_weights))
        nll_R = cross_entropy(self._classifiers(features), targets, reduction="none").mean(0)
        return {"loss": self._loss_weights @ nll_R, "nll": nll_R.amin()}

    def get_learning_rate(self, step: int) -> float:
        return compute_learning_rate(step, peak=self._peak_lr, warmup_steps=0, total_steps=self._total_steps)


class FeatureLoader:
    """Batches of features ``[N, F]`` that are there already; every process has the whole batch."""

    data_wait_seconds = 0.0

    def __init__(self, features: Tensor, labels: Tensor, sampler: Sampler) -> None:
        self._features, self._labels, self._sampler = features, labels, sampler

    def iter_from_step(self, step: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(step, stop):
            rows = torch.from_numpy(self._sampler.get_batch_indices(number)).to(self._labels.device)
            yield self._features.index_select(0, rows), self._labels[rows]  # five times as fast as indexing


class EncodedFeatureLoader:
    """The features of a feed's images, made as they come. The encoder is in eval mode, and only looked through."""

    def __init__(self, feed: ViewLoader, encoder: nn.Module, autocast: torch.autocast) -> None:
        self._loader, self._encoder, self._autocast = feed, encoder, autocast

    @property
    def data_wait_seconds(self) -> float:
        return self._loader.data_wait_seconds

    def iter_from_step(self, step: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._loader.iter_from_step(step, stop):
            assert not any(module.training for module in self._encoder.modules()), "the encoder left eval mode"
            assert batch.labels is not None
            with torch.no_grad(), self._autocast:
                features = self._encoder(batch.views[0][0])
            yield features.float(), batch.labels


@dataclass(frozen=True)
class SweepResult:
    """``rates`` that were tried, each one's ``accuracy`` on the held-out images, and the best, ``rate``."""

    rates: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def best_rate(self) -> float:
        """Of several that are as good the middle one."""
        best = [rate for rate, value in zip(self.rates, self.accuracy, strict=True) if value == max(self.accuracy)]
        return sorted(best)[len(best) // 2]

    def get_warning(self) -> str | None:
        """A sentence when the best rate lies at an end of those tried, else None."""
        if self.best_rate not in (min(self.rates), max(self.rates)) or len(self.rates) < 3:
            return None
        end, verb = ("smallest", "lower") if self.best_rate == min(self.rates) else ("largest", "raise")
        return f"the best learning rate, {self.best_rate:g}, is the {end} of the sweep: {verb} sweep.lrs"

    def to_dict(self) -> dict[str, Any]:
        return {"rates": list(self.rates), "held_out_top1": list(self.accuracy), "rate": self.best_rate}


def split_holdout_rows(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 rows to train on, and those to choose on: ``share`` of ``count``, at least one of each."""
    order = permutation(count, seed, Stream.EVAL)
    held = min(max(1, round(share * count)), count - 1)
    return np.sort(order[held:]), np.sort(order[:held])


@torch.no_grad()
def evaluate_rates(classifiers: LinearClassifierGrid, features: Tensor, labels: Tensor) -> SweepResult:
    """Compare all rates on held-out ``features`` ``[N, F]``."""
    correct_R = torch.zeros(len(classifiers.rates), device=features.device)
    for rows, truth in zip(features.split(4096), labels.split(4096), strict=True):
        correct_R += (classifiers(rows).argmax(1) == truth[:, None]).sum(0)
    accuracy = (correct_R.double() / len(labels)).tolist()
    return SweepResult(tuple(classifiers.rates.tolist()), tuple(accuracy))


def compute_probe_accuracy(
    bank_NF: torch.Tensor,
    bank_labels: torch.Tensor,
    queries_MF: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight_decay: float = 1e-4,
    iterations: int = 100,
) -> float:
    """Top-1 of multinomial logistic regression (L-BFGS) on standardised, detached features."""
    bank, queries = bank_NF.detach().float(), queries_MF.detach().float()
    mean, std = bank.mean(0), bank.std(0) + 1e-6
    bank, queries = (bank - mean) / std, (queries - mean) / std
    classes = int(torch.cat([bank_labels, labels]).max()) + 1
    weight = torch.zeros(bank.shape[1], classes, device=bank.device, requires_grad=True)
    bias = torch.zeros(classes, device=bank.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = cross_entropy(bank @ weight + bias, bank_labels) + weight_decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    with torch.no_grad():
        return (queries @ weight + bias).argmax(1).eq(labels).float().mean().item()
