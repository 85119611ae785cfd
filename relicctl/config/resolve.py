"""From defaults, a preset, a file, --set and options to one config, remembering where each value came from.

Layers are flat: a dict from dotted key (``optim.batch_size``) to value. A later layer wins. A preset or a file
says with ``command:`` which command it is for, and so which keys there are; a preset without is for pretrain.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from yaml import YAMLError

from relicctl.config import yaml_io
from relicctl.config.base import CommandConfig, Section
from relicctl.config.bgmask import BgmaskConfig
from relicctl.config.linear_eval import LinearEvalConfig
from relicctl.config.presets import find_preset
from relicctl.config.pretrain import PretrainConfig
from relicctl.config.renamed import RENAMED, rename_key, rename_value
from relicctl.config.transfer import DetectionConfig, SegmentationConfig, TransferConfig
from relicctl.errors import UsageError

SCHEMAS: dict[str, type[CommandConfig]] = {
    "pretrain": PretrainConfig,
    "train-bgmask": BgmaskConfig,
    "linear-eval": LinearEvalConfig,
    "transfer": TransferConfig,
    "transfer --task segmentation": SegmentationConfig,
    "transfer --task detection": DetectionConfig,
}
LENGTH_KEYS = ("epochs", "steps", "max_steps")


@dataclass(frozen=True)
class ResolvedConfig:
    """A config and where each value came from, by dotted key: default, preset NAME, file PATH, --set, ..."""

    config: Any
    origin: dict[str, str]
    preset: str | None = None
    renamed: dict[str, str] = field(default_factory=dict)  # old names that file or --set used -> the present ones


class _ConfigLayers:
    """Values and origins while they pile up; every key is checked as it comes. Old names of keys are understood."""

    def __init__(self, schema: type[CommandConfig]) -> None:
        self.schema, self.command = schema, get_command(schema)
        self.values = flatten(schema().model_dump(), schema=schema)
        self.origin = dict.fromkeys(self.values, "default")
        self.renamed: dict[str, str] = {}
        self._given_as: dict[tuple[str, str], str] = {}  # (source, present name) -> the name that was used

    def set_value(self, name: str, value: Any, where: str) -> None:
        new_name = rename_key(self.command, name)
        used = self._given_as.setdefault((where, new_name), name)
        if used != name:
            what = f"{used} and {name} (from {where}) are two names of one key."
            raise UsageError(what, f"Keep {new_name} alone.")
        if new_name != name:
            if not where.startswith("run"):  # names in a run's own config.yaml are not the user's
                self.renamed[name] = new_name
            name, value = new_name, rename_value(self.command, name, value)
        if name not in self.values:
            raise _make_unknown_key_error(name, where, self.schema)
        self.values[name] = value
        self.origin[name] = where

    def set_values(self, content: dict[str, Any], where: str) -> None:
        for name, value in flatten(content, schema=self.schema).items():
            self.set_value(name, value, where)

    def build_config(self) -> Any:
        for key, definitions in self.schema.implied_values.items():
            for name, value in definitions.get(str(self.values[key]), {}).items():
                if self.values[name] != value and self.origin[name].startswith(("default", "preset")):
                    self.set_value(name, value, f"{key} {self.values[key]}")
        for key, unused in self.schema.unused_keys.items():
            for name in self.values:
                if self.origin[name] == "--set" and name.startswith(unused.get(str(self.values[key]), ())):
                    self._refuse_unused(name, key)
        given_as = {name: self._given_as.get((where, name), name) for name, where in self.origin.items()}
        return _validate(self.values, self.origin, given_as, self.schema)

    def _refuse_unused(self, name: str, key: str) -> None:
        if name in self.schema.harmless_values and self.values[name] == self.schema.harmless_values[name]:
            return
        option = next((o for o, values in self.schema.implied_by_option.items() if key in values), None)
        what = f"{name} has no effect while {key} is {self.values[key]}."
        raise UsageError(what, f"Give --{option}, or leave it out." if option else "Leave it out.")


def resolve_config(
    preset: str | None = None,
    config_file: Path | None = None,
    sets: Iterable[str] = (),
    options: dict[str, Any] | None = None,
    *,
    schema: type[CommandConfig] | None = None,
    run_config: Path | None = None,
) -> ResolvedConfig:
    """Defaults < preset < the resumed run < file < --set < options.

    ``options`` goes by the names of the schema's option_keys, None meaning not given. A preset or a file may say
    ``extends: PRESET``. ``schema``: the keys of the command that asks; None = those of the command that preset
    or file are for. ``run_config``: config.yaml of the run that is resumed. Raises UsageError for any mistake.
    """
    contents = _load_preset_layers(preset) if preset is not None else []
    given = []
    if config_file is not None:
        content = _drop_run_record(yaml_io.load_mapping(config_file))
        if (parent := content.pop("extends", None)) is not None:
            if preset is not None:
                raise UsageError(f"{config_file} already extends preset {parent}.", "Leave out --preset.")
            contents = _load_preset_layers(str(parent))
        given.append((f"file {config_file}", content))
    if run_config is not None:
        contents.append((f"run {run_config}", _drop_run_record(yaml_io.load_mapping(run_config))))
    contents += given
    layers = _ConfigLayers(_find_schema(contents, schema))
    for where, content in contents:
        layers.set_values(content, where)
    for assignment in sets:
        layers.set_value(*_parse_assignment(assignment, layers.schema), "--set")
    for name, value in (options or {}).items():
        if value is not None:
            implied = layers.schema.implied_by_option.get(name, {})
            for key, key_value in {layers.schema.option_keys[name]: value, **implied}.items():
                layers.set_value(key, key_value, f"--{name}")
    return ResolvedConfig(layers.build_config(), layers.origin, preset, layers.renamed)


def replace_defaults(resolved: ResolvedConfig, values: dict[str, Any], where: str = "run") -> ResolvedConfig:
    """``resolved`` with ``values`` (by dotted key) in place of those that are still defaults."""
    layers = _ConfigLayers(type(resolved.config))
    layers.values, layers.origin = flatten(resolved.config.model_dump(), schema=layers.schema), dict(resolved.origin)
    for name, value in values.items():
        if layers.origin[name] == "default":
            layers.set_value(name, value, where)
    return ResolvedConfig(layers.build_config(), layers.origin, resolved.preset, resolved.renamed)


def resolve_from_run(resolved: ResolvedConfig, run_config: Path) -> ResolvedConfig:
    """Return the config of an earlier run, overridden by what the user gave by file, --set or option."""
    content = _drop_run_record(yaml_io.load_mapping(run_config))
    layers = _ConfigLayers(_find_schema([(f"run {run_config}", content)], type(resolved.config)))
    layers.set_values(content, "run")
    given = flatten(resolved.config.model_dump(), schema=layers.schema)
    for name, where in resolved.origin.items():
        if where.startswith(("file", "--")):
            layers.set_value(name, given[name], where)
    return ResolvedConfig(layers.build_config(), layers.origin, resolved.preset, resolved.renamed)


def load_run_config(path: Path) -> PretrainConfig:
    """Load the config in RUN/config.yaml. Raises UsageError when the file is missing or wrong."""
    config: PretrainConfig = resolve_config(config_file=path, schema=PretrainConfig).config
    return config


def dump_yaml(config: CommandConfig, origin: dict[str, str] | None = None) -> str:
    """Return the config as YAML, every key written out; with ``origin``, comments say where each value came from."""
    command = get_command(type(config))
    lines = [] if command == "pretrain" else [(f"command: {command}", "")]

    def walk(content: dict[str, Any], prefix: str, indent: str) -> None:
        for name, value in content.items():
            if isinstance(value, dict) and prefix + name not in get_config_fields(type(config)):
                lines.append((f"{indent}{name}:", ""))
                walk(value, f"{prefix}{name}.", indent + "  ")
            else:
                comment = f"# from {origin[prefix + name]}" if origin else ""
                lines.append((f"{indent}{name}: {yaml_io.dump_value(value)}", comment))

    walk(config.model_dump(), "", "")
    column = min(46, max(len(line) for line, _ in lines))
    return "".join(f"{line:<{column}}  {comment}".rstrip() + "\n" for line, comment in lines)


def flatten(content: dict[str, Any], prefix: str = "", schema: type[CommandConfig] = PretrainConfig) -> dict[str, Any]:
    """Return nested sections as one dict of dotted keys."""
    flat: dict[str, Any] = {}
    leaves = get_config_fields(schema).keys() | RENAMED[get_command(schema)]
    for name, value in content.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in leaves:
            flat |= flatten(value, f"{prefix}{name}.", schema)
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@cache
def get_config_fields(schema: type[CommandConfig] = PretrainConfig) -> dict[str, FieldInfo]:
    """Return every dotted key that holds a value, in the schema's order."""

    def walk(section: type[Section], prefix: str) -> Iterable[tuple[str, FieldInfo]]:
        for name, info in section.model_fields.items():
            if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
                yield from walk(info.annotation, f"{prefix}{name}.")
            else:
                yield prefix + name, info

    return dict(walk(schema, ""))


