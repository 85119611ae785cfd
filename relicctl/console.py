"""stdout holds the result and nothing else; everything said to people goes to stderr from here."""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from relicctl.errors import Interrupted, RelicError, Terminated

PLAIN_INTERVAL_SECONDS = 5.0  # between two lines of progress where stderr is no terminal


class Progress(Protocol):
    """Tells how far a run is."""

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """``step`` steps are done; ``values`` (numbers or text) replace earlier ones of the same names."""


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
        """Columns as wide as their cells, numbers to the right."""
        if self.quiet:
            return
        cells = [list(header), *([_format_value(cell) for cell in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
        for line in cells:
            padded = [
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, numeric, strict=True)
            ]
            _print_stderr("  ".join(padded).rstrip())

    @contextmanager
    def progress(self, total: int, start: int = 0) -> Iterator[Progress]:
        """Progress from ``start`` to ``total`` steps: a live bar on a terminal, else plain lines."""
        if self.quiet:
            yield _NoProgress()
        elif sys.stderr is not None and sys.stderr.isatty():
            with _open_bar(total, start) as bar:
                yield bar
        else:
            lines = _PlainProgress(total)
            try:
                yield lines
            finally:
                lines.flush()


class _NoProgress:
    def update(self, step: int, values: Mapping[str, Any]) -> None:
        pass


class _PlainProgress:
    """Plain, flushed lines, each with the figures of its own step and no older ones.

    Of lines with the same figures, such as a step's losses, there is one every few seconds, and the last one; figures
    that are new, such as an evaluation's, are told at once.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._pending: dict[tuple[str, ...], tuple[int, dict[str, Any]]] = {}  # the latest, by the figures' names
        self._next_print: dict[tuple[str, ...], float] = {}

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        kind = tuple(values)
        if not kind and any(self._next_print):
            return  # there is nothing to tell that another line does not
        self._pending.pop(kind, None)
        self._pending[kind] = step, dict(values)
        if time.monotonic() >= self._next_print.get(kind, 0.0):
            self.flush()

    def flush(self) -> None:
        """Write what is known and was not written."""
        for kind, (step, values) in self._pending.items():
            _print_stderr(f"step {step}/{self._total}  {_format_metrics(values)}".rstrip())
            self._next_print[kind] = time.monotonic() + PLAIN_INTERVAL_SECONDS
        self._pending.clear()


@contextmanager
def _open_bar(total: int, start: int) -> Iterator[Progress]:
    """A bar, and below it the figures, which wrap on a narrow terminal."""
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

    class Bar:
        def update(self, step: int, values: Mapping[str, Any]) -> None:
            metrics.update(values)
            progress.update(task, completed=step)

    columns = (BarColumn(), MofNCompleteColumn())
    with BarWithMetrics(*columns, console=RichConsole(stderr=True), redirect_stdout=False) as progress:
        task = progress.add_task("", total=total, completed=start)
        yield Bar()


def write_result(result: str) -> None:
    """Write the result to stdout. Raises BrokenPipeError when its reader is gone."""
    print(result, flush=True)


def report_error(error: BaseException, *, debug: bool = False) -> int:
    """Say on stderr what went wrong and what to do about it; the process's exit code."""
    if isinstance(error, BrokenPipeError):
        _discard_stdout()  # the reader has left; there is nobody to tell
        return 1
    if debug and not isinstance(error, (Interrupted, KeyboardInterrupt, Terminated)):
        _print_stderr("".join(traceback.format_exception(error)).rstrip())
    what, fix, code = describe_error(error, debug=debug)
    _print_stderr(f"error: {what}\n  fix: {fix}")
    return code


def describe_error(error: BaseException, *, debug: bool = False) -> tuple[str, str, int]:
    """What went wrong, what to do about it, and the exit code."""
    if isinstance(error, RelicError):
        return error.what, error.fix, error.code
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted.", "Start it again.", 130
    if isinstance(error, Terminated):
        return "Terminated.", "Start it again.", 143
    if _is_out_of_memory(error):
        fix = (
            "Lower optim.batch_size, lower the count or size of views.large and views.small, or "
            "set runtime.activation_checkpointing=true or runtime.precision=bf16."
        )
        return f"Out of memory: {_get_first_line(error)}.", fix, 1
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"The networks cannot be compiled here: {_get_first_line(error)}.", "Set runtime.compile=false.", 1
    if outside := _describe_outside_error(error):
        return *outside, 1
    fix = "--debug shows the traceback." if not debug else "The traceback is above."
    return f"Unexpected {type(error).__name__}: {_get_first_line(error)}.", fix, 1


def _is_out_of_memory(error: BaseException) -> bool:
    """On the host or on the device; told by name, since torch may not even be imported."""
    messages = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in messages))
    )


_LOST_PEER_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo/transport",
    "NCCL error",
    "remote process",
)


def _is_dead_worker(error: BaseException) -> bool:
    """By the loader's own watch, or first by the queue between the processes, whose other end is gone."""
    if isinstance(error, (OSError, EOFError)):
        frames = traceback.walk_tb(error.__traceback__)
        return any("multiprocessing" in frame.f_code.co_filename for frame, _ in frames)
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def _describe_outside_error(error: BaseException) -> tuple[str, str] | None:
    """What broke around the process and not in it, by what torch and the system say of it."""
    text = _get_first_line(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"The disk is full{where}.", "Make room; a run goes on from its last checkpoint with --resume."
    if _is_dead_worker(error):
        return (
            f"A process that reads images has died ({text}).",
            "If memory ran out, lower --workers; a run goes on from its last checkpoint with --resume.",
        )
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_PEER_MESSAGES):
        return (
            f"Another process of this run has gone or cannot be reached ({text}).",
            "What it said itself comes first; the run goes on from its last checkpoint with --resume.",
        )
    return None


def _get_first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no more is known"]
    return lines[0].rstrip(".")


def _discard_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's own flush at exit does not fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _print_stderr(text: str) -> None:
    # A closed terminal (nohup, a gone ssh session) must not end a run.
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _format_metrics(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {_format_value(value)}" for name, value in values.items())


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
