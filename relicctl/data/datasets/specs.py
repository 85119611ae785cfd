"""The text by which users name data: braces, ``{split}``, folders within; what it means on disk is in ``open.py``."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Sequence

from relicctl.data.datasets.archives import split_spec
from relicctl.data.datasets.splits import SPLIT_FOLDERS, list_split_names
from relicctl.errors import DataError

MAX_SHARDS = 100_000  # a mistyped range must not fill the memory
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(text: str) -> list[str]:
    """Expand ``a{0..2}`` -> a0 a1 a2, ``{08..10}`` -> 08 09 10, ``{x,y}`` -> x y: every combination, as in a shell.

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
        # One more than allowed is enough for the error; the whole range might not fit in memory.
        numbers = itertools.islice(range(first, last + step, step), MAX_SHARDS + 1)
        return [f"{number:0{width}d}" for number in numbers]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]


def find_data_folders(spec: str) -> list[str]:
    """Return the paths of the folders that ``spec`` names; none for archives, the demo data and torchvision's."""
    places = map(split_spec, itertools.chain(*map(expand_spec, spell_splits(spec))))
    return [os.path.join(path, folder) if folder else path for path, folder in places if os.path.isdir(path)]


def spell_splits(spec: str) -> list[str]:
    """Return ``spec`` with every name of a split in place of ``{split}``; itself alone where it has none."""
    if "{split}" not in spec:
        return [spec]
    names = itertools.chain(*map(list_split_names, SPLIT_FOLDERS))
    return [spec.replace("{split}", name) for name in names]


def expand_spec(spec: str) -> list[str]:
    """Expand the braces of ``spec``, unless a file has them in its name."""
    return [spec] if os.path.lexists(spec) else expand_braces(spec)


def join_spec(spec: str, folder: str) -> str:
    """Return the spec of ``folder`` within the data that ``spec`` names."""
    return f"{spec}{'/' if '#' in spec else '#'}{folder}" if folder else spec
