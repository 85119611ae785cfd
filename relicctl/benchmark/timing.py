"""Repeated timings, told as median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


class Laps:
    """Seconds between laps, by name; the device is waited for at each, so that work counts where it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, list[float]] = {}
        self.restart()

    def restart(self) -> None:
        self._wait()
        self._since = time.perf_counter()

    def lap(self, name: str, without: float = 0.0) -> None:
        """Since the last lap, less ``without`` seconds."""
        self._wait()
        now = time.perf_counter()
        self.seconds.setdefault(name, []).append(now - self._since - without)
        self._since = now

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def core_seconds(function: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of this process's processor time for each of ``repeats`` calls, after one that is not counted.

    Processor time is what one core gives, whatever else runs beside; waiting for a disk is no part of it.
    """
    function()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return taken


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest, and how many there were; four digits."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in figures.items()} | {"runs": len(values)}
