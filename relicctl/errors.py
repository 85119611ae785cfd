"""Every failure a user can meet: one sentence on what is wrong, one on what to do, and the exit code."""

from __future__ import annotations


class RelicError(Exception):
    """Base of all expected failures.

    ``what`` says what is wrong, ``fix`` what the user can do about it; both are one sentence.
    ``code`` is the exit code of the process.
    """

    code = 1

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what} {fix}")
        self.what = what
        self.fix = fix

    def __reduce__(self):  # keeps both sentences when a worker process raises
        return type(self), (self.what, self.fix)


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

    def __reduce__(self):
        return type(self), (self.what, self.fix, self.signum)


class Terminated(SystemExit):
    """SIGTERM outside a training loop, as KeyboardInterrupt is SIGINT: nothing that swallows errors swallows it."""

    def __init__(self) -> None:
        super().__init__(143)
