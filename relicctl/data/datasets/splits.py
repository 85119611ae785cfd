"""Folders that are splits by their names, such as train and test."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What a split may be called, in any letter case; of several the first counts.
SPLIT_FOLDERS: dict[str, tuple[str, ...]] = {
    "train": ("train", "trainval", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
    "unlabeled": ("unlabeled", "unlabelled"),
}
_SPLITS = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}
_SUFFIX = re.compile(r"[-_ ]?(\d{4}|set|images|data)$")  # train2017, test_set


def get_split(folder: str) -> str | None:
    """Return the split that a folder is by its name, a key of SPLIT_FOLDERS; None if it is none."""
    return _SPLITS.get(folder.lower())


def spell_split(name: str) -> tuple[str, ...]:
    """Return a split's name in the usual letter cases, first as it is given."""
    return tuple(dict.fromkeys((name, name.capitalize(), name.upper())))


def list_split_names(split: str) -> list[str]:
    """Return what a split may be called, in the usual letter cases; those in lower case come first."""
    names = SPLIT_FOLDERS[split]
    return list(dict.fromkeys([*names, *(spelling for name in names for spelling in spell_split(name))]))


def find_mixed_splits(folders: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of splits that lie beside each other, by the path of the folder that holds them.

    ``folders`` are paths; those above them are looked at as well. Splits are two different ones, with or without other
    folders beside them, or folders all of which are named as splits.
    """
    children: dict[str, set[str]] = {}
    for folder in folders:
        parts = folder.split("/") if folder else []
        for depth, part in enumerate(parts):
            children.setdefault("/".join(parts[:depth]), set()).add(part)
    found = {parent: _find_splits(children[parent]) for parent in sorted(children)}
    return {parent: splits for parent, splits in found.items() if splits}


def _find_splits(siblings: set[str]) -> list[str]:
    splits = {name: get_split(name) or get_split(_SUFFIX.sub("", name.lower())) for name in siblings}
    named = sorted(name for name, split in splits.items() if split)
    all_are = len(siblings) > 1 and all(map(get_split, siblings))
    return named if all_are or len({splits[name] for name in named}) > 1 else []
