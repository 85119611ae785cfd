"""Laws of segmentation: what is counted, what is cropped, and whose pixels the loss is the mean of."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from relicctl.config.resolve import resolve_config
from relicctl.config.transfer import SegmentationConfig, SegmentationCropConfig
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.evaluation.dense.segmentation import (
    PAD_COLOR,
    SegmentationTask,
    SegmentationTransform,
    compute_confusion_matrix,
    compute_iou,
)
from tests.helpers.runs import cpu_context, lively_encoder

QUICK = ["head.channels=8", "head.dilation=2", "crop.size=32", "runtime.device=cpu"]


@pytest.fixture(scope="module")
def encoder():
    encoder = lively_encoder("resnet18", 0.125, "stride2")
    encoder.metadata = {"mean": json.dumps(IMAGENET_MEAN), "std": json.dumps(IMAGENET_STD)}
    return encoder


def task(encoder, *sets: str) -> SegmentationTask:
    config = resolve_config(sets=[*QUICK, *sets], schema=SegmentationConfig).config
    return SegmentationTask(encoder, 4, config, cpu_context())


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(seed)
    images = torch.from_numpy(generator.integers(0, 256, (3, 32, 32, 3), np.uint8))
    masks = torch.from_numpy(generator.integers(0, 4, (3, 32, 32)).astype(np.uint8))
    masks[0, :20], masks[1] = 255, 255
    return images, masks


def test_mean_intersection_over_union_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (2, 30, 20), generator=generator)
    told = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth, torch.randint(0, 5, truth.shape))
    truth[0, :4] = 255
    counted = truth != 255
    shares = compute_iou(compute_confusion_matrix(truth, told, 7))
    there = ~shares.isnan()
    assert there.tolist() == [True] * 5 + [False] * 2
    expected = jaccard_score(truth[counted], told[counted], average=None)
    np.testing.assert_allclose(shares[there].numpy(), expected, rtol=0, atol=1e-15)


def test_the_loss_is_the_mean_over_pixels_that_count(encoder):
    learner, (images, masks) = task(encoder), batch()
    loss = learner.compute_loss((images, masks), 0)["loss"]
    pixels = ((images / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(0, 3, 1, 2)
    scores = torch.log_softmax(learner.model(pixels), 1)
    counted = [-scores[i, int(masks[i, y, x]), y, x] for i, y, x in np.ndindex(*masks.shape) if masks[i, y, x] != 255]
    torch.testing.assert_close(loss, torch.stack(counted).mean(), rtol=0, atol=1e-5)


def test_a_batch_in_which_nothing_counts_is_no_division_by_zero(encoder):
    learner = task(encoder)
    loss = learner.compute_loss((batch()[0], torch.full((3, 32, 32), 255, dtype=torch.uint8)), 0)["loss"]
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize(
    ("sets", "weights_move", "statistics_move"),
    [([], True, True), (["model.freeze_bn=true"], True, False), (["model.freeze_encoder=true"], False, False)],
)
def test_what_is_frozen_stays_as_it_is(encoder, sets, weights_move, statistics_move):
    learner = task(encoder, *sets, "optim.base_lr=0.1")
    before = {name: t.clone() for name, t in learner.model.state_dict().items()}
    learner.model.train()
    learner.compute_loss(batch(), 0)["loss"].backward()
    learner.optimizer.step()
    moved = {name for name, t in learner.model.state_dict().items() if not torch.equal(t, before[name])}
    assert ("encoder.layer1.0.conv1.weight" in moved) == weights_move
    assert ("encoder.layer1.0.bn1.running_mean" in moved) == statistics_move
    assert ("encoder.layer1.0.bn1.weight" in moved) == statistics_move
    assert {"head.0.weight", "head.1.running_mean"} <= moved


def crop(image, mask, uniform, **told) -> tuple[np.ndarray, np.ndarray]:
    transform = SegmentationTransform(SegmentationConfig(crop=SegmentationCropConfig(**told)))
    return tuple(t.numpy() for t in transform(image, mask, np.array(uniform)))


def test_image_and_mask_are_cropped_alike():
    """An image that says where each of its pixels lies."""
    rows, columns = np.mgrid[:40, :50].astype(np.uint8)
    image = np.stack([rows, columns, rows], -1)
    for uniform in ([0.3, 0.2, 0.9, 0.1], [0.9, 0.99, 0.0, 0.7], [0.0, 0.5, 0.5, 0.4], [0.5, 0.0, 0.6, 0.9]):
        square, labels = crop(image, rows, uniform, size=32, scale=(0.4, 2.0))
        there = labels != 255
        assert there.any()
        assert np.abs(square[..., 0].astype(int) - labels)[there].max() <= 2  # nearest against blended
        assert (square[~there] == PAD_COLOR).all()


def test_at_its_own_scale_nothing_is_resampled_and_a_flip_is_a_flip():
    generator = np.random.default_rng(0)
    image, mask = generator.integers(0, 256, (40, 50, 3), np.uint8), generator.integers(0, 9, (40, 50)).astype(np.uint8)
    square, labels = crop(image, mask, [0.5, 0.999, 0.0, 0.9], size=32, scale=(1, 1))
    np.testing.assert_array_equal(square, image[8:, :32])
    np.testing.assert_array_equal(labels, mask[8:, :32])
    flipped = crop(image, mask, [0.5, 0.999, 0.0, 0.1], size=32, scale=(1, 1))
    np.testing.assert_array_equal(flipped[0], square[:, ::-1])
    np.testing.assert_array_equal(flipped[1], labels[:, ::-1])


def test_a_smaller_image_lies_whole_in_the_square():
    image, mask = np.full((20, 24, 3), 7, np.uint8), np.ones((20, 24), np.uint8)
    square, labels = crop(image, mask, [0, 0.5, 0.999, 0.9], size=32, scale=(1, 1))
    assert (labels != 255).sum() == 20 * 24
    assert (labels[6:26, 8:] == 1).all()
    assert (square[6:26, 8:] == 7).all()
    assert SegmentationTask.collate([(torch.ones(2), torch.ones(1))])[0].shape == (1, 2)
