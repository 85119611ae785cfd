"""Laws of the feed: the same batches for any number of workers and processes, from any step on."""

from __future__ import annotations

import pickle

import pytest
import torch

from relicctl.config.transfer import DenseOptimConfig, DetectionOptimConfig, SegmentationConfig, SegmentationCropConfig
from relicctl.core.distributed import World
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.decoding import BadImageError, BadImages
from relicctl.data.loader import LoaderConfig
from relicctl.data.sampler import Sampler
from relicctl.errors import DataError
from relicctl.evaluation.dense import data
from relicctl.evaluation.dense.data import CachedDenseDataset, DenseLoader
from relicctl.evaluation.dense.segmentation import SegmentationTask, SegmentationTransform
from relicctl.evaluation.dense.segmentation_data import ShapesSegmentationDataset
from relicctl.evaluation.dense.training import compute_multistep_lr


class Damaged(ShapesSegmentationDataset):
    """Sample 3 cannot be decoded."""

    def load(self, index):
        if index == 3:
            raise BadImageError("damaged")
        return super().load(index)


def samples(kind=ShapesSegmentationDataset):
    return kind(ShapesDataset.from_spec("shapes:size=16,train=12", "train"))


def batches(of, start=0, *, workers=0, world=None, bad=None):
    transform = SegmentationTransform(SegmentationConfig(crop=SegmentationCropConfig(size=16)))
    config = LoaderConfig(5, torch.device("cpu"), world or World(), workers=workers)
    bad = bad or BadImages(12, 0.5)
    loader = DenseLoader(of, Sampler(5, len(of), 4), transform, SegmentationTask.collate, config, bad)
    return [torch.cat([part.flatten() for part in batch]) for batch in loader.iter_from_step(start, 6)]


def test_workers_memory_and_the_step_it_starts_from_change_nothing():
    whole = batches(samples())
    assert len({tuple(batch.tolist()) for batch in whole}) == 6
    for other in (batches(samples(), workers=2), batches(CachedDenseDataset(samples()))):
        assert all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], batches(samples(), 4), strict=True))


def test_spawned_workers_get_all_by_pickle(monkeypatch):
    whole, load_in_workers = batches(samples()), data.load_in_workers
    monkeypatch.setattr(
        data, "load_in_workers", lambda load, *a, **kw: load_in_workers(pickle.loads(pickle.dumps(load)), *a, **kw)
    )
    told = BadImages(12, 0.5, lambda name, reason: None)  # as a run's: no pickle holds what tells of bad images
    assert all(torch.equal(a, b) for a, b in zip(whole, batches(samples(), bad=told), strict=True))


def test_two_processes_have_the_rows_of_one():
    feed = [next(iter(batches(samples(), world=world))) for world in (World(), World(0, 2), World(1, 2))]
    pixels = 16 * 16 * 3
    images = [part[: 4 * pixels if n == 0 else 2 * pixels] for n, part in enumerate(feed)]
    assert torch.equal(images[0], torch.cat(images[1:]))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_decoded_is_replaced_and_told(workers):
    bad = BadImages(12, 0.5)
    of = samples(Damaged)
    replaced = batches(of, workers=workers, bad=bad)
    assert bad.seen == {of.source.get_name(3)}
    again = batches(CachedDenseDataset(of), bad=BadImages(12, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(replaced, again, strict=True))
    with pytest.raises(DataError, match="damaged"):
        batches(of, workers=workers, bad=BadImages(12, 0.0))


def test_the_rate_rises_and_falls_in_steps():
    flat = DenseOptimConfig(steps=100, base_lr=1.0)
    assert [compute_multistep_lr(k, flat) for k in (0, 69, 70, 89, 90, 99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    warm = DetectionOptimConfig(steps=100, base_lr=1.0, warmup_steps=10, milestones=())
    assert [compute_multistep_lr(k, warm) for k in (0, 4, 9, 10, 99)] == [0.1, 0.5, 1, 1, 1]
