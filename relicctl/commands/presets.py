"""``relicctl presets``: list, show and copy the experiments that come along."""

from __future__ import annotations

from pathlib import Path

from relicctl.config import yaml_io
from relicctl.config.presets import find_preset, list_presets, read_preset, read_preset_header
from relicctl.config.resolve import dump_yaml, resolve_config
from relicctl.errors import UsageError


def format_preset_list() -> str:
    """Return one line per preset: its name, the command it is for and what it is; pretrain's first."""
    rows = []
    for name in list_presets():
        command = str(yaml_io.load_mapping(find_preset(name)).get("command", "pretrain"))
        rows.append((name, command, read_preset_header(name).splitlines()[0]))
    rows.sort(key=lambda row: (row[1] != "pretrain", row[1]))
    names, commands = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{name:<{names}}  {command:<{commands}}  {what}" for name, command, what in rows)


def format_preset(name: str) -> str:
    """Return the preset's comment and its whole config, with the origin of every value."""
    resolved = resolve_config(name)
    comment = "".join(f"# {line}".rstrip() + "\n" for line in read_preset_header(name).splitlines())
    return f"{comment}\n{dump_yaml(resolved.config, resolved.origin)}".rstrip()


def copy_preset(name: str, destination: Path) -> Path:
    """Copy the preset to a file, or into a folder under its name. Raises UsageError rather than overwrite."""
    text = read_preset(name)
    path = destination / f"{name}.yaml" if destination.is_dir() else destination
    try:
        with path.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except FileExistsError:
        raise UsageError(f"{path} exists already.", "Choose another name, or remove it first.") from None
    except OSError as reason:
        raise UsageError(f"{path} cannot be written ({reason.strerror}).", "Choose another place.") from None
    return path
