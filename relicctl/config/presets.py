"""The presets that come with relicctl: YAML files beside the code in a wheel, at the root of a checkout."""

from __future__ import annotations

import difflib
from functools import cache
from itertools import takewhile
from pathlib import Path

from relicctl.errors import UsageError


@cache
def _find_presets_folder() -> Path:
    package = Path(__file__).resolve().parents[1]
    inside = package / "presets"
    return inside if inside.is_dir() else package.parent / "presets"


def list_presets() -> list[str]:
    """Return all names, sorted."""
    return sorted(path.stem for path in _find_presets_folder().glob("*.yaml"))


def find_preset(name: str) -> Path:
    """Return the preset's file. Raises UsageError for an unknown name."""
    names = list_presets()
    if name in names:
        return _find_presets_folder() / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")):
        fix = f"For a file of your own write --config {name}."
    elif close := difflib.get_close_matches(name, names, 3, 0.4):
        fix = f"Did you mean {' or '.join(close)}?"
    else:
        fix = "See the names with `relicctl presets ls`."
    raise UsageError(f"There is no preset {name!r}.", fix)


def read_preset(name: str) -> str:
    """Read the preset's YAML. Raises UsageError for an unknown name."""
    return find_preset(name).read_text(encoding="utf-8")


def read_preset_header(name: str) -> str:
    """Return the comment that the preset begins with; its first line says what the preset is."""
    comment = takewhile(lambda line: line.startswith("#"), read_preset(name).splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in comment)
