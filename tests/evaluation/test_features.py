"""Law: features extracted by k processes are those of one, to the bit, and a bad image is told of once.

The processes are threads here, which exchange what torch.distributed would carry for them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from relicctl.config.pretrain import EvalConfig, PretrainConfig
from relicctl.core.distributed import World
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImageError, BadImages
from relicctl.evaluation import features as module
from relicctl.evaluation.features import EvalImages, extract_features
from relicctl.evaluation.online import OnlineEvaluator
from tests.helpers.runs import lively_encoder

CPU = torch.device("cpu")
BAD = {9, 10, 39}  # the first two at the end of a chunk and the start of the next; the last image


class Noise(ImageDataset):
    """Images of noise, of ten classes; some cannot be decoded."""

    def __init__(self, count: int, bad: set[int]) -> None:
        self.spec, self.classes = "noise", tuple("abcdefghij")
        self.labels = np.arange(count) % 10
        self._count, self._bad = count, bad

    def __len__(self) -> int:
        return self._count

    def get_name(self, index: int) -> str:
        return f"{index:02d}"

    def read(self, index: int) -> np.ndarray:
        if index in self._bad:
            raise BadImageError("no picture")
        generator = np.random.default_rng(index)
        return generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)

    def size(self, index: int) -> int:
        return 1


@dataclass
class Table:
    """Where threads lay down what they have, and read what all have."""

    size: int
    laid: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.laid = [None] * self.size
        self._meet = threading.Barrier(self.size, timeout=60)

    def exchange(self, rank: int, mine):
        self.laid[rank] = mine
        self._meet.wait()
        found = list(self.laid)
        self._meet.wait()
        return found


class Thread(World):
    """One of several threads that stand for processes."""

    def all_gather_object(self, mine):
        return self.cpu_group.exchange(self.rank, mine)

    def gather_rows(self, mine, counts):
        parts = self.cpu_group.exchange(self.rank, mine)
        assert [len(part) for part in parts] == counts
        return torch.cat(parts)


def in_threads(size: int, work) -> list:
    table, results = Table(size), [None] * size

    def run(rank: int) -> None:
        results[rank] = work(Thread(rank, size, rank, table))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "IMAGES_PER_CHUNK", 5)


@pytest.mark.parametrize("size", [2, 3, 11])
def test_k_processes_see_what_one_sees_to_the_bit(size):
    def look(world: World):
        images = EvalImages(Noise(40, BAD), 16, 1.0)
        shown: list[int] = []
        bar = SimpleNamespace(update=lambda done, metrics: shown.append(done))
        found = [extract_features(encoder, images, CPU, world, bar) for encoder in copies[world.rank]]
        listed: list[str] = []
        rows = images.get_decodable_rows(BadImages(40, 0.5, lambda name, reason: listed.append(name)))
        return found, rows, listed, shown

    copies = [[lively_encoder("resnet18", 0.125, "stride2")] * 2] * size  # the second time from kept crops
    (once, again), rows, listed, shown = look(World())
    assert torch.equal(once, again)
    assert listed == ["09", "10", "39"]
    assert sorted({*range(40)} - {*rows}) == sorted(BAD)
    assert shown == [*range(1, 9)] * 2
    copies = [[lively_encoder("resnet18", 0.125, "stride2")] * 2 for _ in range(size)]
    steps = 0
    for found, their_rows, their_list, their_steps in in_threads(size, look):
        assert all(torch.equal(features, once) for features in found)
        assert their_rows.tolist() == rows.tolist()
        assert their_list == listed
        steps += len(their_steps)
    assert steps == 2 * 8  # every chunk was looked at by one of them


def test_the_evaluation_of_a_run_gives_the_figures_of_one_process():
    def evaluate(world: World):
        bad = BadImages(40, 0.5)
        config = PretrainConfig(eval=EvalConfig(crop_pct=1.0, probe=True, size=16))
        evaluator = OnlineEvaluator(Noise(40, BAD), Noise(30, {7}), config, CPU, bad)
        figures = evaluator(encoders[world.rank], world)
        return figures, evaluator.protocol, sorted(bad.seen), sorted(evaluator.bad_held_out.seen)

    encoders = [lively_encoder("resnet18", 0.125, "stride2") for _ in range(2)]
    alone, *facts = evaluate(World())
    assert set(alone) == {"knn20", "knn200", "probe_top1"}
    (main, *main_facts), (other, *other_facts) = in_threads(2, evaluate)
    assert main == alone
    assert other == {}
    assert main_facts == other_facts == facts
    assert facts[1:] == [["09", "10", "39"], ["07"]]
    assert (facts[0]["train_images"], facts[0]["val_images"]) == (37, 29)


def test_a_normalisation_over_processes_talks_to_nobody_in_eval_mode():
    from relicctl.evaluation.features import eval_mode
    from relicctl.models.layers import convert_sync_batchnorm

    encoder = lively_encoder("resnet18", 0.125, "stride2")
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = encoder(images)
    with eval_mode(convert_sync_batchnorm(encoder, CPU).train()):  # there is no process group: to talk would fail
        torch.testing.assert_close(encoder(images), before, rtol=0, atol=0)
    assert all(norm.training for norm in encoder.modules())


def test_things_are_shared_out_in_order_and_evenly():
    assert World(0, 3).split_evenly(8) == [(0, 2), (2, 5), (5, 8)]
    assert World(0, 4).split_evenly(2) == [(0, 0), (0, 1), (1, 1), (1, 2)]
    assert World().split_evenly(5) == [(0, 5)]
