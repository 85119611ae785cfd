"""Fine-tuning moves a copy of the encoder, by SGD as written out, with BYOL's rule for BatchNorm."""

from __future__ import annotations

import pytest
import torch

from relicctl.data.views import Batch
from relicctl.evaluation.finetune import FinetuneParams, FinetuneTask, compute_bn_momentum
from tests.helpers.runs import cpu_context, lively_encoder


@pytest.mark.parametrize(("steps", "decay"), [(5, 0.9), (100, 0.9), (101, 1 - 10 / 101), (1000, 0.99)])
def test_norms_forget_slower_in_longer_epochs(steps, decay):
    assert 1 - compute_bn_momentum(steps) == pytest.approx(decay)


def test_what_does_not_count_adds_nothing_to_the_loss():
    encoder = lively_encoder("resnet18", 0.125, "cifar")
    task = FinetuneTask(encoder, 3, FinetuneParams(0.1, 0, 0.9, 4, 400, True, 0), cpu_context())
    images = torch.randn(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, -1, 0], [0, 0, 0], [-1, -1, 1], [1, 1, -1]], dtype=torch.int8)
    share = task.compute_loss(Batch([images], labels), 0)["loss"]
    logits = task.model.train()(images[0])  # the same batch: the same statistics
    losses = torch.nn.functional.softplus(-labels * logits)
    torch.testing.assert_close(share, (losses * (labels != 0)).sum() / 12)


@pytest.mark.parametrize("one_vs_rest", [False, True])
def test_a_step_is_nesterovs_on_all_parameters_and_the_encoder_itself_stays(one_vs_rest):
    encoder = lively_encoder("resnet18", 0.125, "cifar")
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    tuning = FinetuneParams(0.1, 0.01, 0.9, 4, 400, one_vs_rest, 0)
    task = FinetuneTask(encoder, 3, tuning, cpu_context())
    norms = [m for m in task.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {compute_bn_momentum(400)}
    batch = Batch([torch.randn(1, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0))], torch.arange(8) % 3)
    start = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    task.compute_loss(batch, 0)["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in task.model.named_parameters()}
    assert task.get_learning_rate(0) == 0.1
    task.optimizer.step()
    for name, parameter in task.model.named_parameters():
        slope = gradients[name] + 0.01 * start[name]
        torch.testing.assert_close(parameter.detach(), start[name] - 0.1 * 1.9 * slope)
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())
    assert task.get_learning_rate(4) == pytest.approx(0)
