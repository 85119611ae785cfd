"""The table of renamed keys: YAML that says which config, metric and result keys of the old tree are which of the new.

    config:                           # dotted keys; a section's name renames all keys below it
      "*": {eval.holdout: eval.val_fraction, views.photometric: views.augment}      # of every command
      train-bgmask: {labels.drop: labels.drop_fraction}                             # of one; wins over "*"
      transfer --task detection:
        model.norm: {key: model.freeze_bn, values: {batch: false, frozen: true}}    # values renamed too
    added:                            # keys that only the new tree has, with their defaults
      pretrain: {model.bn_batch: size}
    metrics: {rank_me: rankme}        # names of keys in metrics.jsonl, headers of checkpoints and status.json
    results: {largest_batch_tried: largest_batch_measured}    # names of keys in results.json, cells, --json

All parts are optional. The names of metrics and results are replaced at any depth of any JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Renames:
    """Old name -> new name; empty where nothing was renamed."""

    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)
    added: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | None) -> Renames:
        """Read the table; no path is an empty one."""
        content = yaml.safe_load(path.read_text("utf-8")) or {} if path else {}
        return cls(*(content.get(part) or {} for part in ("config", "metrics", "results", "added")))

    def map_config_key(self, command: str, key: str, value: Any) -> tuple[str, Any]:
        """The new key and value of a dotted ``key`` of ``command``'s config; the longest entry that fits wins."""
        table = {**self.config.get("*", {}), **self.config.get(command, {})}
        fitting = [old for old in table if key == old or key.startswith(f"{old}.")]
        if not fitting:
            return key, value
        old = max(fitting, key=len)
        new = table[old]
        if isinstance(new, dict):
            values = new.get("values", {}) if isinstance(value, (str, int, float, bool)) else {}
            return new["key"], values.get(value, value)
        return new + key[len(old) :], value

    def add_defaults(self, command: str, flat: dict[str, Any]) -> dict[str, Any]:
        """A whole flat config with the keys that were added since."""
        return {**self.added.get("*", {}), **self.added.get(command, {}), **flat}

    def map_config(self, command: str, flat: dict[str, Any]) -> dict[str, Any]:
        """A flat config under its new keys."""
        return dict(self.map_config_key(command, key, value) for key, value in flat.items())

    def map_names(self, content: Any) -> Any:
        """JSON content under new metric and result keys, at any depth."""
        if isinstance(content, dict):
            names = {**self.metrics, **self.results}
            return {names.get(name, name): self.map_names(value) for name, value in content.items()}
        return [self.map_names(value) for value in content] if isinstance(content, list) else content

    def translate_arguments(self, arguments: tuple[str, ...]) -> list[str]:
        """A command line with the keys of its ``--set KEY=VALUE`` renamed."""
        command, translated = find_command(arguments), list(arguments)
        for place, argument in enumerate(arguments[1:], 1):
            if arguments[place - 1] == "--set" and "=" in argument:
                key, _, text = argument.partition("=")
                value = yaml.safe_load(text)
                new_key, new_value = self.map_config_key(command, key, value)
                translated[place] = f"{new_key}={text if new_value == value else yaml.safe_dump(new_value).split()[0]}"
        return translated

    def translate_config(self, command: str, config: dict[str, Any]) -> dict[str, Any]:
        """A nested config under its new keys, nested."""
        return nest(self.map_config(command, flatten(config)))


def find_command(arguments: tuple[str, ...]) -> str:
    """The command whose config a command line speaks of, as config.yaml names it."""
    command = arguments[0] if arguments else ""
    command = "pretrain" if command in ("bench", "doctor") else command
    task = arguments[arguments.index("--task") + 1] if "--task" in arguments[:-1] else "classification"
    return command if task == "classification" else f"{command} --task {task}"


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Inverse of ``flatten``."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree
