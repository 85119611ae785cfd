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

PLAIN_SECONDS = 5.0  # between two lines of progress where stderr is no terminal


class Progress(Protocol):
    """Tells how far a run is."""

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """``step`` steps are done; ``values`` (numbers or text) replace earlier ones of the same names."""


class Console:
    """Notes, warnings, tables and progress on stderr; ``quiet`` leaves only warnings."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def note(self, text: str) -> None:
        if not self.quiet:
            _say(text)

    def warn(self, text: str) -> None:
        _say(f"warning: {text}")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Columns as wide as their cells, numbers to the right."""
        if self.quiet:
            return
        cells = [list(header), *([_shown(cell) for cell in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
        for line in cells:
            padded = [
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, numeric, strict=True)
            ]
            _say("  ".join(padded).rstrip())

    @contextmanager
    def progress(self, total: int, start: int = 0) -> Iterator[Progress]:
        """Progress from ``start`` to ``total`` steps: a live bar on a terminal, else plain lines."""
        if self.quiet:
            yield _Silent()
        elif sys.stderr is not None and sys.stderr.isatty():
            with _bar(total, start) as bar:
                yield bar
        else:
            lines = _Lines(total)
            try:
                yield lines
            finally:
                lines.close()


class _Silent:
    def update(self, step: int, values: Mapping[str, Any]) -> None:
        pass


class _Lines:
    """Plain, flushed lines, each with the figures of its own step and no older ones.

    Of lines with the same figures, such as a step's losses, there is one every few seconds, and the last one; figures
    that are new, such as an evaluation's, are told at once.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._unsaid: dict[tuple[str, ...], tuple[int, dict[str, Any]]] = {}  # the latest, by the figures' names
        self._due: dict[tuple[str, ...], float] = {}

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        kind = tuple(values)
        if not kind and any(self._due):
            return  # there is nothing to tell that another line does not
        self._unsaid.pop(kind, None)
        self._unsaid[kind] = step, dict(values)
        if time.monotonic() >= self._due.get(kind, 0.0):
            self.close()

    def close(self) -> None:
        """Write what is known and was not written."""
        for kind, (step, values) in self._unsaid.items():
            _say(f"step {step}/{self._total}  {_figures(values)}".rstrip())
            self._due[kind] = time.monotonic() + PLAIN_SECONDS
        self._unsaid.clear()


@contextmanager
def _bar(total: int, start: int) -> Iterator[Progress]:
    """A bar, and below it the figures, which wrap on a narrow terminal."""
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    known: dict[str, Any] = {}

    class BarAndFigures(RichProgress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            yield Text(_figures(known))

    class Bar:
        def update(self, step: int, values: Mapping[str, Any]) -> None:
            known.update(values)
            rich.update(task, completed=step)

    columns = (BarColumn(), MofNCompleteColumn())
    with BarAndFigures(*columns, console=RichConsole(stderr=True), redirect_stdout=False) as rich:
        task = rich.add_task("", total=total, completed=start)
        yield Bar()


def emit(result: str) -> None:
    """Write the result to stdout. Raises BrokenPipeError when its reader is gone."""
    print(result, flush=True)


def report(error: BaseException, *, debug: bool = False) -> int:
    """Say on stderr what went wrong and what to do about it; the process's exit code."""
    if isinstance(error, BrokenPipeError):
        _abandon_stdout()  # the reader has left; there is nobody to tell
        return 1
    if debug and not isinstance(error, (Interrupted, KeyboardInterrupt, Terminated)):
        _say("".join(traceback.format_exception(error)).rstrip())
    what, fix, code = sentences(error, debug=debug)
    _say(f"error: {what}\n  fix: {fix}")
    return code


def sentences(error: BaseException, *, debug: bool = False) -> tuple[str, str, int]:
    """What went wrong, what to do about it, and the exit code."""
    if isinstance(error, RelicError):
        return error.what, error.fix, error.code
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted.", "Start it again.", 130
    if isinstance(error, Terminated):
        return "Terminated.", "Start it again.", 143
    if _out_of_memory(error):
        fix = (
            "Lower optim.batch_size, lower the count or size of views.large and views.small, or "
            "set runtime.activation_checkpointing=true or runtime.precision=bf16."
        )
        return f"Out of memory: {_first_line(error)}.", fix, 1
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"The networks cannot be compiled here: {_first_line(error)}.", "Set runtime.compile=false.", 1
    if told := _around_us(error):
        return *told, 1
    fix = "--debug shows the traceback." if not debug else "The traceback is above."
    return f"Unexpected {type(error).__name__}: {_first_line(error)}.", fix, 1


def _out_of_memory(error: BaseException) -> bool:
    """On the host or on the device; told by name, since torch may not even be imported."""
    said = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in said))
    )


_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "NCCL error", "remote process")


def _reader_died(error: BaseException) -> bool:
    """By the loader's own watch, or first by the queue between the processes, whose other end is gone."""
    if isinstance(error, (OSError, EOFError)):
        frames = traceback.walk_tb(error.__traceback__)
        return any("multiprocessing" in frame.f_code.co_filename for frame, _ in frames)
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def _around_us(error: BaseException) -> tuple[str, str] | None:
    """What broke around the process and not in it, by what torch and the system say of it."""
    text = _first_line(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"The disk is full{where}.", "Make room; a run goes on from its last checkpoint with --resume."
    if _reader_died(error):
        return (
            f"A process that reads images has died ({text}).",
            "If memory ran out, lower --workers; a run goes on from its last checkpoint with --resume.",
        )
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_PEER):
        return (
            f"Another process of this run has gone or cannot be reached ({text}).",
            "What it said itself comes first; the run goes on from its last checkpoint with --resume.",
        )
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no more is known"]
    return lines[0].rstrip(".")


def _abandon_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's own flush at exit does not fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _say(text: str) -> None:
    # A closed terminal (nohup, a gone ssh session) must not end a run.
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _figures(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {_shown(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