def get_command(schema: type[CommandConfig]) -> str:
    """Return the command that ``schema`` belongs to."""
    return next(name for name, known in SCHEMAS.items() if known is schema)


def _load_preset_layers(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Load a preset after the one it extends: pairs of origin and content."""
    content = yaml_io.load_mapping(find_preset(name))
    parent = content.pop("extends", None)
    return [*(_load_preset_layers(str(parent)) if parent is not None else []), (f"preset {name}", content)]


def _find_schema(contents: list[tuple[str, dict[str, Any]]], schema: type[CommandConfig] | None) -> type[CommandConfig]:
    """Return the one schema that all ``contents`` are for, whose ``command`` is taken out. UsageError if they differ.

    Presets and runs without one are pretrain's; a user's file may leave it to the command that reads it.
    """
    for source, content in contents:
        command = content.pop("command", None if source.startswith("file") else "pretrain")
        if command is None:
            continue
        if command not in SCHEMAS:
            raise UsageError(f"command cannot be {command!r} (from {source}).", f"Write {_format_choices(SCHEMAS)}.")
        if schema not in (None, SCHEMAS[command]):
            what = f"{source} is for `relicctl {command}`, not for {get_command(schema)}."
            raise UsageError(what, f"Use `relicctl {command} {_format_origin_option(source)}`.")
        schema = SCHEMAS[command]
    return schema or PretrainConfig


def _format_origin_option(source: str) -> str:
    """Return the option that names ``source``: "preset NAME", "file PATH" or "run RUN/config.yaml"."""
    kind, _, name = source.partition(" ")
    option = {"preset": "--preset", "file": "--config", "run": "--resume"}[kind]
    return f"{option} {shlex.quote(str(Path(name).parent) if kind == 'run' else name)}"


def _drop_run_record(content: dict[str, Any]) -> dict[str, Any]:
    """RUN/config.yaml also records version and data under ``run``, which are facts and no settings."""
    return {name: value for name, value in content.items() if name != "run"}


def _parse_assignment(text: str, schema: type[CommandConfig]) -> tuple[str, Any]:
    """KEY=VALUE, split at the first "="; text keys take VALUE as it stands, others read it as YAML."""
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise UsageError(f"--set {text!r} is no KEY=VALUE.", "Write it like --set optim.batch_size=256.")
    info = get_config_fields(schema).get(rename_key(get_command(schema), name))
    try:
        parsed = yaml_io.parse_yaml(value)
    except YAMLError:
        parsed = value  # the schema says what is allowed instead
    choices = get_args(info.annotation) if info is not None else ()
    takes_list = len(choices) > 2  # of the keys that take text or null: data sets, of which several are joined
    if {str, NoneType} <= set(choices) and not (takes_list and isinstance(parsed, list)):
        return name, None if value in ("null", "") else value
    return name, parsed


def _unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree


def _validate(
    values: dict[str, Any], origin: dict[str, str], given_as: dict[str, str], schema: type[CommandConfig]
) -> CommandConfig:
    try:
        return schema.model_validate(_unflatten(values))
    except ValidationError as reason:
        loc = [str(part) for part in reason.errors()[0]["loc"]]
        name = next(
            key for size in range(len(loc), 0, -1) if (key := ".".join(loc[:size])) in get_config_fields(schema)
        )
        info = get_config_fields(schema)[name]
        old_name = "" if given_as[name] == name else f", given there as {given_as[name]}"
        what = f"{name} cannot be {yaml_io.dump_value(values[name])[:80]} (from {origin[name]}{old_name})."
        raise UsageError(what, f"Give {format_allowed_values(name, schema)}: {info.description}.") from None


def _make_unknown_key_error(name: str, where: str, schema: type[CommandConfig]) -> UsageError:
    known, command = get_config_fields(schema), get_command(schema)
    old_names = RENAMED[command]
    inside = [rename_key(command, key) for key in (*known, *old_names) if key.startswith(f"{name}.")]
    if inside:
        return UsageError(
            f"{name} (from {where}) is a group of keys and takes no value.", f"Set {_format_choices(inside)}."
        )
    last = name.rpartition(".")[2]
    matches = difflib.get_close_matches(name, [*known, *old_names], 3, 0.7)
    close = list(dict.fromkeys(rename_key(command, key) for key in matches))
    similar = [key for key in known if difflib.SequenceMatcher(None, key.rpartition(".")[2], last).ratio() > 0.8]
    if last in LENGTH_KEYS:  # steps or epochs: what limits the training differs between commands
        lengths = (key for key in known if key.rpartition(".")[2] in LENGTH_KEYS)
        similar = sorted(lengths, key=lambda key: key.rpartition(".")[0] != name.rpartition(".")[0])
    close += [key for key in similar if key not in close]
    listing = f"`relicctl {command} --dry-run` lists all keys."
    fix = f"Did you mean {_format_choices(close[:3])}?" if close else listing
    return UsageError(f"There is no key {name!r} (from {where}).", fix)


def format_allowed_values(name: str, schema: type[CommandConfig] = PretrainConfig) -> str:
    """Describe the values that a key takes: "a whole number from 1 or null"."""
    info = get_config_fields(schema)[name]
    return _format_type(TypeAdapter(Annotated[info.annotation, info]).json_schema())  # type: ignore[arg-type]


_TYPE_NAMES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
_LIMIT_WORDS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "up to",
    "exclusiveMaximum": "below",
    "multipleOf": "in steps of",
}


def _format_type(node: dict[str, Any]) -> str:
    if "anyOf" in node:
        return _format_choices(_format_type(choice) for choice in node["anyOf"])
    if "enum" in node or "const" in node:
        return _format_choices(node.get("enum") or [node["const"]])
    if node["type"] == "object":
        return f"a mapping, each {_format_type(node['additionalProperties'])}"
    if node["type"] == "array" and "items" in node:
        return f"a list, each {_format_type(node['items'])}"
    if node["type"] == "array":
        return f"a pair [a, b], each {_format_type(node['prefixItems'][0])}"
    limits = [f"{word} {node[limit]:g}" for limit, word in _LIMIT_WORDS.items() if limit in node]
    return " ".join([_TYPE_NAMES.get(node["type"], node["type"]), *limits])


def _format_choices(choices: Iterable[str]) -> str:
    *most, last = choices
    return f"{', '.join(most)} or {last}" if most else last
