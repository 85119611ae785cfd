"""How well saliency maps agree with true masks, and with one another. Formulas are pysodmetrics'."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import combinations

import numpy as np
from py_sod_metrics import (
    Emeasure,
    FmeasureV2,
    IOUHandler,
    OverallAccuracyHandler,
    PrecisionHandler,
    RecallHandler,
    Smeasure,
)

BETA2 = 0.3  # weight of recall against precision in F, as in Achanta et al., CVPR 2009
METRICS = ("max_f", "f_50", "mae", "iou", "accuracy", "s_measure", "e_measure")
MEAN_METRICS = ("mae", "iou", "accuracy", "s_measure", "e_measure")  # those that are averages over the images
CURVE_SIZE = 2 * 256  # numbers: precision and recall at t = 255, 254, ..., 0

_iou, _accuracy, _precision, _recall = (
    handler(with_dynamic=False, with_adaptive=False)
    for handler in (IOUHandler, OverallAccuracyHandler, PrecisionHandler, RecallHandler)
)


class SaliencyMetrics:
    """Sums over pairs of a map and a true mask; nothing is kept of a pair that was added.

    ``figures`` has fractions of 1:

    - ``max_f``: precision and recall at each of 256 thresholds (map >= t / 255) are averaged over the images; F is
      (1 + beta2) P R / (beta2 P + R) of these averages with beta2 0.3; the largest F over the thresholds. One
      threshold serves all images.
    - ``f_50``: the same F of averaged precision and recall where foreground is what exceeds 0.5.
    - ``iou``, ``accuracy``: of that foreground, per image, then averaged.
    - ``mae``: mean absolute difference of map and mask, averaged over the images.
    - ``s_measure``: structure measure, alpha 0.5 (Fan et al., ICCV 2017), averaged over the images.
    - ``e_measure``: enhanced-alignment measure (Fan et al., IJCAI 2018), its mean over 256 thresholds, averaged
      over the images.

    Maps count as they are: none is stretched to [0, 1] first. A division of nothing by nothing, such as the recall
    of an empty mask, is 0.
    """

    def __init__(self) -> None:
        self.images = 0
        self.num_skipped = 0
        self._sums = np.zeros(CURVE_SIZE + 2 + len(MEAN_METRICS))

    def update(self, saliency: np.ndarray, mask: np.ndarray) -> None:
        """A map, float ``[H, W]`` in [0, 1], and its true mask, bool ``[H, W]``. A map with a NaN is left out."""
        self.add_image_metrics(compute_image_metrics(saliency, mask))

    def add_image_metrics(self, image_metrics: np.ndarray) -> None:
        """A pair by its ``compute_image_metrics``."""
        if np.isfinite(image_metrics).all():
            self._sums += image_metrics
            self.images += 1
        else:
            self.num_skipped += 1

    def compute(self) -> dict[str, float | None]:
        """The figures by name; None where no image was measured."""
        if not self.images:
            return dict.fromkeys(METRICS)
        curve, at_half, means = np.split(self._sums, (CURVE_SIZE, CURVE_SIZE + 2))
        f_measure = partial(_compute_f_measure, num_images=self.images)
        figures = {"max_f": float(f_measure(curve.reshape(2, -1)).max()), "f_50": float(f_measure(at_half))}
        figures |= dict(zip(MEAN_METRICS, (means / self.images).tolist(), strict=True))
        return {name: figures[name] for name in METRICS}


def compute_image_metrics(saliency: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What a map, float ``[H, W]``, and its true mask, bool ``[H, W]``, add to the sums: float64 ``[519]``.

    Precision and recall along the curve and at 0.5, then ``MEAN_METRICS``; all NaN for a map with a NaN.
    """
    if not np.isfinite(saliency).all():
        return np.full(CURVE_SIZE + 2 + len(MEAN_METRICS), np.nan)
    saliency = saliency.astype(np.float64)
    foreground = np.count_nonzero(mask)
    count = {"gt": mask, "FG": foreground, "BG": mask.size - foreground}
    curve = FmeasureV2().dynamically_binarizing(saliency, **count)
    half = FmeasureV2().get_statistics(saliency > 0.5, **count)
    emeasure = Emeasure()
    emeasure.gt_fg_numel, emeasure.gt_size = foreground, mask.size
    means = {
        "mae": np.abs(saliency - mask).mean(),
        "iou": _iou(**half),
        "accuracy": _accuracy(**half),
        "s_measure": Smeasure().cal_sm(saliency, mask),
        "e_measure": emeasure.cal_changeable_em(saliency, mask).mean(),
    }
    at_half = _precision(**half), _recall(**half)
    return np.concatenate(
        [_precision(**curve), _recall(**curve), at_half, [float(means[name]) for name in MEAN_METRICS]]
    )


def _compute_f_measure(sums: np.ndarray, num_images: int) -> np.ndarray:
    """F of precision and recall, ``[2, ...]``, summed over ``count`` images."""
    precision, recall = sums / num_images
    denominator = BETA2 * precision + recall
    return np.divide(
        (1 + BETA2) * precision * recall, denominator, out=np.zeros_like(denominator), where=denominator > 0
    )


def compute_saliency_metrics(maps: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> dict[str, float | None]:
    """The figures of maps, each float ``[H, W]`` in [0, 1], beside their true masks, each bool ``[H, W]``."""
    metrics = SaliencyMetrics()
    for saliency, mask in zip(maps, masks, strict=True):
        metrics.update(saliency, mask)
    return metrics.compute()


def compute_prior_agreement(maps: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """How alike priors are: mean correlation over the images, float64 ``[P, P]``; NaN where no image tells.

    ``maps``: uint8 ``[N, P, S, S]``, ``valid``: bool ``[N, P]``. Of an image count the priors that are valid and
    not the same everywhere. Images are looked at one by one, so that ``maps`` may lie on the disk.
    """
    priors = maps.shape[1]
    sums, counts = np.zeros((priors, priors)), np.zeros((priors, priors))
    for image, usable_priors in zip(maps, valid, strict=True):
        flat = image.reshape(priors, -1).astype(np.float64)
        flat -= flat.mean(1, keepdims=True)
        norms = np.linalg.norm(flat, axis=1)
        usable = usable_priors & (norms > 0)
        flat[usable] /= norms[usable, None]
        both = usable[:, None] & usable
        sums += np.where(both, flat @ flat.T, 0.0)
        counts += both
    with np.errstate(invalid="ignore"):
        return sums / counts


def compute_mean_agreement(matrix: np.ndarray) -> float | None:
    """The mean over pairs of different priors, float ``[P, P]``, that could be compared; None if none could."""
    pairs = [matrix[i, j] for i, j in combinations(range(len(matrix)), 2) if np.isfinite(matrix[i, j])]
    return float(np.mean(pairs)) if pairs else None
