"""Linear classifiers on frozen features: trained by SGD for several learning rates at once, or by L-BFGS (probe)."""

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
from relicctl.core import checkpoint
from relicctl.core.counter_rng import Stream, permutation
from relicctl.core.loop import Batches, LoopConfig, Task
from relicctl.core.optim import compute_learning_rate
from relicctl.data.loader import ViewLoader
from relicctl.data.sampler import Sampler
from relicctl.evaluation.cells import open_subfolder
from relicctl.evaluation.features import FeatureExtractor, LabelledFeatures
from relicctl.evaluation.labelled_data import LabelledDataset
from relicctl.runs.distributed import RunContext
from relicctl.runs.training import restore_or_start, train_with_progress, warn_of_late_end


@dataclass
class LinearTrainer:
    """Trains classifiers on rows of the training images, by either protocol, through the training loop.

    Ranks split the batches of protocol imagenet. A step of protocol fast costs less than averaging its gradients
    would: every rank trains the same classifiers on all features, and they only agree on stopping.
    ``cache``: of the images of protocol imagenet.
    """

    config: LinearEvalConfig
    images: LabelledDataset
    train_features: LabelledFeatures
    extractor: FeatureExtractor
    cache: str | None
    num_val_images: int = 0

    def choose_batch_size(self, num_images: int) -> int:
        """Return the configured batch size; in protocol fast at most ``num_images``."""
        batch_size = self.config.optim.batch_size
        return min(batch_size, num_images) if self.config.protocol == "fast" else batch_size

    def sweep_rates(self) -> SweepResult:
        """Train all learning rates without a held-out part of the training images, and compare them on that part."""
        config, context, features = self.config, self.extractor.context, self.train_features
        train_rows, val_rows = split_holdout_rows(len(features.labels), config.sweep.val_fraction, config.seed)
        context.console.info(f"{len(config.sweep.lrs)} learning rates, compared on {len(val_rows)} images")
        with open_subfolder(context, context.run.path / "sweep", config.checkpoint.keep) as folder:
            folder.run.write_text(folder.run.config_path, context.run.config_path.read_text("utf-8"))
            classifiers, scaler = self.fit(folder, train_rows, config.sweep.lrs)
        self.num_val_images, val = len(val_rows), features.select(val_rows)
        result = evaluate_rates(classifiers, scaler(val.features) if scaler else val.features, val.labels)
        return SweepResult(*map(tuple, context.world.broadcast_from_main(lambda: (result.rates, result.accuracy))))

    def fit(
        self, context: RunContext, rows: np.ndarray, rates: tuple[float, ...]
    ) -> tuple[LinearClassifierGrid, StandardScaler | None]:
        """Return the classifiers, and what standardises the features that they take."""
        config, world = self.config, context.world
        batch_size = self.choose_batch_size(len(rows))
        sampler = Sampler(config.seed, len(rows), batch_size)
        batches, scaler = self._build_batches(rows, sampler)
        schedule_steps, max_steps = sampler.steps_per_epoch * config.optim.epochs, config.optim.max_steps
        if context.run is self.extractor.context.run:  # else the sweep, whose schedule is shorter
            warn_of_late_end(max_steps, schedule_steps, context.console)
        classifiers = LinearClassifierGrid(self.train_features.features.shape[1], len(self.images.classes), rates)
        task = LinearTask(
            classifiers.to(context.device), batch_size=batch_size, momentum=config.optim.momentum,
            total_steps=schedule_steps, split=config.protocol == "imagenet" and world.size > 1,
        )  # fmt: skip
        loop_config = LoopConfig.from_sections(
            config.checkpoint, config.runtime, total=min(schedule_steps, max_steps or schedule_steps),
            steps_per_epoch=sampler.steps_per_epoch, batch_size=batch_size,
            resume_command=f"relicctl linear-eval {self.extractor.context.run.resume_option}",
        )  # fmt: skip
        state = restore_or_start(task, context, lambda tensors: tensors["state.rates"].tolist() == list(rates))
        if world.is_main and not state.step:  # checkpoints that are there have other learning rates
            for stale in checkpoint.list_checkpoints(context.run.checkpoints_dir):
                stale.unlink()
        train_with_progress(task, batches, loop_config, context, state)
        return classifiers, scaler

    def _build_batches(self, rows: np.ndarray, sampler: Sampler) -> tuple[Batches, StandardScaler | None]:
        if self.config.protocol == "fast":
            train = self.train_features.select(rows)
            scaler = StandardScaler.from_features(train.features)
            return FeatureLoader(scaler(train.features), train.labels, sampler), scaler
        assert self.cache is not None
        source = self.images.source.select(self.train_features.rows[rows])
        loader = self.extractor.build_crop_loader(source, sampler, self.config.crop, self.cache)
        return EncodedFeatureLoader(loader, self.extractor.encoder, self.extractor.context.autocast()), None


