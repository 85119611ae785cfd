"""SIGINT and SIGTERM as requests to stop: after the step, or at once where a run only waits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequested(BaseException):
    """A signal came inside ``StopSignals.interruptible``; no ``except Exception`` on the way catches it."""


class StopSignals:
    """Notes SIGINT and SIGTERM while the block runs; a second signal ends the process at once.

    A scheduler may send SIGTERM to a job's processes more than once: two within REPEAT_SECONDS count as one. torchrun
    forwards to its workers what the scheduler has sent to them already: under it no second signal counts, and it kills
    workers that take too long itself.
    """

    REPEAT_SECONDS = 5.0

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._grace_seconds: float | None = None  # while waiting may be given up: how long after the signal
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        handlers = {signal.SIGINT: self._receive, signal.SIGTERM: self._receive, signal.SIGALRM: self._give_up}
        self._previous_handlers = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *exc: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def interruptible(self, grace_seconds: float = 0.0) -> Iterator[None]:
        """Raise StopRequested in the block ``grace_seconds`` after a signal, also after one that came before it."""
        self._grace_seconds = grace_seconds
        try:
            if self.received is not None:
                self._schedule_giving_up()
            yield
        finally:
            self._grace_seconds = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received == number == signal.SIGTERM and now - self._received_at < self.REPEAT_SECONDS:
            return
        if self.received is not None:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                return
            os._exit(128 + number)
        self.received, self._received_at = number, now
        self._schedule_giving_up()

    def _schedule_giving_up(self) -> None:
        if self._grace_seconds:
            signal.setitimer(signal.ITIMER_REAL, self._grace_seconds)
        else:
            self._give_up()

    def _give_up(self, number: int = 0, frame: FrameType | None = None) -> None:
        if self._grace_seconds is not None:
            self._grace_seconds = None
            raise StopRequested
