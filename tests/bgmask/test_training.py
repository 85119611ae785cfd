"""What a mask network is trained on, and what it minimises."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relicctl.bgmask.training import MaskAugmentation, MaskLoader, MaskTask, MaskTrainingSet, Stage, mask_loss
from relicctl.config.bgmask import MaskLossConfig, MaskOptimConfig
from relicctl.core.counter_rng import fork_seeded_rng
from relicctl.core.loop import LoopConfig, TrainState, restore_state, snapshot_state, train
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.photometric import AugmentConfig

CPU = torch.device("cpu")
PLAIN = AugmentConfig(
    hflip_prob=0.0, color_jitter_prob=0.0, grayscale_prob=0.0, blur_prob=(0.0, 0.0), solarize_prob=(0.0, 0.0)
)
WHOLE = MaskAugmentation(16, (1.0, 1.0), (1.0, 1.0), PLAIN)
BCE = MaskLossConfig(bce=1, iou=0, fbeta=0)
IOU = MaskLossConfig(bce=0, iou=1, fbeta=0)
F = MaskLossConfig(bce=0, iou=0, fbeta=1, fbeta_beta2=0.3)
ALL = MaskLossConfig(bce=1, iou=1, fbeta=1)


def labelled(count=12, side=16):
    """Images whose red plane is their label, and whose blue one is their weight."""
    images = torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return MaskTrainingSet(images, images[:, :1].clone(), images[:, 2:].clone())


def batches(views, data=None, **more):
    return MaskLoader(data or labelled(), views, batch_size=4, seed=3, **more)


def planes(batch):
    """The images of a batch as they were before normalising."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return batch.images * std + mean


def test_a_label_and_its_weight_go_through_the_same_crop_and_flip_as_the_image():
    views = MaskAugmentation(
        24,
        (0.3, 1.0),
        (0.75, 1.33),
        AugmentConfig(hflip_prob=0.5, color_jitter_prob=0, grayscale_prob=0, blur_prob=(0, 0), solarize_prob=(0, 0)),
    )
    for batch in batches(views).iter_from_step(0, 6):
        torch.testing.assert_close(planes(batch)[:, :1], batch.labels, atol=1e-5, rtol=0)
        torch.testing.assert_close(planes(batch)[:, 2:], batch.weights, atol=1e-5, rtol=0)


def test_prior_channels_go_through_the_same_crop_and_flip_as_the_image():
    views = MaskAugmentation(
        24,
        (0.3, 1.0),
        (0.75, 1.33),
        AugmentConfig(hflip_prob=0.5, color_jitter_prob=0, grayscale_prob=0, blur_prob=(0, 0), solarize_prob=(0, 0)),
    )
    plain = labelled()
    hinted = replace(plain, prior_channels=torch.cat([plain.images, plain.images[:, :1]], 1))
    for bare, batch in zip(
        batches(views, plain).iter_from_step(0, 6),
        batches(views, hinted).iter_from_step(0, 6),
        strict=True,
    ):
        assert batch.images.shape == (4, 7, 24, 24)
        assert torch.equal(batch.images[:, :3], bare.images)
        assert torch.equal(batch.labels, bare.labels)
        assert torch.equal(batch.weights, bare.weights)
        torch.testing.assert_close(batch.images[:, 3:6] + 0.5, planes(bare), atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.images[:, 6:] + 0.5, batch.labels, atol=1e-5, rtol=0)


def test_colours_change_the_image_and_leave_the_label():
    plain = next(batches(WHOLE).iter_from_step(0, 1))
    coloured = next(
        batches(
            MaskAugmentation(16, (1.0, 1.0), (1.0, 1.0), AugmentConfig(hflip_prob=0.0, color_jitter_prob=1.0))
        ).iter_from_step(0, 1)
    )
    assert not torch.allclose(plain.images, coloured.images)
    assert torch.equal(plain.labels, coloured.labels)


def test_an_epoch_shows_every_image_once():
    data = labelled()
    seen = torch.cat([batch.labels for batch in batches(WHOLE, data).iter_from_step(0, 3)])
    expected = data.labels / 255
    assert sorted(seen.sum((1, 2, 3)).tolist()) == pytest.approx(sorted(expected.sum((1, 2, 3)).tolist()), rel=1e-4)


def test_a_batch_depends_on_its_step_alone():
    views = MaskAugmentation(16, (0.3, 1.0), (0.75, 1.33), AugmentConfig())
    straight = list(batches(views).iter_from_step(0, 7))
    later = list(batches(views, first=100).iter_from_step(104, 107))
    for a, b in zip(straight[4:], later, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


# The loss


def literal(logits, labels, weights, terms):
    """The loss in float64, pixel by pixel and image by image."""
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    y, w = labels.double().numpy(), weights.double().numpy()
    cross = -(w * (y * np.log(p) + (1 - y) * np.log1p(-p))).sum() / w.sum()
    ious, fs = [], []
    for one in range(len(p)):
        both, predicted, wanted = ((w * x)[one].sum() for x in (p * y, p, y))
        precision, recall = both / predicted, both / wanted
        ious.append(both / (predicted + wanted - both))
        fs.append((1 + terms.fbeta_beta2) * precision * recall / (terms.fbeta_beta2 * precision + recall))
    return terms.bce * cross + terms.iou * (1 - np.mean(ious)) + terms.fbeta * (1 - np.mean(fs))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([BCE, IOU, F, MaskLossConfig(bce=0.7, iou=1.3, fbeta=0.5, fbeta_beta2=4.0)])
)
def test_loss_equals_the_literal_loop(seed, terms):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, 1, 5, 7, generator=generator)
    labels, weights = torch.rand(2, 3, 1, 5, 7, generator=generator)
    found = mask_loss(logits, labels, weights, terms)
    assert float(found) == pytest.approx(literal(logits, labels, weights, terms), rel=1e-4)


