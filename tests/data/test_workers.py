"""Workers are gone when the work is over, though they ignore signals and somebody still holds their iterator."""

from __future__ import annotations

import multiprocessing
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from relicctl.data import workers as data_workers
from relicctl.data.workers import load_in_workers, run_workers
from relicctl.errors import DataError, RunFailed


@pytest.fixture(autouse=True)
def alone():
    """A test that failed before may have left workers of its own."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


def deaf(_: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_on_the_way_leaves_no_worker_behind(workers):
    held = []

    def interrupted() -> None:
        loader = DataLoader(range(100), batch_size=None, num_workers=workers, worker_init_fn=deaf)  # type: ignore[arg-type]
        with run_workers(loader) as items:
            held.append(items)
            assert next(items) == 0
            assert len(multiprocessing.active_children()) == workers
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("error", [EOFError, None])
def test_a_death_that_torch_hears_of_at_the_end_hides_no_error(error):
    """Its handler of SIGCHLD raises wherever the process is, which may be in the shutdown."""

    def work() -> None:
        loader = DataLoader(range(100), batch_size=None, num_workers=2, worker_init_fn=deaf)  # type: ignore[arg-type]
        with run_workers(loader) as items:
            leave = items._shutdown_workers  # type: ignore[attr-defined]

            def hear_of_a_death_before_the_workers_are_told() -> None:
                items._shutdown_workers, items._shutdown = leave, True  # type: ignore[attr-defined]
                if items._worker_pids_set:  # type: ignore[attr-defined]
                    _remove_worker_pids(id(items))
                    items._worker_pids_set = False  # type: ignore[attr-defined]
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

            items._shutdown_workers = hear_of_a_death_before_the_workers_are_told  # type: ignore[attr-defined]
            if error is not None:
                raise error

    with pytest.raises(error) if error is not None else nullcontext():
        work()
    assert multiprocessing.active_children() == []


def sleep_for_ever(unit: int) -> int:
    time.sleep(0 if unit == 0 else 10_000)
    return unit


def test_stuck_workers_do_not_delay_the_end():
    """A worker that waits for a dead network drive answers nothing."""
    began = time.monotonic()

    def interrupted() -> None:
        with load_in_workers(sleep_for_ever, range(8), 4) as items:
            assert next(items) == 0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert multiprocessing.active_children() == []
    assert time.monotonic() - began < 60, "torch waits ten seconds for each of four"


def test_workers_that_deliver_nothing_end_the_run(monkeypatch):
    monkeypatch.setattr(data_workers, "WORKER_TIMEOUT", 0.5)

    def stalled() -> None:
        with load_in_workers(sleep_for_ever, range(8), 2) as items:
            list(items)

    with pytest.raises(RunFailed, match="delivered nothing for 0 s") as failed:
        stalled()
    assert "--workers 0" in failed.value.fix
    assert multiprocessing.active_children() == []


@dataclass(frozen=True)
class Pair:
    planes: torch.Tensor
    array: np.ndarray


def load_tensors(unit: int) -> dict[str, Any]:
    if unit == 3:
        raise DataError("Unit 3 is broken.", "Mend it.")
    planes = torch.arange(24).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    return {"number": unit, "tensors": [torch.full((5,), unit), Pair(planes, np.full(2, unit))]}


def refuse_shared_memory(tensor: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("full", [False, True])
def test_items_arrive_whole_without_room_in_shared_memory_too(workers, full, monkeypatch, capsys):
    if full:
        monkeypatch.setattr(torch.Tensor, "share_memory_", refuse_shared_memory)
    data_workers._warn_of_full_shared_memory.cache_clear()
    received = []

    def load_all() -> None:
        with load_in_workers(load_tensors, range(6), workers) as items:
            received.extend(items)

    with pytest.raises(DataError, match="Unit 3 is broken"):
        load_all()
    assert [item["number"] for item in received] == [0, 1, 2]
    for unit, item in enumerate(received):
        assert torch.equal(item["tensors"][0], torch.full((5,), unit))
        assert torch.equal(item["tensors"][1].planes, torch.arange(24).view(1, 2, 3, 4))
        assert item["tensors"][1].planes.is_contiguous(memory_format=torch.channels_last)
        assert (item["tensors"][1].array == unit).all()
    warnings = capsys.readouterr().err.count("/dev/shm is full")
    assert warnings == (1 if full and workers else 0)
