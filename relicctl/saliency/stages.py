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
from relicctl.core.turns import Piece, in_turn, own
from relicctl.data.bad_images import BadImages
from relicctl.data.masks import SIDE
from relicctl.saliency.hints import hints
from relicctl.saliency.measures import Measures, numbers_of
from relicctl.saliency.nets import SaliencyNet
from relicctl.saliency.photos import load_photos
from relicctl.saliency.predict import predict
from relicctl.saliency.prior_store import PriorStore
from relicctl.saliency.priors import NAMES, centre_prior
from relicctl.saliency.refine import fuse
from relicctl.saliency.truth import TrueMasks

Maps = Callable[[slice], Iterable[np.ndarray]]  # of some images, float [S, S] each from 0 to 1


class StageTable:
    """Measures stage after stage on images with true masks, whose priors ``store`` has, at the masks' own resolution.

    ``rows`` are the stages so far: ``name``, the figures of ``Measures``, and ``images``, how many count. Each is
    passed to ``told`` as it comes. Priors are looked at as they are kept, networks as they make a bank's masks.
    The processes of ``world`` share the images out, and all of them have the rows.
    """

    def __init__(
        self,
        truth: TrueMasks,
        store: PriorStore,
        config: BgmaskConfig,
        *,
        device: torch.device,
        precision: str,
        workers: int,
        threads: int = 1,
        told: Callable[[dict[str, Any]], None] = lambda row: None,
        world: World | None = None,
    ) -> None:
        self._truth, self._config, self._told, self._world = truth, config, told, world or World()
        self._device, self._precision, self._threads = device, precision, threads
        bad = BadImages(len(truth.images), 0.0)  # they were all looked at before
        self._images = {
            size: load_photos(truth.images, size, workers=workers, bad=bad, world=self._world).images
            for size in sorted({SIDE, config.labels.size})
        }
        self._store = store
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, maps: Maps) -> None:
        """A stage by its maps; one with a NaN is left out."""
        count, at_once = len(self._truth.images), self._config.predict.batch_size
        batches = [slice(first, min(first + at_once, count)) for first in range(0, count, at_once)]
        measures = Measures()

        def measured(rows: slice) -> Piece:
            masks = map(self._truth.mask, range(rows.start, rows.stop))
            pairs = zip(maps(rows), masks, strict=True)
            numbers = [numbers_of(stretched(saliency, mask.shape), mask) for saliency, mask in pairs]
            return Piece((torch.from_numpy(np.stack(numbers)),))

        def take(piece: Piece) -> None:
            for numbers in piece.tensors[0].numpy():
                measures.count(numbers)

        in_turn(self._world, len(batches), map(measured, own(self._world, batches)), take)
        self.rows.append(self._world.lead(lambda: {"name": name, **measures.figures(), "images": measures.images}))
        self._told(self.rows[-1])

    def add_priors(self) -> None:
        """The centre prior, each hand-made prior, the mean of those that are valid, and the labels made of them."""
        store = self._store

        def fused(rows: slice) -> np.ndarray:
            maps, valid = (
                torch.from_numpy(store.maps[rows].astype(np.float32) / 255),
                torch.from_numpy(store.valid[rows]),
            )
            return fuse(self._images[store.size][rows], maps, valid, self._config.refine, self._threads).map.numpy()

        centre = centre_prior(store.size)
        self.add("centre prior", lambda rows: repeat(centre, rows.stop - rows.start))
        for number, name in enumerate(NAMES):
            self.add(name, partial(_maps_of_prior, store, number))
        self.add("mean of priors", lambda rows: map(mean_of_valid, _prior_maps(store, rows)))
        self.add("fused labels", fused)

    def add_net(self, name: str, net: SaliencyNet) -> None:
        """A network, as it makes masks."""

        def predicted(rows: slice) -> np.ndarray:
            maps = predict(
                net,
                self._images[SIDE][rows],
                hints(self._store.maps[rows], self._store.valid[rows]) if net.hints else None,
                options=self._config.predict,
                refine=self._config.refine,
                device=self._device,
                precision=self._precision,
                threads=self._threads,
            )
            return maps.numpy()

        self.add(name, predicted)


def stretched(saliency: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A map, float ``[S, S]``, at the resolution ``shape`` of its image: float32, bilinear, antialiased if smaller."""
    if not np.isfinite(saliency).all():
        return np.full(shape, np.nan, dtype=np.float32)
    height, width = shape
    image = Image.fromarray(saliency.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).clip(0, 1)


def mean_of_valid(maps: np.ndarray) -> np.ndarray:
    """Float ``[P, S, S]``, invalid ones all NaN -> the others' mean ``[S, S]``; NaN where there is none."""
    valid = np.isfinite(maps).all(axis=(1, 2))
    return maps[valid].mean(axis=0) if valid.any() else np.full(maps.shape[1:], np.nan, dtype=maps.dtype)


def _maps_of_prior(store: PriorStore, number: int, rows: slice) -> np.ndarray:
    return _prior_maps(store, rows)[:, number]


def _prior_maps(store: PriorStore, rows: slice) -> np.ndarray:
    """float32 ``[B, P, S, S]`` of some images, NaN where a prior is not valid."""
    maps, valid = store.maps[rows].astype(np.float32) / 255, store.valid[rows]
    return np.where(valid[:, :, None, None], maps, np.float32(np.nan))
