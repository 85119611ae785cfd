"""Every failure a user can meet: one sentence on what is wrong, one on what to do, and the exit code.

``describe_error`` finds these for failures of Python, torch and the system as well, by their types and messages.
"""

from __future__ import annotations

import errno
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
OUT_OF_MEMORY_FIX = (
    "Lower optim.batch_size, lower the count or size of views.large and views.small, or "
    "set runtime.activation_checkpointing=true or runtime.precision=bf16."
)
LOST_PEER_MESSAGES = (
    "Connection closed by peer", "Connection reset by peer", "gloo/transport", "NCCL error", "remote process",
)  # fmt: skip


class RelicError(Exception):
    """Base of all expected failures.

    ``what`` says what is wrong, ``fix`` what the user can do about it; both are one sentence.
    ``code`` is the exit code of the process.
    """

    code = 1
    of_one_rank = False  # raised among ranks that have met, so that others may not have the same

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what, fix)  # both, so that the error can be pickled in a worker process
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what} {self.fix}"


class RunFailed(RelicError):
    """Something broke while running: exit code 1."""


class UsageError(RelicError):
    """A wrong option, key or value: exit code 2."""

    code = 2


class DataError(RelicError):
    """The data cannot be used: exit code 3."""

    code = 3


class Diverged(RelicError):
    """The loss or a gradient is no longer finite: exit code 4."""

    code = 4


class Interrupted(RelicError):
    """Stopped by a signal after saving: exit code 128 + signal number (130 or 143)."""

    def __init__(self, what: str, fix: str, signum: int = 15) -> None:
        super().__init__(what, fix)
        self.signum = signum
        self.code = 128 + signum


class Terminated(SystemExit):
    """SIGTERM outside a training loop, as KeyboardInterrupt is SIGINT; no ``except Exception`` catches it."""

    def __init__(self) -> None:
        super().__init__(143)


@contextmanager
def raise_interrupted(what: str, fix: str) -> Iterator[None]:
    """Raise Interrupted for a signal that ends the block: its name and ``what``, as in "SIGINT before the first step".

    ``fix`` says how to go on.
    """
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        signum = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        raise Interrupted(f"{signum.name} {what}", fix, signum) from None


def describe_error(error: BaseException, *, debug: bool = False) -> tuple[str, str, int]:
    """Return what went wrong, what to do about it, and the exit code."""
    if isinstance(error, RelicError):
        return error.what, error.fix, error.code
    if isinstance(error, KeyboardInterrupt):
        return "SIGINT before anything was saved.", "Start it again.", 130
    if isinstance(error, Terminated):
        return "SIGTERM before anything was saved.", "Start it again.", 143
    return *_describe_failure(error, debug), 1


def _describe_failure(error: BaseException, debug: bool) -> tuple[str, str]:
    """Return what went wrong and what to do for a failure of the machine, of another process or of the program."""
    text = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
    if _is_out_of_memory(error):
        return f"Out of memory: {text}.", OUT_OF_MEMORY_FIX
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"The networks cannot be compiled here: {text}.", "Set runtime.compile=false."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"The disk is full{where}.", "Make room; --resume continues a run from its last checkpoint."
    if _is_dead_worker(error):
        fix = "If memory ran out, lower --workers; --resume continues a run from its last checkpoint."
        return f"A data worker died ({text}).", fix
    if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER_MESSAGES):
        fix = "See its own message first; --resume continues the run from its last checkpoint."
        return f"Another process of this run has ended or cannot be reached ({text}).", fix
    fix = "The traceback is above." if debug else "--debug shows the traceback."
    return f"Unexpected {type(error).__name__}: {text}.", fix


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether CPU or GPU memory ran out; by the error's name and text, since torch may not even be imported."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_MESSAGES))
    )


def _is_dead_worker(error: BaseException) -> bool:
    """Whether a data worker died: seen by the loader's watch, or first by the queue whose other end is closed."""
    if isinstance(error, (OSError, EOFError)):
        frames = traceback.walk_tb(error.__traceback__)
        return any("multiprocessing" in frame.f_code.co_filename for frame, _ in frames)
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
