"""What a check finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from relicctl.console import describe_error


@dataclass(frozen=True)
class CheckResult:
    """``found`` is one sentence; ``fix`` is what to do about a ``warn`` or a ``fail``, else empty."""

    state: Literal["ok", "warn", "fail"]
    message: str
    fix: str = ""


def ok(message: str) -> CheckResult:
    return CheckResult("ok", message)


def warn(message: str, fix: str) -> CheckResult:
    return CheckResult("warn", message, fix)


def fail(message: str, fix: str) -> CheckResult:
    return CheckResult("fail", message, fix)


def run_check(check: Callable[[], CheckResult]) -> CheckResult:
    """What ``check`` finds; an error in it is a failure with the error's own sentences."""
    try:
        return check()
    except Exception as error:
        what, fix, _ = describe_error(error)
        return fail(what, fix)
