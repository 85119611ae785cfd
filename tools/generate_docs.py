"""Write docs/config.md from the config schemas and docs/cli.md from ``--help``.

    python tools/generate_docs.py [--check]

``--check`` writes nothing and exits with 1 if a page is out of date.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from relicctl.config.bgmask import BgmaskConfig
from relicctl.config.linear_eval import LinearEvalConfig
from relicctl.config.pretrain import PretrainConfig
from relicctl.config.transfer import DetectionConfig, SegmentationConfig, TransferConfig
from relicctl.config.yaml_io import dump_value

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS: dict[str, type[BaseModel]] = {
    "pretrain": PretrainConfig,
    "train-bgmask": BgmaskConfig,
    "linear-eval": LinearEvalConfig,
    "transfer": TransferConfig,
    "transfer --task segmentation": SegmentationConfig,
    "transfer --task detection": DetectionConfig,
}
COMMANDS = ["pretrain", "train-bgmask", "linear-eval", "transfer", "export", "bench", "doctor", "presets"]
GENERATED = "<!-- Written by tools/generate_docs.py; do not edit. -->"
CONFIG_INTRO = """\
Keys are set in a YAML file (`--config FILE`) or one by one (`--set optim.epochs=50`). Precedence: defaults < preset <
`--config` < `--set` and options. `--dry-run` and `relicctl presets show NAME` print where each value comes from."""


def describe_type(annotation: Any) -> str:
    """The type as a user writes its values: ``number``, ``"a" or "b"``, ``list of integer``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " \\| ".join(f"`{dump_value(value)}`" for value in arguments)
    if origin in (Union, UnionType):
        return " \\| ".join(describe_type(one) for one in arguments)
    if hasattr(annotation, "__metadata__"):  # Annotated[type, limits]
        return describe_type(arguments[0])
    if origin is dict:
        return f"mapping to {describe_type(arguments[1])}"
    if origin is tuple and arguments[-1] is not ...:
        return f"[{', '.join(map(describe_type, arguments))}]"
    if origin in (list, tuple):
        return f"list of {describe_type(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(annotation.model_fields)}}}"
    return {int: "integer", float: "number", str: "text", bool: "`true` \\| `false`", NoneType: "`null`"}.get(
        annotation, "any"
    )


def list_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """One table row per key, sections in order."""
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from list_keys(field.annotation, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else f"`{dump_value(default)}`"
        meaning = re.sub(r"\s+", " ", field.description or "").replace("|", "\\|")
        yield f"| `{prefix}{name}` | {describe_type(field.annotation)} | {shown} | {meaning} |"


def write_config_page() -> str:
    parts = ["# Config keys", GENERATED, CONFIG_INTRO]
    for command, schema in SCHEMAS.items():
        table = ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *list_keys(schema)]
        parts += [f"## {command}", "\n".join(table)]
    return "\n\n".join(parts) + "\n"


def write_cli_page() -> str:
    parts = ["# Command line", GENERATED]
    for command in ["", *COMMANDS]:
        words = [sys.executable, "-m", "relicctl", *command.split(), "--help"]
        environment = {"COLUMNS": "100", "PYTHONPATH": str(ROOT)}
        text = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        parts += [f"## relicctl {command}".rstrip(), f"```text\n{text.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for path, page in ((ROOT / "docs/config.md", write_config_page()), (ROOT / "docs/cli.md", write_cli_page())):
        if not path.exists() or path.read_text(encoding="utf-8") != page:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(page, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'out of date; run python tools/generate_docs.py' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
