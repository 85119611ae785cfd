"""A worker's unit: many images at once give the views that each gives alone."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.decoding import BadImages
from relicctl.data.loader import LoaderConfig, ViewLoader, _crop_chunk
from relicctl.data.photometric import AugmentConfig
from relicctl.data.sampler import DrawKey, Sampler
from relicctl.data.views import IMAGES_PER_DECODE, CropSpec, ViewSpec, crop_views

PLAN = ViewSpec((CropSpec(2, 24, (0.14, 1.0)), CropSpec(1, 16, (0.05, 0.14))), (3 / 4, 4 / 3), AugmentConfig())


def empty(images: int) -> list[np.ndarray]:
    return [np.empty((s.count, images, s.size, s.size, 3), np.uint8) for s in PLAN.crops]


def test_images_of_any_size_are_cropped_together_as_alone():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((40, 60), (33, 32), (90, 51))]
    samples = np.array([7, 3, 123_456])
    together = empty(3)
    crop_views(images, PLAN, DrawKey(5, 2, samples), together)
    for row in range(3):
        alone = empty(1)
        crop_views(images[row : row + 1], PLAN, DrawKey(5, 2, samples[row : row + 1]), alone)
        for all_of_them, one in zip(together, alone, strict=True):
            assert np.array_equal(all_of_them[:, row], one[:, 0])


def test_a_unit_is_its_rows_wherever_it_is_cut():
    source = ShapesDataset.from_spec("shapes:train=40,val=4", "train")
    crop_chunk = partial(_crop_chunk, source, Sampler(0, 40, 20), PLAN, 0, None)
    whole, used, _ = crop_chunk((1, 0, 20))
    assert len(used) > IMAGES_PER_DECODE  # several groups, the last one short
    first, last = crop_chunk((1, 0, 3)), crop_chunk((1, 3, 20))
    assert np.array_equal(np.concatenate([first[1], last[1]]), used)
    for view, a, b in zip(whole, first[0], last[0], strict=True):
        assert np.array_equal(view, np.concatenate([a, b], axis=1))


def test_batches_for_the_cpu_ask_nothing_of_cuda(monkeypatch):
    """``torch.cuda.stream(None)`` starts CUDA where there is a GPU, perhaps a full one, and fails on a Mac."""
    monkeypatch.setattr(torch.cuda, "stream", None)
    source, config = ShapesDataset.from_spec("shapes:train=8,val=4", "train"), LoaderConfig(0, torch.device("cpu"))
    loader = ViewLoader(source, Sampler(0, 8, 4), PLAN, config, BadImages(8, 0.0))
    assert len(list(loader.iter_from_step(0, 2))) == 2
