"""Data workers that leave in time, however the work that wants them ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader


@contextmanager
def run_workers(loader: DataLoader) -> Iterator[Iterator[Any]]:
    """The items of ``loader``, whose workers are sent home at the end of the block.

    Left to themselves they go when their iterator is collected. An exception may keep it until the process ends, which
    then waits for them for ever: they ignore signals.
    """
    items = iter(loader)
    try:
        yield items
    finally:
        # torch tells of a death when it hears of it: here too, where the work is done or has failed already.
        try:
            getattr(items, "_shutdown_workers", lambda: None)()  # torch has no public word for it
        except RuntimeError:
            for worker in getattr(items, "_workers", ()):
                worker.kill()  # who was not told yet would never hear of it
                worker.join()
