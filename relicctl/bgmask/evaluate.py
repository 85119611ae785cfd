"""Measure saliency maps against true masks, by the formulas of pysodmetrics, and priors against one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import py_sod_metrics as sod
import torch
from PIL import Image

from relicctl.bgmask.data import GroundTruth
from relicctl.bgmask.images import load_resized_images
from relicctl.bgmask.network import SaliencyNet
from relicctl.bgmask.predict import SaliencyPredictor
from relicctl.bgmask.prior_cache import PriorCache
from relicctl.bgmask.priors.maps import PRIOR_NAMES, make_centre_prior
from relicctl.bgmask.refine import fuse_priors
from relicctl.config.bgmask import BgmaskConfig
from relicctl.core.hardware import count_process_cores
from relicctl.core.work_sharing import WorkResult, gather_in_order, shard
from relicctl.data.decoding import BadImages
from relicctl.data.mask_bank import MASK_SIDE
from relicctl.runs.distributed import RunContext

BETA2 = 0.3  # weight of recall against precision in F, as in Achanta et al., CVPR 2009
METRICS = ("max_f", "f_50", "mae", "iou", "accuracy", "s_measure", "e_measure")
MEAN_METRICS = ("mae", "iou", "accuracy", "s_measure", "e_measure")  # those that are averages over the images
CURVE_SIZE = 2 * 256  # numbers: precision and recall at t = 255, 254, ..., 0
_iou, _accuracy, _precision, _recall = (
    handler(with_dynamic=False, with_adaptive=False)
    for handler in (sod.IOUHandler, sod.OverallAccuracyHandler, sod.PrecisionHandler, sod.RecallHandler)
)


class SaliencyMetrics:
    """Sums over pairs of a map and a true mask.

    ``compute`` returns fractions of 1:

    - ``max_f``: precision and recall at each of 256 thresholds (map >= t / 255) are averaged over the images; F is
      (1 + beta2) P R / (beta2 P + R) of these averages with beta2 0.3; the largest F over the thresholds. One
      threshold serves all images.
    - ``f_50``: the same F of averaged precision and recall where foreground is what exceeds 0.5.
    - ``iou``, ``accuracy``: of that foreground, per image, then averaged.
    - ``mae``: mean absolute difference of map and mask, averaged over the images.
    - ``s_measure``: structure measure, alpha 0.5 (Fan et al., ICCV 2017), averaged over the images.
    - ``e_measure``: enhanced-alignment measure (Fan et al., IJCAI 2018), its mean over 256 thresholds, averaged
      over the images.

    Maps are not rescaled to [0, 1] first. 0 / 0, such as the recall of an empty mask, is 0.
    """

    def __init__(self) -> None:
        self.images = 0
        self._sums = np.zeros(CURVE_SIZE + 2 + len(MEAN_METRICS))

    def add_image_metrics(self, image_metrics: np.ndarray) -> None:
        """Add a pair by its ``compute_image_metrics``; one of a map with a NaN is left out."""
        if np.isfinite(image_metrics).all():
            self._sums += image_metrics
            self.images += 1

    def compute(self) -> dict[str, float | None]:
        """Return the metrics by name; None where no image was measured."""
        if not self.images:
            return dict.fromkeys(METRICS)
        curve, at_half, means = np.split(self._sums, (CURVE_SIZE, CURVE_SIZE + 2))
        f_measure = partial(_compute_f_measure, num_images=self.images)
        metrics = {"max_f": float(f_measure(curve.reshape(2, -1)).max()), "f_50": float(f_measure(at_half))}
        metrics |= dict(zip(MEAN_METRICS, (means / self.images).tolist(), strict=True))
        return {name: metrics[name] for name in METRICS}


def compute_image_metrics(saliency: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return what a map, float ``[H, W]``, and its true mask, bool ``[H, W]``, add to the sums: float64 ``[519]``.

    Precision and recall along the curve and at 0.5, then ``MEAN_METRICS``; all NaN for a map with a NaN.
    """
    if not np.isfinite(saliency).all():
        return np.full(CURVE_SIZE + 2 + len(MEAN_METRICS), np.nan)
    saliency = saliency.astype(np.float64)
    foreground = np.count_nonzero(mask)
    count = {"gt": mask, "FG": foreground, "BG": mask.size - foreground}
    curve = sod.FmeasureV2().dynamically_binarizing(saliency, **count)
    half = sod.FmeasureV2().get_statistics(saliency > 0.5, **count)
    emeasure = sod.Emeasure()
    emeasure.gt_fg_numel, emeasure.gt_size = foreground, mask.size
    at_half = _precision(**half), _recall(**half)
    mae, s_measure = np.abs(saliency - mask).mean(), sod.Smeasure().cal_sm(saliency, mask)
    e_measure = emeasure.cal_changeable_em(saliency, mask).mean()
    means = [float(value) for value in (mae, _iou(**half), _accuracy(**half), s_measure, e_measure)]  # MEAN_METRICS
    return np.concatenate([_precision(**curve), _recall(**curve), at_half, means])


