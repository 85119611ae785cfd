"""From defaults, a preset, a file, --set and options to one config, remembering where each value came from.

Layers are flat: a dict from dotted key (``optim.batch_size``) to value. A later layer wins. A preset or a file
says with ``command:`` which command it is for, and so which keys there are; a preset without is for pretrain.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from yaml import YAMLError

from relicctl.config import plain_yaml
from relicctl.config.bgmask import BgmaskConfig
from relicctl.config.dense import DetectionConfig, SegmentationConfig
from relicctl.config.linear import LinearConfig
from relicctl.config.presets import preset_path
from relicctl.config.schema import Config, Section
from relicctl.config.transfer import TransferConfig
from relicctl.errors import UsageError

SCHEMAS: dict[str, type[Section]] = {
    "pretrain": Config,
    "train-bgmask": BgmaskConfig,
    "linear-eval": LinearConfig,
    "transfer": TransferConfig,
    "transfer --task segmentation": SegmentationConfig,
    "transfer --task detection": DetectionConfig,
}

OPTION_KEYS = {
    "data": "data.train",
    "sets": "data.sets",  # the --data NAME=DATA of transfer
    "val": "data.val",
    "eval-data": "data.eval",
    "masks-for": "data.masks_for",
    "init-from": "model.encoder",
    "bgmask": "bgmask.bank",
    "protocol": "protocol",
    "labels": "labels",
    "device": "runtime.device",
    "workers": "runtime.workers",
    "seed": "seed",
}

# What an objective is by definition, taken wherever only a default or a preset says otherwise.
_DEFINITIONS: dict[str, dict[str, Any]] = {
    "relic": {"views.large.count": 2, "views.small.count": 0, "loss.negatives": "all"},
}
# Keys that an objective or a protocol never reads: refused in --set, where they would be ignored in silence.
_UNREAD = {
    "byol": ("loss.",),
    "simclr": ("loss.alpha", "loss.beta", "loss.negatives", "loss.invariance", "target.", "model.predictor."),
    "supervised": ("loss.", "target.", "model.projector.", "model.predictor."),
    "fast": ("crop.", "data.cache", "runtime.precision"),
}
_OF_MASKS = ("bgmask.probability", "bgmask.fill", "bgmask.limits")
# What an option says beside its own key.
_IMPLIED = {"bgmask": ("bgmask.source", "bank")}


@dataclass(frozen=True)
class Resolved:
    """A config and where each value came from, by dotted key: default, preset NAME, file PATH, --set, ..."""

    config: Any
    origin: dict[str, str]
    preset: str | None = None


class _Layers:
    """Values and origins while they pile up; every key is checked as it comes."""

    def __init__(self, schema: type[Section]) -> None:
        self.schema = schema
        self.values = flatten(schema().model_dump(), schema=schema)
        self.origin = dict.fromkeys(self.values, "default")

    def put(self, name: str, value: Any, where: str) -> None:
        if name not in self.values:
            raise _unknown(name, where, self.schema)
        self.values[name] = value
        self.origin[name] = where

    def put_all(self, content: dict[str, Any], where: str) -> None:
        for name, value in flatten(content, schema=self.schema).items():
            self.put(name, value, where)

    def config(self) -> Any:
        kind = "objective" if "objective" in self.values else "protocol"
        choice = self.values.get(kind)
        if isinstance(choice, str):
            for name, value in _DEFINITIONS.get(choice, {}).items():
                if self.values[name] != value and self.origin[name].startswith(("default", "preset")):
                    self.put(name, value, f"{kind} {choice}")
            for name, where in self.origin.items():
                if where == "--set" and name.startswith(_UNREAD.get(choice, ())):
                    raise UsageError(f"{name} means nothing to {kind} {choice}.", "Leave it out.")
                if where == "--set" and name in _OF_MASKS and self.values["bgmask.source"] == "none":
                    if name == "bgmask.probability" and self.values[name] == 0:
                        continue  # no masks are wanted of a preset that asks for some
                    raise UsageError(
                        f"{name} means nothing while bgmask.source is none.", "Give --bgmask RUN, or leave it out."
                    )
        return _validated(self.values, self.origin, self.schema)


def resolve(
    preset: str | None = None,
    config_file: Path | None = None,
    sets: Iterable[str] = (),
    options: dict[str, Any] | None = None,
    *,
    schema: type[Section] | None = None,
    base: dict[str, Any] | None = None,
) -> Resolved:
    """Defaults < ``base`` < preset < file < --set < options.

    ``options`` goes by OPTION_KEYS' names, None meaning not given. A preset or a file may say
    ``extends: PRESET``. ``schema``: the keys of the command that asks; None = of the command that preset or
    file are for. ``base``: dotted keys taken from the run that is worked on. Raises UsageError for whatever is wrong.
    """
    contents = _preset_contents(preset) if preset is not None else []
    if config_file is not None:
        content = _without_record(plain_yaml.load_mapping(config_file))
        if (parent := content.pop("extends", None)) is not None:
            if preset is not None:
                raise UsageError(f"{config_file} already extends preset {parent}.", "Leave out --preset.")
            contents = _preset_contents(str(parent))
        contents.append((f"file {config_file}", content))
    layers = _Layers(_schema_of(contents, schema))
    for name, value in (base or {}).items():
        layers.put(name, value, "run")
    for where, content in contents:
        layers.put_all(content, where)
    for assignment in sets:
        layers.put(*_assignment(assignment, layers.schema), "--set")
    for name, value in (options or {}).items():
        if value is not None:
            where = "--data" if name == "sets" else f"--{name}"
            layers.put(OPTION_KEYS[name], value, where)
            if name in _IMPLIED:
                layers.put(*_IMPLIED[name], where)
    return Resolved(layers.config(), layers.origin, preset)


def rebase(resolved: Resolved, run_config: Path) -> Resolved:
    """The config of an earlier run, with what the user gave by file, --set or option on top of it."""
    content = _without_record(plain_yaml.load_mapping(run_config))
    layers = _Layers(_schema_of([(str(run_config), content)], type(resolved.config)))
    layers.put_all(content, "run")
    given = flatten(resolved.config.model_dump(), schema=layers.schema)
    for name, where in resolved.origin.items():
        if where.startswith(("file", "--")):
            layers.put(name, given[name], where)
    return Resolved(layers.config(), layers.origin, resolved.preset)


def load_run_config(path: Path) -> Config:
    """The config in RUN/config.yaml. Raises UsageError when the file is missing or wrong."""
    return resolve(config_file=path, schema=Config).config


def dump_yaml(config: Section, origin: dict[str, str] | None = None) -> str:
    """The config as YAML, every key written out; with ``origin``, comments say where each value came from."""
    command = command_of(type(config))
    lines = [] if command == "pretrain" else [(f"command: {command}", "")]

    def walk(content: dict[str, Any], prefix: str, indent: str) -> None:
        for name, value in content.items():
            if isinstance(value, dict) and prefix + name not in leaves(type(config)):
                lines.append((f"{indent}{name}:", ""))
                walk(value, f"{prefix}{name}.", indent + "  ")
            else:
                comment = f"# from {origin[prefix + name]}" if origin else ""
                lines.append((f"{indent}{name}: {plain_yaml.dump_value(value)}", comment))

    walk(config.model_dump(), "", "")
    column = min(46, max(len(line) for line, _ in lines))
    return "".join(f"{line:<{column}}  {comment}".rstrip() + "\n" for line, comment in lines)


def flatten(content: dict[str, Any], prefix: str = "", schema: type[Section] = Config) -> dict[str, Any]:
    """Nested sections as one dict of dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in leaves(schema):
            flat |= flatten(value, f"{prefix}{name}.", schema)
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@cache
def leaves(schema: type[Section] = Config) -> dict[str, FieldInfo]:
    """Every dotted key that holds a value, in the schema's order."""

    def walk(section: type[Section], prefix: str) -> Iterable[tuple[str, FieldInfo]]:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from walk(field.annotation, f"{prefix}{name}.")
            else:
                yield prefix + name, field

    return dict(walk(schema, ""))


