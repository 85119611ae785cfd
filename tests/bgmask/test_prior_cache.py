"""The file of priors: killed and gone on with = never killed, any workers = the same bytes, foreign files refused."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from relicctl.bgmask.prior_cache import BAD, CHUNK_SIZE, PriorCache
from relicctl.bgmask.priors.maps import PRIOR_NAMES, compute_prior_maps
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.decoding import BadImageError
from relicctl.errors import DataError, RunFailed, describe_error

SIDE = 16


def quiet(done):
    pass


@pytest.fixture
def source():
    return ShapesDataset.from_spec("shapes:size=32,train=20", "train")


@pytest.fixture
def whole(source, tmp_path):
    """The bytes of a store that was filled at one go."""
    PriorCache.open(tmp_path / "whole", source, SIDE).fill(source, 0, quiet)
    return (tmp_path / "whole").read_bytes()


class Wrapped:
    """A source whose ``load`` does something else at one sample."""

    def __init__(self, source, at, instead):
        self._source, self._at, self._instead = source, at, instead

    def __len__(self):
        return len(self._source)

    def compute_fingerprint(self):
        return self._source.compute_fingerprint()

    def load(self, index):
        return self._instead() if index == self._at else self._source.load(index)


def broken():
    raise BadImageError("no image in a known format")


def refused():
    raise DataError("The archive is gone.", "Bring it back.")


def kill_oneself():
    os.kill(os.getpid(), signal.SIGKILL)


def plain():
    return np.full((32, 32, 3), 90, dtype=np.uint8)


def test_the_store_holds_the_maps_in_256_steps(source, tmp_path):
    store = PriorCache.open(tmp_path / "priors", source, SIDE)
    assert not store.done.any()
    assert not store.valid.any()
    store.fill(source, 0, quiet)
    for again in (store, PriorCache.open(tmp_path / "priors", source, SIDE)):
        assert again.done.all()
        assert again.valid.all()
        assert not (again.states == BAD).any()
        assert again.maps.shape == (20, len(PRIOR_NAMES), SIDE, SIDE)
        assert again.maps.dtype == np.uint8
        for index in (0, 7, 19):
            expected = compute_prior_maps(source.load(index), SIDE)
            np.testing.assert_allclose(again.maps[index] / 255, expected, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_makes_the_same_file(source, whole, tmp_path, workers):
    PriorCache.open(tmp_path / "priors", source, SIDE).fill(source, workers, quiet)
    assert (tmp_path / "priors").read_bytes() == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_gone_on_with_is_never_killed(source, whole, tmp_path, workers):
    def die(done):
        kill_oneself()

    def fill():
        PriorCache.open(tmp_path / "priors", source, SIDE).fill(source, workers, die)

    process = multiprocessing.get_context("fork").Process(target=fill)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    store = PriorCache.open(tmp_path / "priors", source, SIDE)
    assert store.done.sum() == CHUNK_SIZE  # what was told is on the disk
    told = []
    store.fill(source, workers, told.append)
    assert told == [16, 20]
    assert (tmp_path / "priors").read_bytes() == whole


def test_an_exception_on_the_way_keeps_what_was_made(source, whole, tmp_path):
    store = PriorCache.open(tmp_path / "priors", source, SIDE)

    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.fill(source, 0, interrupt)
    assert store.done.sum() == CHUNK_SIZE
    store.fill(source, 0, quiet)
    assert (tmp_path / "priors").read_bytes() == whole


def test_a_worker_that_dies_loses_only_what_was_in_flight(source, whole, tmp_path):
    path = tmp_path / "priors"
    store = PriorCache.open(path, source, SIDE)

    def die_when_the_first_unit_is_stored():
        while not PriorCache.open(path, source, SIDE).done[:CHUNK_SIZE].all():
            time.sleep(0.01)
        kill_oneself()

    with pytest.raises((RuntimeError, EOFError, OSError)) as failed:  # as torch or the queue between them tell it
        store.fill(Wrapped(source, 18, die_when_the_first_unit_is_stored), 1, quiet)
    assert "died" in describe_error(failed.value)[0]
    assert store.done[:CHUNK_SIZE].all()
    assert not store.done[18]
    store.fill(source, 1, quiet)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_source_arrives_as_it_is(source, tmp_path, workers):
    store = PriorCache.open(tmp_path / "priors", source, SIDE)
    with pytest.raises(DataError, match="archive is gone"):
        store.fill(Wrapped(source, 3, refused), workers, quiet)


def test_workers_ignore_the_signals_of_a_terminal(source, tmp_path):
    def check():
        if any(signal.getsignal(number) != signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM)):
            broken()
        return source.load(3)

    store = PriorCache.open(tmp_path / "priors", source, SIDE)
    store.fill(Wrapped(source, 3, check), 1, quiet)
    assert not (store.states == BAD).any()


def test_a_bad_image_is_noted_and_left_out(source, tmp_path):
    store = PriorCache.open(tmp_path / "priors", source, SIDE)
    store.fill(Wrapped(source, 5, broken), 0, quiet)
    store = PriorCache.open(tmp_path / "priors", source, SIDE)
    assert store.done.all()
    assert np.flatnonzero(store.states == BAD).tolist() == [5]
    assert not store.valid[5].any()
    assert not store.maps[5].any()
    assert store.count_invalid() == dict.fromkeys(PRIOR_NAMES, 0)  # counted as an image, not as maps


def test_degenerate_maps_are_counted_and_left_out(source, tmp_path):
    store = PriorCache.open(tmp_path / "priors", source, SIDE)
    store.fill(Wrapped(source, 5, plain), 0, quiet)
    assert store.count_invalid() == dict.fromkeys(PRIOR_NAMES, 1)
    assert not store.valid[5].any()
    assert not store.maps[5].any()
    assert store.valid.sum() == 19 * len(PRIOR_NAMES)


def test_a_filled_store_is_left_alone(source, tmp_path):
    store = PriorCache.open(tmp_path / "priors", source, SIDE)
    store.fill(source, 0, quiet)
    store.fill(Wrapped(source, 0, refused), 0, quiet)


def test_a_store_of_other_data_or_another_side_is_refused(source, tmp_path):
    PriorCache.open(tmp_path / "priors", source, SIDE)
    other = ShapesDataset.from_spec("shapes:size=32,train=20,seed=1", "train")
    with pytest.raises(DataError, match="another data set"):
        PriorCache.open(tmp_path / "priors", other, SIDE)
    with pytest.raises(DataError, match="another size"):
        PriorCache.open(tmp_path / "priors", source, 2 * SIDE)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-1], "cut short"),
        (lambda data: data[:20], "damaged"),
        (lambda data: data[:5], "no file of priors"),
        (lambda data: b"", "no file of priors"),
        (lambda data: b"P" + data[1:], "no file of priors"),
        (lambda data: data[:12] + b"[" + data[13:], "damaged"),
    ],
)
def test_a_damaged_store_is_refused(source, tmp_path, damage, said):
    path = tmp_path / "priors"
    PriorCache.open(path, source, SIDE)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=said):
        PriorCache.open(path, source, SIDE)


def test_a_full_disk_is_said_and_nothing_is_marked(source, tmp_path, monkeypatch):
    store = PriorCache.open(tmp_path / "priors", source, SIDE)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(RunFailed, match="No space left"):
            store.fill(source, 0, quiet)
    assert not store.done.any()
    assert not PriorCache.open(tmp_path / "priors", source, SIDE).done.any()