def _compute_f_measure(sums: np.ndarray, num_images: int) -> np.ndarray:
    """Return F of precision and recall, ``[2, ...]``, summed over ``num_images`` images."""
    precision, recall = sums / num_images
    product, total = (1 + BETA2) * precision * recall, BETA2 * precision + recall
    return np.asarray(np.divide(product, total, out=np.zeros_like(total), where=total > 0))


def compute_prior_agreement(maps: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return the priors' mean correlation over the images, float64 ``[P, P]``; NaN where no image has both.

    ``maps``: uint8 ``[N, P, S, S]``, ``valid``: bool ``[N, P]``. Constant maps are left out as well. Images are read
    one by one, so that ``maps`` may be a memory-mapped file.
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


MapProvider = Callable[[slice], Iterable[np.ndarray]]  # the maps of some images, float [S, S] each from 0 to 1


class StageTable:
    """Measures stage after stage against true masks, at the masks' resolution; ``priors`` are of the same images.

    ``rows`` are the stages so far: ``name``, the metrics of ``SaliencyMetrics``, and ``images``, their number. Priors
    are measured as they are cached, networks as they predict the masks of a bank. The ranks share the images, and all
    of them have the rows.
    """

    def __init__(
        self, truth: GroundTruth, priors: PriorCache, config: BgmaskConfig, context: RunContext, workers: int
    ) -> None:
        self._truth, self._priors, self._config, self._context = truth, priors, config, context
        bad = BadImages(len(truth.images), 0.0)  # all of them were decoded before
        self._images = {
            size: load_resized_images(truth.images, size, workers=workers, bad=bad, world=context.world).images
            for size in sorted({MASK_SIDE, config.labels.size})
        }
        self.rows: list[dict[str, Any]] = []

    def add_stage(self, name: str, maps: MapProvider) -> None:
        """Measure a stage by its ``maps``; one with a NaN is left out."""
        count, batch_size = len(self._truth.images), self._config.predict.batch_size
        batches = [slice(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
        metrics, world = SaliencyMetrics(), self._context.world

        def measure_batch(rows: slice) -> WorkResult:
            masks = map(self._truth.load_mask, range(rows.start, rows.stop))
            pairs = zip(maps(rows), masks, strict=True)
            numbers = [compute_image_metrics(resize_map(saliency, mask.shape), mask) for saliency, mask in pairs]
            return WorkResult((torch.from_numpy(np.stack(numbers)),))

        def add_batch(result: WorkResult) -> None:
            for numbers in result.tensors[0].numpy():
                metrics.add_image_metrics(numbers)

        gather_in_order(world, len(batches), map(measure_batch, shard(world, batches)), add_batch)
        row = world.broadcast_from_main(lambda: {"name": name, **metrics.compute(), "images": metrics.images})
        self.rows.append(row)
        self._context.console.info(_format_stage(row))

    def add_priors(self) -> None:
        """Measure the centre prior, each handcrafted prior, the mean of the valid ones, and the fused labels."""
        priors = self._priors

        def fuse_batch(rows: slice) -> np.ndarray:
            images, maps = self._images[priors.size][rows], torch.from_numpy(priors.maps[rows].astype(np.float32) / 255)
            valid = torch.from_numpy(priors.valid[rows])
            return fuse_priors(images, maps, valid, self._config.refine, count_process_cores()).map.numpy()

        def load_prior(number: int, rows: slice) -> np.ndarray:
            return priors.load_floats(rows)[:, number]

        centre = make_centre_prior(priors.size)
        self.add_stage("centre prior", lambda rows: repeat(centre, rows.stop - rows.start))
        for number, name in enumerate(PRIOR_NAMES):
            self.add_stage(name, partial(load_prior, number))
        self.add_stage("mean of priors", lambda rows: map(compute_valid_mean, priors.load_floats(rows)))
        self.add_stage("fused labels", fuse_batch)

    def add_net(self, name: str, net: SaliencyNet) -> None:
        """Measure a network by the maps that it predicts."""
        predictor, images = SaliencyPredictor.from_config(net, self._config, self._context), self._images[MASK_SIDE]
        self.add_stage(name, lambda rows: predictor.predict_with_cache(images[rows], self._priors, rows).numpy())


def _format_stage(row: dict[str, Any]) -> str:
    if row["max_f"] is None:
        return f"{row['name']}: no image could be measured"
    return f"{row['name']}: max-F {row['max_f']:.3f}, IoU {row['iou']:.3f}, MAE {row['mae']:.3f}"


def resize_map(saliency: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resize a map, float ``[S, S]``, to its image's ``shape``: float32, bilinear, antialiased where it shrinks."""
    if not np.isfinite(saliency).all():
        return np.full(shape, np.nan, dtype=np.float32)
    height, width = shape
    image = Image.fromarray(saliency.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).clip(0, 1)


def compute_valid_mean(maps: np.ndarray) -> np.ndarray:
    """Return the mean, ``[S, S]``, of float ``[P, S, S]``, of which invalid maps are all NaN; NaN if all are."""
    valid = np.isfinite(maps).all(axis=(1, 2))
    return maps[valid].mean(axis=0) if valid.any() else np.full(maps.shape[1:], np.nan, dtype=maps.dtype)
