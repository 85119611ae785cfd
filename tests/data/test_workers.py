"""Workers are gone when the work is over, though they ignore signals and somebody still holds their iterator."""

from __future__ import annotations

import multiprocessing
import signal

import pytest
from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from relicctl.data.workers import run_workers


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


def test_a_death_that_torch_hears_of_at_the_end_hides_no_error():
    """Its handler of SIGCHLD raises wherever the process is, which may be in the shutdown."""

    def failing() -> None:
        loader = DataLoader(range(100), batch_size=None, num_workers=2, worker_init_fn=deaf)  # type: ignore[arg-type]
        with run_workers(loader) as items:
            leave = items._shutdown_workers  # type: ignore[attr-defined]

            def hear_of_a_death_before_the_workers_are_told() -> None:
                items._shutdown_workers, items._shutdown = leave, True  # type: ignore[attr-defined]
                _remove_worker_pids(id(items))
                items._worker_pids_set = False  # type: ignore[attr-defined]
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

            items._shutdown_workers = hear_of_a_death_before_the_workers_are_told  # type: ignore[attr-defined]
            raise EOFError

    with pytest.raises(EOFError):
        failing()
    assert multiprocessing.active_children() == []
