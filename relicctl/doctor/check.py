"""What a check finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from relicctl.console import sentences


@dataclass(frozen=True)
class Finding:
    """``found`` is one sentence; ``fix`` is what to do about a ``warn`` or a ``fail``, else empty."""

    state: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def ok(found: str) -> Finding:
    return Finding("ok", found)


def warn(found: str, fix: str) -> Finding:
    return Finding("warn", found, fix)


def fail(found: str, fix: str) -> Finding:
    return Finding("fail", found, fix)


def find(check: Callable[[], Finding]) -> Finding:
    """What ``check`` finds; an error in it is a failure with the error's own sentences."""
    try:
        return check()
    except Exception as error:
        what, fix, _ = sentences(error)
        return fail(what, fix)
