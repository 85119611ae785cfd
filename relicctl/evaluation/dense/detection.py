"""Object detection: the encoder under torchvision's Faster R-CNN on a feature pyramid, and COCO's average precision.

Networks and losses are torchvision's; the losses are summed. torchvision draws (which regions are trained on, which
size an image is resized to) from torch's generator, which is seeded anew from (seed, step).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from relicctl.config.transfer import DetectionConfig
from relicctl.core.counter_rng import Stream, derive_seed
from relicctl.data.datasets.voc import Boxes
from relicctl.errors import UsageError
from relicctl.evaluation.dense.data import iter_decodable
from relicctl.evaluation.dense.detection_data import DetectionDataset, open_detection_data
from relicctl.evaluation.dense.training import DenseTask, get_normalization
from relicctl.models.resnet import ResNet

EVAL_BATCH_SIZE = 8
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors
PYRAMID_STAGES = ("layer1", "layer2", "layer3", "layer4")
DetectionBatch = tuple[list[Tensor], list[dict[str, Tensor]]]


def build_detector(encoder: ResNet, classes: int, config: DetectionConfig) -> FasterRCNN:
    """Build the detector of ``classes`` object classes and the background, with the encoder's modules, not copies."""
    head, images = config.head, config.images
    depths = [getattr(encoder, stage)[-1] for stage in PYRAMID_STAGES]
    channels = [(block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels for block in depths]
    names = {stage: str(level) for level, stage in enumerate(PYRAMID_STAGES)}
    weights = encoder.state_dict()
    backbone = BackboneWithFPN(encoder, names, channels, head.channels)
    backbone.body.load_state_dict(weights, strict=True)  # strict: the backbone is exactly the encoder
    mean, std = (t.flatten().tolist() for t in get_normalization(encoder, torch.device("cpu")))
    anchors = AnchorGenerator(tuple((side,) for side in head.anchors), (ANCHOR_RATIOS,) * len(head.anchors))
    return FasterRCNN(
        backbone, min_size=images.min_size, max_size=images.max_size, image_mean=mean, image_std=std,
        rpn_anchor_generator=anchors, box_batch_size_per_image=head.box_batch_size_per_image,
        rpn_pre_nms_top_n_train=head.rpn_post_nms_top_n_train, rpn_post_nms_top_n_train=head.rpn_post_nms_top_n_train,
        rpn_pre_nms_top_n_test=head.rpn_post_nms_top_n_test, rpn_post_nms_top_n_test=head.rpn_post_nms_top_n_test,
        box_head=TwoMLPHead(head.channels * 7**2, head.hidden),
        box_predictor=FastRCNNPredictor(head.hidden, classes + 1),
    )  # fmt: skip


@dataclass(frozen=True)
class DetectionTransform:
    """Random flip; ignored boxes are left out."""

    config: DetectionConfig

    def __call__(self, image: np.ndarray, boxes: Boxes, uniform: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        targets = boxes[~boxes.ignored]
        corners = targets.corners.copy()
        if uniform[0] < self.config.images.hflip_prob:
            image = image[:, ::-1].copy()
            corners[:, [0, 2]] = image.shape[1] - corners[:, [2, 0]]
        labels = targets.labels + 1  # 0 is torchvision's background
        return _to_channels_first(image), {"boxes": torch.from_numpy(corners), "labels": torch.from_numpy(labels)}


def _to_channels_first(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


class DetectionTask(DenseTask):
    """The loop's task. A batch is (images uint8 [3, H, W] each, targets in torchvision's form)."""

    name, metric = "detection", "ap"
    open_splits = staticmethod(open_detection_data)
    build_transform = DetectionTransform

    @staticmethod
    def collate(items: list[tuple[Tensor, dict[str, Tensor]]]) -> DetectionBatch:
        return [image for image, _ in items], [target for _, target in items]

    def build_network(self, encoder: Any) -> nn.Module:
        detector: nn.Module = build_detector(encoder, self.classes, self.config)
        return detector

    def compute_loss(self, batch: DetectionBatch, step: int) -> dict[str, Tensor]:
        """Return the sum of Faster R-CNN's four losses, and each."""
        images, targets = batch
        seed = derive_seed(self.config.seed, Stream.NEGATIVES, step, self.world.rank)
        with _fork_rng(seed, self.device), self.autocast:
            losses = self.network([image / 255 for image in images], targets)
        return {"loss": torch.stack([loss.float() for loss in losses.values()]).sum(), **losses}

    @torch.no_grad()
    def score(self, samples: DetectionDataset, bad: dict[int, str]) -> dict[str, Any]:
        self.model.eval()
        detections: dict[int, Detections] = {}
        for first in range(0, len(samples), EVAL_BATCH_SIZE):
            rows = range(first, min(first + EVAL_BATCH_SIZE, len(samples)))
            pixels = {row: _to_channels_first(image) for row, image in iter_decodable(samples, rows, bad)}
            images = [image.to(self.device) / 255 for image in pixels.values()]
            with self.autocast:
                outputs = self.model(images) if images else []
            for row, output in zip(pixels, outputs, strict=True):
                corners, scores, labels = (output[name].float().cpu().numpy() for name in ("boxes", "scores", "labels"))
                detections[row] = Detections(corners, scores, labels.astype(np.int64) - 1)
        return compute_average_precision(samples, detections)


@contextmanager
def _fork_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators, of the CPU and of ``device``, within the block; restore them afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        yield


class Detections(NamedTuple):
    """Detections in one image: ``corners`` float ``[K, 4]``, ``scores`` float ``[K]``, ``labels`` int64 ``[K]``."""

    corners: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def check_pycocotools() -> None:
    """Raises UsageError if pycocotools is not installed."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError:
        what = "--task detection needs pycocotools, which is not installed."
        raise UsageError(what, "pip install 'relicctl[detection]'.") from None


def compute_average_precision(samples: DetectionDataset, detections: dict[int, Detections]) -> dict[str, float]:
    """Return ``ap`` over thresholds .50 to .95, ``ap50`` and ``ap75``, on the images (rows) of ``detections``.

    At most 100 boxes per image are matched; ignored boxes, crowds among them, do not count.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": row, "height": int(h), "width": int(w)} for row, (h, w) in enumerate(samples.sizes)],
        "categories": [{"id": label, "name": name} for label, name in enumerate(samples.classes)],
        "annotations": [],
    }
    for row in detections:
        boxes = samples.load_target(row)
        for corners, label, area, crowd in zip(boxes.corners, boxes.labels, boxes.area, boxes.ignored, strict=True):
            number = len(truth.dataset["annotations"]) + 1  # from 1: 0 means no match to pycocotools
            annotation = {"id": number, "image_id": row, "category_id": int(label), "bbox": _to_xywh(corners)}
            truth.dataset["annotations"].append(annotation | {"area": float(area), "iscrowd": int(crowd)})
    results = [
        {"image_id": row, "category_id": int(label), "bbox": _to_xywh(corners), "score": float(score)}
        for row, detected in detections.items()
        for corners, score, label in zip(*detected, strict=True)
    ]
    if not results:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    with redirect_stdout(io.StringIO()):  # pycocotools prints, and stdout is for results
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.imgIds = sorted(detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap50, ap75 = (max(0.0, float(value)) for value in evaluation.stats[:3])
    return {"ap": ap, "ap50": ap50, "ap75": ap75}


def _to_xywh(corners: np.ndarray) -> list[float]:
    left, top, right, bottom = map(float, corners)
    return [left, top, right - left, bottom - top]
