"""Tensors and text in a safetensors file whose bytes follow from its content alone.

safetensors keeps the metadata in a hash map and writes them in another order every time, so that no two files of the
same content had the same SHA-256.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` and ``metadata``, sorted by name, to ``path``. Raises SafetensorError as ``save_file`` does."""
    save_file(tensors, path, metadata=metadata)
    if metadata:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the JSON header of the file, in place: the header keeps its length."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length, "JSON as safetensors writes it"
        file.seek(8)
        file.write(text)
