"""Names of samples: which are safe, what folder says the class, and how a million of them stay small."""

from __future__ import annotations

import itertools
import math
import posixpath
import re
from collections.abc import Iterable, Sequence

import numpy as np

from relicctl.data.images import IMAGE_EXTENSIONS
from relicctl.errors import DataError

MAX_SHARDS = 100_000  # a mistyped range must not fill the memory
SPLIT_NAMES = {
    "train",
    "training",
    "val",
    "valid",
    "validation",
    "test",
    "testing",
    "unlabeled",
    "unlabelled",
}

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class PackedNames(Sequence[str]):
    """Names in one bytes object with offsets.

    A list of a million strings costs every forked worker a copy of them all, since counting a reference
    writes to each string's page.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._blob = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def get_raw_name(self, index: int) -> bytes:
        """The name as the file system or archive spells it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._blob[self._ends[index] : self._ends[index + 1]]

    def __getitem__(self, index):
        """The name as text that can always be printed."""
        return self.get_raw_name(index).decode("utf-8", "backslashreplace")


def normalize_image_name(name: str) -> str | None:
    """The normalised relative name of an image in an archive or folder; None for what is not to be used.

    Names that lead out of their root (absolute, drive letter, ``..``), hidden files, and other kinds of files
    are not used.
    """
    if not name.lower().endswith(IMAGE_EXTENSIONS) or name.startswith("/") or name[1:3] in (":/", ":\\"):
        return None
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):  # ".." among them
        return None
    return "/".join(parts)


def infer_classes(names: Sequence[str], spec: str) -> tuple[tuple[str, ...], np.ndarray | None]:
    """The sorted class names and the label of every name, int64 ``[N]``; ``(), None`` if unlabelled.

    The class is the first folder level. Folders that enclose everything come off before: ``photos/cat/1.jpg``
    and ``photos/dog/2.jpg`` are a cat and a dog, and a single folder of images is no class. As soon as one
    image lies beside the class folders, the data count as unlabelled.
    Raises DataError if the folders are splits such as train and test: together they would leak.
    """
    enclosing = posixpath.commonpath({name.rpartition("/")[0] for name in names})
    start = len(enclosing) + 1 if enclosing else 0
    folders = [name[start : name.find("/", start)] if "/" in name[start:] else "" for name in names]
    classes = sorted(set(folders))
    if classes[0] == "":
        return (), None
    if SPLIT_NAMES.issuperset(map(str.lower, classes)):
        first = min(classes, key=lambda name: not name.lower().startswith("train"))
        inner = f"{enclosing}/{first}" if enclosing else first
        raise DataError(
            f"The folders of {spec} are splits, not classes: {', '.join(classes)}.",
            f"Name one of them, for example {spec}#{inner}.",
        )
    number = {name: label for label, name in enumerate(classes)}
    return tuple(classes), np.array([number[folder] for folder in folders], dtype=np.int64)


def expand_braces(text: str) -> list[str]:
    """``a{0..2}`` -> a0 a1 a2, ``{08..10}`` -> 08 09 10, ``{x,y}`` -> x y: every combination, as in a shell.

    Braces without a range or a comma stand for themselves; braces within braces are not expanded.
    Raises DataError beyond MAX_SHARDS names.
    """
    pieces = _BRACES.split(text)  # literal, inside, literal, inside, ..., literal
    choices = [_expand_brace(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise DataError(f"{text} stands for more than {MAX_SHARDS} names.", "Check the numbers in the braces.")
    return ["".join(choice) for choice in itertools.product(*choices)]


def _expand_brace(inside: str) -> Sequence[str]:
    if bounds := _RANGE.fullmatch(inside):
        first, last = int(bounds[1]), int(bounds[2])
        padded = any(len(bound) > 1 and bound.startswith("0") for bound in bounds.groups())
        width = max(map(len, bounds.groups())) if padded else 0
        step = 1 if last >= first else -1
        # One more than allowed is enough to be refused; the whole range might not fit in memory.
        numbers = itertools.islice(range(first, last + step, step), MAX_SHARDS + 1)
        return [f"{number:0{width}d}" for number in numbers]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]
