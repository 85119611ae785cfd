"""Linear classifiers on frozen features, one for each learning rate, trained side by side by the training loop.

All rates see the same batches, and one matrix product serves them all. That each has its own rate costs nothing:
momentum SGD without weight decay is linear in its gradients, so a rate is a weight of its classifier's loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from relicctl.core.schedules import compute_learning_rate
from relicctl.data.feed import ViewLoader
from relicctl.data.sampler import Sampler


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


class LinearTask:
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
        self.model = LinearClassifierGrid(features, classes, rates).to(device)
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

    def after_step(self, step: int) -> None:
        pass

    def compute_metrics(self, step: int) -> dict[str, float]:
        return {}


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
