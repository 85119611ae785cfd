"""COCO's average precision, by its own evaluation code (pycocotools)."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np

from relicctl.errors import UsageError
from relicctl.evaluation.dense.boxes import DetectionDataset


@dataclass(frozen=True)
class Detections:
    """Detections in one image: ``corners`` float ``[K, 4]``, ``scores`` float ``[K]``, ``labels`` int64 ``[K]``."""

    corners: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def check_pycocotools() -> None:
    """Raises UsageError where it is not installed."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError:
        raise UsageError(
            "--task detection is measured by pycocotools, which is not installed.", "pip install 'relicctl[detection]'."
        ) from None


def compute_average_precision(samples: DetectionDataset, detections: dict[int, Detections]) -> dict[str, float]:
    """``ap`` over thresholds .50 to .95, ``ap50`` and ``ap75``, on the images that ``found`` has, by row.

    Boxes are matched up to 100 a picture; ignored ones, crowds among them, neither help nor harm.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": row, "height": int(h), "width": int(w)} for row, (h, w) in enumerate(samples.sizes)],
        "categories": [{"id": label, "name": name} for label, name in enumerate(samples.classes)],
        "annotations": [a for row in detections for a in _to_coco_annotations(samples, row)],
    }
    for number, annotation in enumerate(truth.dataset["annotations"], 1):
        annotation["id"] = number  # from 1: the evaluation takes 0 for no match
    results = [
        {"image_id": row, "category_id": int(label), "bbox": _to_xywh(corners), "score": float(score)}
        for row, one in detections.items()
        for corners, score, label in zip(one.corners, one.scores, one.labels, strict=True)
    ]
    if not results:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    with redirect_stdout(io.StringIO()):  # it prints, and stdout is for results
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.imgIds = sorted(detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap50, ap75 = (max(0.0, float(value)) for value in evaluation.stats[:3])
    return {"ap": ap, "ap50": ap50, "ap75": ap75}


def _to_coco_annotations(samples: DetectionDataset, row: int) -> list[dict[str, Any]]:
    boxes = samples.load_target(row)
    return [
        {
            "image_id": row,
            "category_id": int(label),
            "bbox": _to_xywh(corners),
            "area": float(area),
            "iscrowd": int(crowd),
        }
        for corners, label, area, crowd in zip(boxes.corners, boxes.labels, boxes.area, boxes.ignored, strict=True)
    ]


def _to_xywh(corners: np.ndarray) -> list[float]:
    left, top, right, bottom = map(float, corners)
    return [left, top, right - left, bottom - top]