def command_of(schema: type[Section]) -> str:
    """The command whose keys these are."""
    return next(name for name, known in SCHEMAS.items() if known is schema)


def _preset_contents(name: str) -> list[tuple[str, dict[str, Any]]]:
    """What a preset says, after what it extends: pairs of origin and content."""
    content = plain_yaml.load_mapping(preset_path(name))
    parent = content.pop("extends", None)
    return [*(_preset_contents(str(parent)) if parent is not None else []), (f"preset {name}", content)]


def _schema_of(contents: list[tuple[str, dict[str, Any]]], schema: type[Section] | None) -> type[Section]:
    """The one schema that all ``contents`` are for, whose ``command`` is taken out. UsageError if they differ.

    Presets and runs without one are pretrain's; a user's file may leave it to the command that reads it.
    """
    for where, content in contents:
        command = content.pop("command", None if where.startswith("file") else "pretrain")
        if command is None:
            continue
        if command not in SCHEMAS:
            raise UsageError(f"command cannot be {command!r} (from {where}).", f"Write {_either(SCHEMAS)}.")
        if schema not in (None, SCHEMAS[command]):
            raise UsageError(
                f"{where} is for `relicctl {command}`, not for {command_of(schema)}.", "Give another, or none."
            )
        schema = SCHEMAS[command]
    return schema or Config


