"""stderr is for people: notes, warnings, tables, progress and errors. stdout holds the result and nothing else."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from relicctl.errors import Interrupted, Terminated, describe_error

PLAIN_INTERVAL_SECONDS = 5.0  # between two lines of progress where stderr is no terminal


class Progress:
    """Shows how far a run is; this base class shows nothing."""

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Show that ``step`` steps are done; ``values`` (numbers or text) replace earlier ones of the same names."""


class Console:
    """Notes, warnings, tables and progress on stderr; ``quiet`` leaves only warnings."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def info(self, text: str) -> None:
        if not self.quiet:
            _print_stderr(text)

    def warn(self, text: str) -> None:
        _print_stderr(f"warning: {text}")

    def print_table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print columns as wide as their cells, numbers aligned right."""
        if self.quiet:
            return
        cells = [list(header), *([_format_value(cell) for cell in row] for row in rows)]
        formats = []
        for i, column in enumerate(zip(*cells, strict=True)):
            is_numeric = all(isinstance(row[i], (int, float)) for row in rows)
            formats.append(f"{'>' if is_numeric else '<'}{max(map(len, column))}")
        for line in cells:
            _print_stderr("  ".join(map(format, line, formats)).rstrip())

    @contextmanager
    def progress(self, total: int, start: int = 0) -> Iterator[Progress]:
        """Show progress from ``start`` to ``total`` steps: a live bar on a terminal, else plain lines."""
        if self.quiet:
            yield Progress()
        elif sys.stderr is not None and sys.stderr.isatty():
            with _open_bar(total, start) as bar:
                yield bar
        else:
            lines = _PlainProgress(total)
            try:
                yield lines
            finally:
                lines.flush()


class _PlainProgress(Progress):
    """Plain, flushed lines, each with the metrics of its step and no older ones.

    Lines with the same metrics, such as a step's losses, are printed every few seconds, and the last one; new metrics,
    such as those of an evaluation, at once.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._pending: dict[tuple[str, ...], tuple[int, dict[str, Any]]] = {}  # the latest, by the metrics' names
        self._next_print: dict[tuple[str, ...], float] = {}

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        kind = tuple(values)
        if not kind and any(self._next_print):
            return  # another line says as much
        self._pending.pop(kind, None)
        self._pending[kind] = step, dict(values)
        if time.monotonic() >= self._next_print.get(kind, 0.0):
            self.flush()

    def flush(self) -> None:
        """Print what has not been printed."""
        for kind, (step, values) in self._pending.items():
            _print_stderr(f"step {step}/{self._total}  {_format_metrics(values)}".rstrip())
            self._next_print[kind] = time.monotonic() + PLAIN_INTERVAL_SECONDS
        self._pending.clear()


@contextmanager
def _open_bar(total: int, start: int) -> Iterator[Progress]:
    """Show a bar, and below it the metrics, which wrap on a narrow terminal."""
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    metrics: dict[str, Any] = {}

    class BarWithMetrics(RichProgress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            yield Text(_format_metrics(metrics))

    class Bar(Progress):
        def update(self, step: int, values: Mapping[str, Any]) -> None:
            metrics.update(values)
            progress.update(task, completed=step)

    columns = (BarColumn(), MofNCompleteColumn())
    with BarWithMetrics(*columns, console=RichConsole(stderr=True), redirect_stdout=False) as progress:
        task = progress.add_task("", total=total, completed=start)
        yield Bar()


def report_error(error: BaseException, *, debug: bool = False) -> int:
    """Print on stderr what went wrong and what to do about it; return the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reading process has ended: no error of ours. The interpreter's flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    if debug and not isinstance(error, (Interrupted, KeyboardInterrupt, Terminated)):
        _print_stderr("".join(traceback.format_exception(error)).rstrip())
    what, fix, code = describe_error(error, debug=debug)
    stopped = code in (130, 143)  # SIGINT, SIGTERM: no error
    _print_stderr(f"stopped: {what}\n  {fix}" if stopped else f"error: {what}\n  fix: {fix}")
    return code


def _print_stderr(text: str) -> None:
    # A closed terminal (nohup, a lost ssh session) must not end a run.
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _format_metrics(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {_format_value(value)}" for name, value in values.items())


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
