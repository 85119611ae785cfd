"""Workers are gone when the work is over, though they ignore signals and somebody still holds their iterator."""

from __future__ import annotations

import multiprocessing
import signal

import pytest
from torch.utils.data import DataLoader

from relicctl.data.workers import working


def deaf(_: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_on_the_way_leaves_no_worker_behind(workers):
    held = []

    def interrupted() -> None:
        loader = DataLoader(range(100), batch_size=None, num_workers=workers, worker_init_fn=deaf)  # type: ignore[arg-type]
        with working(loader) as items:
            held.append(items)
            assert next(items) == 0
            assert len(multiprocessing.active_children()) == workers
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert multiprocessing.active_children() == []
