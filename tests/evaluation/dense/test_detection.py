"""Laws of detection: counted draws, strict weights, flips, and COCO's average precision against a literal one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from relicctl.config.resolve import resolve_config
from relicctl.config.transfer import DetectionConfig
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.datasets.voc import Boxes
from relicctl.evaluation.dense.detection import (
    Detections,
    DetectionTask,
    DetectionTransform,
    build_detector,
    compute_average_precision,
)
from relicctl.evaluation.dense.detection_data import build_shapes_detection
from tests.helpers.runs import cpu_context, lively_encoder

QUICK = ["head.channels=8", "head.hidden=16", "images.min_size=[32, 40]", "images.max_size=48",
         "head.box_batch_size_per_image=8", "head.rpn_post_nms_top_n_train=20", "head.rpn_post_nms_top_n_test=20",
         "head.anchors=[4, 8, 12, 16, 24]"]  # fmt: skip


def describe(encoder):
    encoder.metadata = {"mean": json.dumps(IMAGENET_MEAN), "std": json.dumps(IMAGENET_STD)}
    return encoder


def config(*sets: str) -> DetectionConfig:
    return resolve_config(sets=[*QUICK, *sets], schema=DetectionConfig).config


@pytest.fixture(scope="module")
def shapes():
    return build_shapes_detection(ShapesDataset.from_spec("shapes:size=32,train=8,val=12", "val"))


@pytest.fixture(scope="module")
def encoder():
    return describe(lively_encoder("resnet18", 0.125, "stride2"))


def task(encoder, *sets: str) -> DetectionTask:
    return DetectionTask(encoder, 10, config(*sets), cpu_context())


def batch(shapes):
    transform = DetectionTransform(config("images.hflip_prob=0"))
    return DetectionTask.collate([transform(shapes.load(row), shapes.load_target(row), np.ones(6)) for row in range(3)])


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize(("arch", "stem"), [("resnet18", "cifar"), ("resnet34", "imagenet"), ("resnet50", "stride2")])
def test_the_pyramid_stands_on_every_kind_of_encoder(arch, stem, padding):
    encoder = describe(lively_encoder(arch, 0.125, stem, padding))
    weights = {name: t.clone() for name, t in encoder.state_dict().items()}
    detector = build_detector(encoder, 10, config()).eval()
    body = detector.backbone.body.state_dict()
    assert list(body) == list(weights)
    assert all(torch.equal(body[name], weights[name]) for name in weights)
    with torch.no_grad():
        levels = detector.backbone(torch.randn(1, 3, 64, 64))
        assert len(levels) == 5
        assert len(detector([torch.rand(3, 40, 52)])) == 1


def test_a_steps_loss_is_a_function_of_the_step_alone(encoder, shapes):
    learner = task(encoder)
    torch.manual_seed(1)
    first = learner.compute_loss(batch(shapes), 5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = learner.compute_loss(batch(shapes), 5)
    assert torch.equal(torch.get_rng_state(), state)
    other = learner.compute_loss(batch(shapes), 6)
    assert torch.equal(first["loss"], again["loss"])
    assert not torch.equal(first["loss"], other["loss"])
    parts = [value for name, value in first.items() if name != "loss"]
    assert len(parts) == 4
    torch.testing.assert_close(torch.stack(parts).sum(), first["loss"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("sets", "moves"), [(["model.freeze_bn=false"], True), ([], False), (["model.freeze_encoder=true"], False)]
)
def test_frozen_norms_stay(encoder, shapes, sets, moves):
    learner = task(encoder, *sets, "optim.warmup_steps=0")
    learner.model.train()
    before = {name: t.clone() for name, t in learner.model.state_dict().items()}
    learner.compute_loss(batch(shapes), 0)["loss"].backward()
    learner.optimizer.step()
    moved = {name for name, t in learner.model.state_dict().items() if not torch.equal(t, before[name])}
    assert ("backbone.body.layer1.0.bn1.running_mean" in moved) == moves
    assert ("backbone.body.layer1.0.conv1.weight" in moved) == ("model.freeze_encoder=true" not in sets)
    assert "backbone.fpn.inner_blocks.0.0.weight" in moved


def test_boxes_flip_with_their_image():
    image = np.zeros((10, 20, 3), np.uint8)
    image[2:5, 3:9] = 255
    boxes = Boxes(
        np.array([[3, 2, 9, 5], [0, 0, 1, 1]], np.float32), np.array([4, 0]), np.array([False, True]), np.ones(2)
    )
    flipped, target = DetectionTransform(config())(image, boxes, np.zeros(6))
    assert target["labels"].tolist() == [5]
    left, top, right, bottom = target["boxes"][0].int().tolist()
    assert (flipped[:, top:bottom, left:right] == 255).all()
    assert flipped.sum() == image.sum()
    same, target = DetectionTransform(config())(image, boxes, np.ones(6))
    assert target["boxes"].tolist() == [[3, 2, 9, 5]]
    np.testing.assert_array_equal(same.permute(1, 2, 0).numpy(), image)


def found_as(shapes, rows, moved: float = 0.0, score=lambda row: 0.9) -> dict[int, Detections]:
    return {
        row: Detections(shapes.load_target(row).corners + moved, np.array([score(row)]), shapes.load_target(row).labels)
        if row in rows
        else Detections(np.empty((0, 4)), np.empty(0), np.empty(0, int))
        for row in range(len(shapes))
    }


def test_average_precision_of_all_none_and_shifted_boxes(shapes):
    everything = range(len(shapes))
    assert compute_average_precision(shapes, found_as(shapes, everything)) == {"ap": 1.0, "ap50": 1.0, "ap75": 1.0}
    assert compute_average_precision(shapes, found_as(shapes, [])) == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    shifted = compute_average_precision(shapes, found_as(shapes, everything, moved=1.0))
    overlaps = [overlap(c := shapes.load_target(row).corners[0], c + 1) for row in everything]
    assert shifted["ap50"] == pytest.approx(literal(shapes, overlaps, 0.5), abs=1e-9)
    assert shifted["ap75"] == pytest.approx(literal(shapes, overlaps, 0.75), abs=1e-9)
    assert 0 < shifted["ap"] < 1


def overlap(a, b) -> float:
    width, height = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def literal(shapes, overlaps, threshold: float) -> float:
    """Mean over classes of the mean over 101 recalls of the best precision at or beyond; equal scores in order."""
    labels = np.array([shapes.load_target(row).labels[0] for row in range(len(shapes))])
    means = []
    for label in np.unique(labels):
        hits = np.array([o >= threshold for o, own in zip(overlaps, labels, strict=True) if own == label])
        precision, recall = hits.cumsum() / np.arange(1, len(hits) + 1), hits.cumsum() / len(hits)
        means.append(np.mean([precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 101)]))
    return float(np.mean(means))