def _without_record(content: dict[str, Any]) -> dict[str, Any]:
    """RUN/config.yaml also records version and data under ``run``, which are facts and no settings."""
    return {name: value for name, value in content.items() if name != "run"}


def _assignment(text: str, schema: type[Section]) -> tuple[str, Any]:
    """KEY=VALUE, split at the first "="; text keys take VALUE as it stands, others read it as YAML."""
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise UsageError(f"--set {text!r} is no KEY=VALUE.", "Write it like --set optim.batch_size=256.")
    if name in leaves(schema) and leaves(schema)[name].annotation == str | None:
        return name, None if value in ("null", "") else value
    try:
        return name, plain_yaml.load(value)
    except YAMLError:
        return name, value  # the schema says what is allowed instead


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree


def _validated(values: dict[str, Any], origin: dict[str, str], schema: type[Section]) -> Section:
    try:
        return schema.model_validate(_nested(values))
    except ValidationError as reason:
        loc = [str(part) for part in reason.errors()[0]["loc"]]
        name = next(key for size in range(len(loc), 0, -1) if (key := ".".join(loc[:size])) in leaves(schema))
        field = leaves(schema)[name]
        raise UsageError(
            f"{name} cannot be {plain_yaml.dump_value(values[name])[:80]} (from {origin[name]}).",
            f"Give {allowed(name, schema)}: {field.description}.",
        ) from None


def _unknown(name: str, where: str, schema: type[Section]) -> UsageError:
    known = leaves(schema)
    inside = [key for key in known if key.startswith(f"{name}.")]
    if inside:
        return UsageError(f"{name} (from {where}) is a group of keys and takes no value.", f"Set {_either(inside)}.")
    last = {key: key.rpartition(".")[2] for key in known}
    close = difflib.get_close_matches(name, known, 3, 0.7)
    close += [
        key
        for key in known
        if difflib.SequenceMatcher(None, last[key], name.rpartition(".")[2]).ratio() > 0.8 and key not in close
    ]
    listing = f"`relicctl {command_of(schema)} --dry-run` lists all keys."
    fix = f"Did you mean {_either(close[:3])}?" if close else listing
    return UsageError(f"There is no key {name!r} (from {where}).", fix)


def allowed(name: str, schema: type[Section] = Config) -> str:
    """In words, the values that a key takes: "a whole number from 1 or null"."""
    whole = schema.model_json_schema()
    node = whole
    for part in name.split("."):
        node = node["properties"][part]
        if "$ref" in node:
            node = whole["$defs"][node["$ref"].rpartition("/")[2]]
    return _in_words(node)


_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
}
_LIMITS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "up to",
    "exclusiveMaximum": "below",
    "multipleOf": "in steps of",
}


def _in_words(node: dict[str, Any]) -> str:
    if "anyOf" in node:
        return _either(_in_words(choice) for choice in node["anyOf"])
    if "enum" in node or "const" in node:
        return _either(node.get("enum") or [node["const"]])
    if node["type"] == "object":
        return f"a mapping, each {_in_words(node['additionalProperties'])}"
    if node["type"] == "array" and "items" in node:
        return f"a list, each {_in_words(node['items'])}"
    if node["type"] == "array":
        return f"a pair [a, b], each {_in_words(node['prefixItems'][0])}"
    limits = [f"{word} {node[limit]:g}" for limit, word in _LIMITS.items() if limit in node]
    return " ".join([_TYPES[node["type"]], *limits])


def _either(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
