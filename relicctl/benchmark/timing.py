"""Repeated timings, told as median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


class LapTimer:
    """Seconds between laps, by name; on a GPU by its own clock, so that nothing waits and it works as in training."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._laps: list[tuple[str, Any, Any, float]] = []
        self.reset()

    def reset(self) -> None:
        self._last = self._record_time()

    def record_lap(self, name: str, excluded: float = 0.0) -> None:
        """Since the last lap, less ``without`` seconds."""
        now = self._record_time()
        self._laps.append((name, self._last, now, excluded))
        self._last = now

    def get_seconds(self) -> dict[str, list[float]]:
        """Of all laps so far; a GPU is waited for."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds_by_name: dict[str, list[float]] = {}
        for name, since, now, without in self._laps:
            taken = since.elapsed_time(now) / 1000 if self._cuda else now - since
            seconds_by_name.setdefault(name, []).append(max(0.0, taken - without))
        return seconds_by_name

    def _record_time(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def measure_cpu_seconds(function: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of this process's processor time for each of ``repeats`` calls, after one that is not counted.

    Processor time is what one core gives, whatever else runs beside; waiting for a disk is no part of it.
    """
    function()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return seconds


def summarize_timings(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest, and how many there were; four digits."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in figures.items()} | {"runs": len(values)}
