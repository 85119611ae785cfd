"""The table of stages: how good every map on the way is, from a centred blob to the final network's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from PIL import Image

from relicctl.config.bgmask import BgmaskConfig
from relicctl.core.distributed import World
from relicctl.core.turns import WorkResult, gather_in_order, shard
from relicctl.data.bad_images import BadImages
from relicctl.data.masks import MASK_SIDE
from relicctl.saliency.hints import build_prior_channels
from relicctl.saliency.measures import SaliencyMetrics, compute_image_metrics
from relicctl.saliency.nets import SaliencyNet
from relicctl.saliency.photos import load_resized_images
from relicctl.saliency.predict import predict_saliency
from relicctl.saliency.prior_store import PriorCache
from relicctl.saliency.priors import PRIOR_NAMES, make_centre_prior
from relicctl.saliency.refine import fuse_priors
from relicctl.saliency.truth import GroundTruth

MapProvider = Callable[[slice], Iterable[np.ndarray]]  # of some images, float [S, S] each from 0 to 1


class StageTable:
    """Measures stage after stage on images with true masks, whose priors ``store`` has, at the masks' own resolution.

    ``rows`` are the stages so far: ``name``, the metrics of ``SaliencyMetrics``, and ``images``, their number. Each is
    passed to ``on_row`` as it comes. Priors are looked at as they are kept, networks as they make a bank's masks.
    The processes of ``world`` share the images out, and all of them have the rows.
    """

    def __init__(
        self,
        truth: GroundTruth,
        store: PriorCache,
        config: BgmaskConfig,
        *,
        device: torch.device,
        precision: str,
        workers: int,
        threads: int = 1,
        on_row: Callable[[dict[str, Any]], None] = lambda row: None,
        world: World | None = None,
    ) -> None:
        self._truth, self._config, self._on_row, self._world = truth, config, on_row, world or World()
        self._device, self._precision, self._threads = device, precision, threads
        bad = BadImages(len(truth.images), 0.0)  # they were all looked at before
        self._images = {
            size: load_resized_images(truth.images, size, workers=workers, bad=bad, world=self._world).images
            for size in sorted({MASK_SIDE, config.labels.size})
        }
        self._store = store
        self.rows: list[dict[str, Any]] = []

    def add_stage(self, name: str, maps: MapProvider) -> None:
        """A stage by its maps; one with a NaN is left out."""
        count, batch_size = len(self._truth.images), self._config.predict.batch_size
        batches = [slice(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
        metrics = SaliencyMetrics()

        def measure_batch(rows: slice) -> WorkResult:
            masks = map(self._truth.load_mask, range(rows.start, rows.stop))
            pairs = zip(maps(rows), masks, strict=True)
            numbers = [compute_image_metrics(resize_map(saliency, mask.shape), mask) for saliency, mask in pairs]
            return WorkResult((torch.from_numpy(np.stack(numbers)),))

        def add_batch(piece: WorkResult) -> None:
            for numbers in piece.tensors[0].numpy():
                metrics.add_image_metrics(numbers)

        gather_in_order(self._world, len(batches), map(measure_batch, shard(self._world, batches)), add_batch)
        self.rows.append(
            self._world.broadcast_from_main(lambda: {"name": name, **metrics.compute(), "images": metrics.images})
        )
        self._on_row(self.rows[-1])

    def add_priors(self) -> None:
        """The centre prior, each hand-made prior, the mean of those that are valid, and the labels made of them."""
        store = self._store

        def fuse_batch(rows: slice) -> np.ndarray:
            maps, valid = (
                torch.from_numpy(store.maps[rows].astype(np.float32) / 255),
                torch.from_numpy(store.valid[rows]),
            )
            return fuse_priors(
                self._images[store.size][rows], maps, valid, self._config.refine, self._threads
            ).map.numpy()

        centre = make_centre_prior(store.size)
        self.add_stage("centre prior", lambda rows: repeat(centre, rows.stop - rows.start))
        for number, name in enumerate(PRIOR_NAMES):
            self.add_stage(name, partial(_load_one_prior, store, number))
        self.add_stage("mean of priors", lambda rows: map(compute_valid_mean, _load_prior_maps(store, rows)))
        self.add_stage("fused labels", fuse_batch)

    def add_net(self, name: str, net: SaliencyNet) -> None:
        """A network, as it makes masks."""

        def predict_batch(rows: slice) -> np.ndarray:
            maps = predict_saliency(
                net,
                self._images[MASK_SIDE][rows],
                build_prior_channels(self._store.maps[rows], self._store.valid[rows]) if net.hints else None,
                options=self._config.predict,
                refine=self._config.refine,
                device=self._device,
                precision=self._precision,
                threads=self._threads,
            )
            return maps.numpy()

        self.add_stage(name, predict_batch)


def resize_map(saliency: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A map, float ``[S, S]``, at the resolution ``shape`` of its image: float32, bilinear, antialiased if smaller."""
    if not np.isfinite(saliency).all():
        return np.full(shape, np.nan, dtype=np.float32)
    height, width = shape
    image = Image.fromarray(saliency.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).clip(0, 1)


def compute_valid_mean(maps: np.ndarray) -> np.ndarray:
    """Float ``[P, S, S]``, invalid ones all NaN -> the others' mean ``[S, S]``; NaN where there is none."""
    valid = np.isfinite(maps).all(axis=(1, 2))
    return maps[valid].mean(axis=0) if valid.any() else np.full(maps.shape[1:], np.nan, dtype=maps.dtype)


def _load_one_prior(store: PriorCache, number: int, rows: slice) -> np.ndarray:
    return _load_prior_maps(store, rows)[:, number]


def _load_prior_maps(store: PriorCache, rows: slice) -> np.ndarray:
    """float32 ``[B, P, S, S]`` of some images, NaN where a prior is not valid."""
    maps, valid = store.maps[rows].astype(np.float32) / 255, store.valid[rows]
    return np.where(valid[:, :, None, None], maps, np.float32(np.nan))