class LinearClassifierGrid(nn.Module):
    """Features ``[B, F]`` -> logits ``[B, C, R]``, one classifier per learning rate. All start at zero.

    ``rates`` ``[R]`` are a buffer, so that checkpoints hold them.
    """

    rates: Tensor

    def __init__(self, features: int, classes: int, rates: tuple[float, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features, classes * len(rates)))
        self.bias = nn.Parameter(torch.zeros(classes * len(rates)))
        self.register_buffer("rates", torch.tensor(rates, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        return torch.addmm(self.bias, features, self.weight).view(len(features), -1, len(self.rates))

    def get_classifier(self, number: int) -> LinearClassifier:
        """Return the classifier of one learning rate."""
        weight, bias = (p.detach()[..., number :: len(self.rates)] for p in (self.weight, self.bias))
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
    """Scales features to mean 0 and standard deviation 1 over the training images; constant ones become 0."""

    mean: Tensor
    std: Tensor

    @classmethod
    def from_features(cls, features: Tensor) -> StandardScaler:
        std = features.std(0)
        return cls(features.mean(0), torch.where(std > 1e-6, std, 1.0))

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    def fold_into(self, linear: LinearClassifier) -> LinearClassifier:
        """Return the classifier of raw features that equals ``linear`` on standardised ones."""
        weight = linear.weight / self.std
        return LinearClassifier(weight, linear.bias - weight @ self.mean)


class LinearTask(Task):
    """The loop's task. Learning rates are per 256 images; each falls along a cosine to 0 over ``total_steps``.

    With ``split`` each rank has its rows of the global batch, and gradients are averaged over ranks.
    """

    def __init__(
        self, model: LinearClassifierGrid, *, batch_size: int, momentum: float, total_steps: int, split: bool = False
    ) -> None:
        self.model = model
        self._classifiers: nn.Module = DistributedDataParallel(self.model) if split else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.0, momentum, nesterov=True, foreach=True)
        max_rate = model.rates.max().item()
        self._peak_lr, self._total_steps = max_rate * batch_size / 256, total_steps
        self._loss_weights = (model.rates / max_rate).float()

    def compute_loss(self, batch: tuple[Tensor, Tensor], step: int) -> dict[str, Tensor]:
        """Return ``nll``, the lowest mean cross-entropy of all rates, and ``loss``, their sum weighted by rate."""
        features, labels = batch
        targets = labels[:, None].expand(-1, len(self._loss_weights))
        nll_R = cross_entropy(self._classifiers(features), targets, reduction="none").mean(0)
        return {"loss": self._loss_weights @ nll_R, "nll": nll_R.amin()}

    def get_learning_rate(self, step: int) -> float:
        return compute_learning_rate(step, peak=self._peak_lr, warmup_steps=0, total_steps=self._total_steps)


class FeatureLoader:
    """Batches of extracted features ``[N, F]``; every rank has the whole batch."""

    data_wait_seconds = 0.0

    def __init__(self, features: Tensor, labels: Tensor, sampler: Sampler) -> None:
        self._features, self._labels, self._sampler = features, labels, sampler

    def iter_from_step(self, step: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(step, stop):
            rows = torch.from_numpy(self._sampler.get_batch_indices(number)).to(self._labels.device)
            yield self._features.index_select(0, rows), self._labels[rows]  # five times as fast as indexing


class EncodedFeatureLoader:
    """Batches of features that the frozen encoder computes from a loader's images."""

    def __init__(self, loader: ViewLoader, encoder: nn.Module, autocast: torch.autocast) -> None:
        self._loader, self._encoder, self._autocast = loader, encoder, autocast

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
    """The learning rates of a sweep, and the accuracy of each on the held-out images."""

    rates: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def best_rate(self) -> float:
        """The middle one of equally good rates."""
        best = [rate for rate, value in zip(self.rates, self.accuracy, strict=True) if value == max(self.accuracy)]
        return sorted(best)[len(best) // 2]

    def get_warning(self) -> str | None:
        """Return a sentence when the best rate lies at an end of the sweep, else None."""
        if self.best_rate not in (min(self.rates), max(self.rates)) or len(self.rates) < 3:
            return None
        end, verb = ("smallest", "lower") if self.best_rate == min(self.rates) else ("largest", "raise")
        return f"the best learning rate, {self.best_rate:g}, is the {end} of the sweep: {verb} sweep.lrs"

    def to_dict(self) -> dict[str, Any]:
        return {"rates": list(self.rates), "held_out_top1": list(self.accuracy), "rate": self.best_rate}


def split_holdout_rows(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 rows to train on, and ``fraction`` of all rows to choose on; at least one of each."""
    order = permutation(count, seed, Stream.EVAL)
    num_val = min(max(1, round(fraction * count)), count - 1)
    return np.sort(order[num_val:]), np.sort(order[:num_val])


@torch.no_grad()
def evaluate_rates(classifiers: LinearClassifierGrid, features: Tensor, labels: Tensor) -> SweepResult:
    """Compare all learning rates on held-out ``features`` ``[N, F]``."""
    correct_R = torch.zeros(len(classifiers.rates), device=features.device)
    for rows, truth in zip(torch.split(features, 4096), torch.split(labels, 4096), strict=True):
        correct_R += (classifiers(rows).argmax(1) == truth[:, None]).sum(0)
    accuracy = (correct_R.double() / len(labels)).tolist()
    return SweepResult(tuple(classifiers.rates.tolist()), tuple(accuracy))


def compute_probe_accuracy(
    bank_NF: Tensor, bank_labels: Tensor, queries_MF: Tensor, labels: Tensor, weight_decay: float = 1e-4
) -> float:
    """Return the top-1 accuracy of multinomial logistic regression (L-BFGS) on standardised, detached features."""
    bank, queries = bank_NF.detach().float(), queries_MF.detach().float()
    mean, std = bank.mean(0), bank.std(0) + 1e-6
    bank, queries = (bank - mean) / std, (queries - mean) / std
    classes = int(torch.cat([bank_labels, labels]).max()) + 1
    weight = torch.zeros(bank.shape[1], classes, device=bank.device, requires_grad=True)
    bias = torch.zeros(classes, device=bank.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = cross_entropy(bank @ weight + bias, bank_labels) + weight_decay * weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        solver.step(closure)
    with torch.no_grad():
        return (queries @ weight + bias).argmax(1).eq(labels).float().mean().item()