@pytest.mark.parametrize("terms", [BCE, IOU, F])
def test_loss_of_a_certain_prediction_is_zero_if_right_and_large_if_wrong(terms):
    labels = torch.zeros(1, 1, 4, 4)
    labels[..., :2] = 1
    certain = 200 * labels - 100  # beyond what a sigmoid of 32 bits can tell from 0 and 1
    weights = torch.ones_like(labels)
    assert float(mask_loss(certain, labels, weights, terms)) < 1e-4
    assert float(mask_loss(-certain, labels, weights, terms)) > 0.9


@pytest.mark.parametrize("terms", [BCE, IOU, F])
@pytest.mark.parametrize("logit", [-1e4, 0.0, 1e4])
def test_empty_labels_no_weight_and_extreme_logits_have_finite_gradients(terms, logit):
    for weight in (0.0, 1.0):
        logits = torch.full((2, 1, 4, 4), logit, requires_grad=True)
        loss = mask_loss(logits, torch.zeros_like(logits), torch.full_like(logits, weight), terms)
        loss.backward()
        assert math.isfinite(loss.item())
        assert bool(torch.isfinite(logits.grad).all())


def test_pixels_of_weight_zero_have_no_gradient():
    logits = torch.randn(2, 1, 4, 4, requires_grad=True)
    weights = torch.ones(2, 1, 4, 4)
    weights[..., 2:] = 0
    mask_loss(logits, torch.rand(2, 1, 4, 4), weights, ALL).backward()
    assert bool((logits.grad[..., 2:] == 0).all())
    assert bool((logits.grad[..., :2] != 0).any())


# In the loop


class Journal:
    def __init__(self):
        self.saved = {}

    def write_metrics(self, record): ...

    def save(self, step, tensors, header):
        self.saved[step] = {name: t.clone() for name, t in tensors.items()}, dict(header)

    def get_last_checkpoint(self):
        return None


class Outputs(torch.nn.Module):
    """Two outputs from a layer with a norm, which has a state besides its weights."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3, padding=1), torch.nn.BatchNorm2d(2))

    def forward(self, x):
        return list(self.layer(x).split(1, 1))


def task():
    with fork_seeded_rng(1):
        net = Outputs()
    optim = MaskOptimConfig(base_lr=0.05, weight_decay=0.01, warmup_epochs=2)
    stage = Stage(0, "final", epochs=12, first=5, last=17)
    return MaskTask(net, MaskLossConfig(), optim, stage, torch.autocast("cpu", torch.bfloat16, enabled=False))


def train_until(doing, progress, total, journal):
    data = labelled(side=8)
    loader = batches(MaskAugmentation(8, (0.3, 1.0), (0.75, 1.33), AugmentConfig()), data, first=5)
    plan = LoopConfig(total, 3, 4, log_every=2, checkpoint_every=2)
    return train(doing, loader, plan, journal, state=progress, device=CPU)


def test_stopped_and_resumed_equals_uninterrupted_to_the_bit():
    whole, cut = Journal(), Journal()
    train_until(task(), TrainState(5), 17, whole)
    train_until(task(), TrainState(5), 11, cut)
    resumed = task()
    train_until(resumed, restore_state(resumed, *cut.saved[11], "x"), 17, cut)
    for name, tensor in whole.saved[17][0].items():
        assert torch.equal(tensor, cut.saved[17][0][name]), name
    assert snapshot_state(resumed, TrainState(17))[0].keys() <= whole.saved[17][0].keys()


def test_learning_rate_warms_up_and_decays_to_nearly_zero():
    doing = task()
    rates = [doing.get_learning_rate(step) for step in range(5, 17)]
    assert rates[0] == pytest.approx(0.025)
    assert max(rates) == rates[1] == pytest.approx(0.05)
    assert 0 < rates[-1] < 0.002
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_all_outputs_are_supervised_and_training_learns_its_labels():
    doing, journal = task(), Journal()
    before = [o.detach() for o in doing.model(torch.randn(2, 3, 8, 8))]
    assert len(before) == 2
    losses = doing.compute_loss(next(batches(WHOLE).iter_from_step(0, 1)), 5)
    losses["loss"].backward()
    assert bool((doing.model.layer[0].weight.grad.flatten(1).norm(dim=1) > 0).all())
    doing.optimizer.zero_grad()
    first = losses["loss"].item()
    train_until(doing, TrainState(5), 17, journal)
    assert doing.compute_loss(next(batches(WHOLE).iter_from_step(0, 1)), 5)["loss"].item() < first
