"""stdout holds the result and nothing else; everything said to people goes to stderr from here."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from relicctl.errors import RelicError

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
    """One plain, flushed line every few seconds, and a last one."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._values: dict[str, Any] = {}
        self._step = self._written = -1
        self._due = 0.0

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        self._step = step
        self._values.update(values)
        if time.monotonic() >= self._due:
            self._write()

    def close(self) -> None:
        if self._written != self._step:
            self._write()

    def _write(self) -> None:
        _say(f"step {self._step}/{self._total}  {_figures(self._values)}".rstrip())
        self._written = self._step
        self._due = time.monotonic() + PLAIN_SECONDS


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
    if debug:
        _say("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, RelicError):
        what, fix, code = error.what, error.fix, error.code
    elif isinstance(error, KeyboardInterrupt):
        what, fix, code = "Interrupted.", "Start it again.", 130
    elif _out_of_memory(error):
        what = f"Out of memory: {_first_line(error)}."
        fix = (
            "Lower optim.batch_size, lower the count or size of views.large and views.small, or "
            "set runtime.activation_checkpointing=true or runtime.precision=bf16."
        )
        code = 1
    else:
        what = f"Unexpected {type(error).__name__}: {_first_line(error)}."
        fix = "--debug shows the traceback." if not debug else "The traceback is above."
        code = 1
    _say(f"error: {what}\n  fix: {fix}")
    return code


def _out_of_memory(error: BaseException) -> bool:
    """On the host or on the device; told by name, since torch may not even be imported."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


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
