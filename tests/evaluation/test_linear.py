"""Classifiers trained side by side are the classifiers trained alone."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from relicctl.core.loop import LoopConfig, TrainState, train
from relicctl.core.optim import compute_learning_rate
from relicctl.data.sampler import Sampler
from relicctl.data.views import Batch
from relicctl.evaluation.linear import (
    EncodedFeatureLoader,
    FeatureLoader,
    LinearClassifier,
    LinearClassifierGrid,
    LinearTask,
    StandardScaler,
)

CPU = torch.device("cpu")
RATES = (0.02, 5.0, 0.3)
STEPS = 24


class NullLogger:
    def write_metrics(self, record):
        pass

    def save(self, step, tensors, header):
        pass

    def get_last_checkpoint(self):
        return None


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (96,), generator=generator)
    return torch.randn(96, 7, generator=generator) + nn.functional.one_hot(labels, 7), labels


def trained(data, rates):
    sampler = Sampler(0, 96, 32)
    task = LinearTask(LinearClassifierGrid(7, 4, rates), batch_size=32, momentum=0.9, total_steps=STEPS)
    plan = LoopConfig(total=STEPS, steps_per_epoch=3, batch_size=32)
    train(task, FeatureLoader(*data, sampler), plan, NullLogger(), state=TrainState(), device=CPU)
    return task.model


def test_every_rate_of_a_sweep_trains_as_plain_sgd_does_alone(data):
    together = trained(data, RATES)
    features, labels = data
    sampler = Sampler(0, 96, 32)
    for number, rate in enumerate(RATES):
        alone = nn.Linear(7, 4)
        nn.init.zeros_(alone.weight)
        nn.init.zeros_(alone.bias)
        sgd = torch.optim.SGD(alone.parameters(), 1.0, momentum=0.9, nesterov=True)
        for step in range(STEPS):
            sgd.param_groups[0]["lr"] = compute_learning_rate(
                step, peak=rate * 32 / 256, warmup_steps=0, total_steps=STEPS
            )
            rows = torch.from_numpy(sampler.get_batch_indices(step))
            sgd.zero_grad()
            nn.functional.cross_entropy(alone(features[rows]), labels[rows]).backward()
            sgd.step()
        linear = together.get_classifier(number)
        torch.testing.assert_close(linear.weight, alone.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(linear.bias, alone.bias, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(linear(features), together(features)[..., number])


def test_a_single_rate_logs_its_own_loss(data):
    task = LinearTask(LinearClassifierGrid(7, 4, (0.3,)), batch_size=32, momentum=0.9, total_steps=STEPS)
    losses = task.compute_loss(data, 0)
    torch.testing.assert_close(losses["loss"], torch.tensor(4.0).log())  # it starts at zero: all classes alike
    assert losses["loss"] == losses["nll"]
    assert task.get_learning_rate(0) == pytest.approx(0.3 * 32 / 256)


def test_a_folded_classifier_gives_the_same_logits_from_raw_features(data):
    features = data[0] * torch.arange(1.0, 8) + 3
    features[:, 2] = 1.5  # a constant channel
    standard = StandardScaler.from_features(features)
    generator = torch.Generator().manual_seed(1)
    linear = LinearClassifier(torch.randn(4, 7, generator=generator), torch.randn(4, generator=generator))
    torch.testing.assert_close(standard.fold_into(linear)(features), linear(standard(features)))
    kept = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(standard(features).mean(0), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard(features).std(0)[kept], torch.ones(6))


def test_an_encoder_outside_eval_mode_is_refused():
    batch = Batch([torch.zeros(1, 2, 3, 4, 4)], torch.zeros(2, dtype=torch.int64))
    feed = SimpleNamespace(iter_from_step=lambda step, stop: iter([batch]), data_wait_seconds=0.0)
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48)).eval()
    batches = EncodedFeatureLoader(feed, encoder, torch.autocast("cpu", enabled=False))
    features, _ = next(batches.iter_from_step(0, 1))
    assert features.shape == (2, 48)
    assert not features.requires_grad
    encoder[1].train()
    with pytest.raises(AssertionError, match="eval mode"):
        next(batches.iter_from_step(0, 1))
