"""What lies in a folder, as JSON: digests of bytes and tensors, parsed records, without what the clock decides."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from golden_lib.renames import flatten

# Keys whose values come from the clock or the machine; that they are there is recorded.
TIMINGS = frozenset(
    {"images_per_s", "data_wait", "eta_s", "seconds", "pid", "host", "started", "updated", "free_memory"}
)
LEFT_OUT = "<left out>"
EXISTENCE_ONLY = {".png", ".lock"}  # pictures hold matplotlib's version, locks nothing
TEXT = {".md", ".txt", ".html", ".yaml", ".csv"}


def take_snapshot(paths: list[Path], base: Path, normalise: Callable[[str], str]) -> dict[str, Any]:
    """Every file under ``paths`` by its name relative to ``base``; folders that are empty by ``name/``."""
    found: dict[str, Any] = {}
    for top in paths:
        for path in sorted([top, *top.rglob("*")] if top.is_dir() else [top]):
            name = path.relative_to(base).as_posix()
            if path.is_dir():
                if not any(path.iterdir()):
                    found[f"{name}/"] = {"kind": "folder"}
            elif path.exists():
                found[name] = describe_file(path, normalise)
            else:
                found[name] = {"kind": "absent"}
    return found


def describe_file(path: Path, normalise: Callable[[str], str]) -> dict[str, Any]:
    """What is compared of one file, by its ``kind``."""
    if path.suffix in EXISTENCE_ONLY or path.name in EXISTENCE_ONLY:
        return {"kind": "existence"}
    if path.suffix == ".safetensors":
        return {"kind": "safetensors", **read_safetensors(path)}
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return {"kind": "json", "content": leave_out_timings(records)}
    if path.suffix == ".json":
        content = json.loads(normalise(path.read_text("utf-8")))
        return {"kind": "json", "content": leave_out_timings(content)}
    if path.name == "config.yaml":
        return {"kind": "config", **read_config(normalise(path.read_text("utf-8")))}
    if path.suffix == ".onnx":
        return {"kind": "json", "content": read_onnx(path)}
    if path.suffix in TEXT:
        return {"kind": "text", "lines": normalise(path.read_text("utf-8")).splitlines()}
    return {"kind": "bytes", "sha256": hash_file(path), "header": find_header(path)}


def read_config(text: str) -> dict[str, Any]:
    """A config in YAML: the command it is for, and its keys without nesting."""
    content = yaml.safe_load(text) or {}
    return {"command": str(content.pop("command", "pretrain")), "config": flatten(content)}


def read_safetensors(path: Path) -> dict[str, Any]:
    """Type, shape and SHA-256 of each tensor in the file's order, and the metadata, JSON among them parsed.

    Not the file's own SHA-256: safetensors writes the metadata in an order that changes from process to process.
    """
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = {name: parse_json(text) for name, text in (header.pop("__metadata__", None) or {}).items()}
    if isinstance(metadata.get("header"), dict):
        metadata.pop("header_checksum", None)  # follows from the header, whose keys may be renamed
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        digest = hashlib.sha256(raw[8 + length + first : 8 + length + last]).hexdigest()
        tensors[name] = f"{entry['dtype']} {entry['shape']} {digest}"
    return {"tensors": tensors, "metadata": leave_out_timings(metadata)}


def read_onnx(path: Path) -> dict[str, Any]:
    """Operations, weights and metadata of a graph; not the names of modules and lines of code noted at its nodes."""
    import onnx

    model = onnx.load(path)
    weights = [(weight, onnx.numpy_helper.to_array(weight).tobytes()) for weight in model.graph.initializer]
    return {
        "inputs": [value.name for value in model.graph.input],
        "outputs": [value.name for value in model.graph.output],
        "metadata": {entry.key: parse_json(entry.value) for entry in model.metadata_props},
        "operations": [f"{node.op_type} {sorted(a.name for a in node.attribute)}" for node in model.graph.node],
        "weights": [f"{w.data_type} {list(w.dims)} {hashlib.sha256(raw).hexdigest()}" for w, raw in weights],
    }


def find_header(path: Path) -> str:
    """The JSON that a file of our own binary formats begins with, or nothing."""
    with path.open("rb") as file:
        found = re.search(rb"\{[ -~]*\}", file.read(4096))
    return found[0].decode() if found else ""


def parse_json(text: str) -> Any:
    """Parsed where it is a JSON object or list, else as it is."""
    try:
        content = json.loads(text)
    except ValueError:
        return text
    return content if isinstance(content, (dict, list)) else text


def leave_out_timings(content: Any) -> Any:
    """JSON content whose values under TIMINGS are replaced by a mark."""
    if isinstance(content, dict):
        return {name: LEFT_OUT if name in TIMINGS else leave_out_timings(value) for name, value in content.items()}
    return [leave_out_timings(value) for value in content] if isinstance(content, list) else content


def outline(content: Any) -> Any:
    """The keys of JSON content and the types of its values, for what is measured anew every time."""
    if isinstance(content, dict):
        return {name: outline(value) for name, value in content.items()}
    if isinstance(content, list):
        names = [entry["name"] for entry in content if isinstance(entry, dict) and "name" in entry]
        return [*names, *([outline(content[0])] if content else [])]
    number = isinstance(content, (int, float)) and not isinstance(content, bool)
    return "number" if number else type(content).__name__


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
