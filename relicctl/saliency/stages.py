"""The table of stages: how good every map on the way is, from a centred blob to the final network's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from relicctl.config.bgmask import BgmaskConfig
from relicctl.data.bad_images import BadImages
from relicctl.data.masks import SIDE
from relicctl.saliency.measures import Measures
from relicctl.saliency.nets import SaliencyNet
from relicctl.saliency.photos import load_photos
from relicctl.saliency.predict import predict
from relicctl.saliency.prior_store import PriorStore
from relicctl.saliency.priors import NAMES, centre_prior
from relicctl.saliency.refine import fuse
from relicctl.saliency.truth import TrueMasks

FUSED_AT_ONCE = 32  # images


class StageTable:
    """Measures stage after stage on images with true masks, at the masks' own resolution.

    ``rows`` are the stages so far: ``name``, the figures of ``Measures``, and ``images``, how many count. Each is
    passed to ``told`` as it comes. Priors are looked at as they are kept, networks as they make a bank's masks.
    """

    def __init__(
        self,
        truth: TrueMasks,
        config: BgmaskConfig,
        *,
        device: torch.device,
        precision: str,
        workers: int,
        threads: int = 1,
        told: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        self._truth, self._config, self._told = truth, config, told
        self._device, self._precision, self._threads = device, precision, threads
        bad = BadImages(len(truth.images), 0.0)  # they were all looked at before
        self._images = {
            size: load_photos(truth.images, size, workers=workers, bad=bad).images
            for size in {SIDE, config.labels.size}
        }
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, maps: Iterable[np.ndarray]) -> None:
        """A stage by its maps, float ``[S, S]`` each from 0 to 1; one with a NaN is left out."""
        measures = Measures()
        for index, saliency in enumerate(maps):
            mask = self._truth.mask(index)
            measures.add(stretched(saliency, mask.shape), mask)
        self.rows.append({"name": name, **measures.figures(), "images": measures.images})
        self._told(self.rows[-1])

    def add_priors(self, store: PriorStore) -> None:
        """The centre prior, each hand-made prior, the mean of those that are valid, and the labels made of them."""
        centre = centre_prior(store.size)
        self.add("centre prior", (centre for _ in range(len(self._truth.images))))
        for number, name in enumerate(NAMES):
            self.add(name, (maps[number] for maps in _prior_maps(store)))
        self.add("mean of priors", map(mean_of_valid, _prior_maps(store)))
        self.add("fused labels", self._fused(store))

    def add_net(self, name: str, net: SaliencyNet) -> None:
        """A network, as it makes masks."""
        self.add(name, self._predicted(net))

    def _fused(self, store: PriorStore) -> Iterator[np.ndarray]:
        for images, rows in self._batches(store.size, FUSED_AT_ONCE):
            maps = torch.from_numpy(store.maps[rows].astype(np.float32) / 255)
            valid = torch.from_numpy(store.valid[rows])
            yield from fuse(images, maps, valid, self._config.refine, self._threads).map.numpy()

    def _predicted(self, net: SaliencyNet) -> Iterator[np.ndarray]:
        options = self._config.predict
        for images, _ in self._batches(SIDE, options.batch_size):
            maps = predict(
                net,
                images,
                options=options,
                refine=self._config.refine,
                device=self._device,
                precision=self._precision,
                threads=self._threads,
            )
            yield from maps.numpy()

    def _batches(self, size: int, count: int) -> Iterator[tuple[Tensor, slice]]:
        """``count`` images at a time, of that side, and which they are."""
        images = self._images[size]
        for first in range(0, len(images), count):
            rows = slice(first, first + count)
            yield images[rows], rows


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


def _prior_maps(store: PriorStore) -> Iterator[np.ndarray]:
    """float32 ``[P, S, S]`` of every image, NaN where a prior is not valid."""
    for maps, valid in zip(store.maps, store.valid, strict=True):
        yield np.where(valid[:, None, None], maps.astype(np.float32) / 255, np.float32(np.nan))
