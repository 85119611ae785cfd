"""YAML as configs use it: plain data only, no aliases, no key twice, and 1e-3 is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from relicctl.errors import UsageError

MAX_DEPTH = 50
MAX_BYTES = 256 * 1024  # fifty times the longest config there can be; whatever it is read from


class _StrictLoader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):  # a few nested aliases can stand for terabytes
            raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=mark)
        if self.depth == MAX_DEPTH:  # found at the first bracket too many: reading thousands takes minutes
            raise yaml.MarkedYAMLError(problem="it is nested too deep", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=name.start_mark)
            if name.value in seen:  # YAML would let the second one win in silence
                raise yaml.MarkedYAMLError(problem=f"{name.value} stands here twice", problem_mark=name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a point in a number with an exponent, and reads 1e-3 as text.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Parse ``text`` as YAML. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _StrictLoader)
    except (RecursionError, ValueError) as reason:  # nested beyond reason; a date that is none
        raise yaml.YAMLError(str(reason)) from None


def load_mapping(path: Path) -> dict[str, Any]:
    """Load the keys in a file. Raises UsageError when it is not there or holds something else."""
    try:
        with open(path, "rb") as handle:
            text = handle.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            what = f"The config {path} has more than {MAX_BYTES // 1024} KiB."
            raise UsageError(what, "Give a file of relicctl's keys.")
        content = parse_yaml(text.decode("utf-8"))
    except OSError as reason:
        raise UsageError(f"The config {path} cannot be read ({reason.strerror}).", "Give a YAML file.") from None
    except UnicodeDecodeError:
        raise UsageError(f"The config {path} is not text.", "Give a YAML file.") from None
    except yaml.YAMLError as reason:
        mark = getattr(reason, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(reason, "problem", None) or reason
        raise UsageError(f"{path}{where} is not YAML that relicctl reads: {problem}.", "Correct it.") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"The config {path} holds no keys.", "Write it as `key: value` lines.")
    return content


def dump_value(value: Any) -> str:
    """Return one value as YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.safe_dump(
        plain, default_flow_style=True, default_style=style, width=10**6, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("...\n").strip()
