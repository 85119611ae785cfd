"""Data workers that leave in time, however the work that wants them ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from threadpoolctl import threadpool_limits
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


def _init_image_worker(_: int) -> None:
    """Signals are the main process's business: a worker goes on until it is told there is no more to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def _init_prior_worker(_: int) -> None:
    """Signals are the parent's business; one thread each, in OpenBLAS as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    threadpool_limits(1)


def _init_worker(_: int) -> None:
    """Signals are the training process's business: a worker goes on until it is told there is no more to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def _init_dense_worker(_: int) -> None:
    """Signals are the training process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
