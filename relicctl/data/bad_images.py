"""Images that cannot be decoded: replaced by the next one, listed, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from relicctl.data.images import BadImageError
from relicctl.errors import DataError

MAX_SKIPPED = 1000  # samples looked at for one that can be decoded


class ImageSource(Protocol):
    """What images are loaded from: a Source, or images that were decoded before."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> np.ndarray: ...


@dataclass
class BadImages:
    """Samples that could not be decoded. Raises DataError when they are too many of ``size``."""

    size: int
    limit: float
    report: Callable[[str, str], None] = lambda name, reason: None
    seen: set[str] = field(default_factory=set)

    def add(self, name: str, reason: str) -> None:
        name = name.encode("unicode_escape").decode("ascii") if not name.isprintable() else name
        if name in self.seen:
            return
        self.seen.add(name)
        self.report(name, reason)
        if len(self.seen) > self.limit * self.size:
            raise DataError(
                f"{len(self.seen)} of {self.size} images cannot be decoded, more than the {self.limit:.1%} allowed; "
                f"the latest is {name} ({reason}).",
                "Repair or remove the files listed in bad_images.txt, or raise data.max_bad.",
            )


def is_decodable(source: ImageSource, index: int) -> bool:
    try:
        source.load(index)
    except BadImageError:
        return False
    return True


def load_or_next(source: ImageSource, index: int) -> tuple[np.ndarray, int, list[tuple[int, str]]]:
    """Image ``index``, or the first one after it that can be decoded; its index; and what was passed over."""
    skipped: list[tuple[int, str]] = []
    for candidate in range(index, index + min(len(source), MAX_SKIPPED)):
        candidate %= len(source)
        try:
            return source.load(candidate), candidate, skipped
        except BadImageError as bad:
            skipped.append((candidate, bad.reason))
    raise UndecodableError(skipped)


class UndecodableError(DataError):
    """Not one of many samples in a row can be decoded; ``passed`` are their indices and reasons."""

    def __init__(self, skipped: list[tuple[int, str]]) -> None:
        super().__init__(
            f"{len(skipped)} images in a row cannot be decoded, the first because: {skipped[0][1]}.",
            "Check that the files are images.",
        )
        self.skipped = skipped

    def __reduce__(self):
        return type(self), (self.skipped,)
