"""A file of tensors: its bytes follow from its content, and safetensors reads it back."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from relicctl.core.tensor_file import save_tensors

# names and values that JSON has to escape, or writes in more than one byte
METADATA = {
    f"key {number}": text for number, text in enumerate(("", 'a "quote"', "tab\tline\n\x01\x7f", "été 漢字 😀"))
}


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """safetensors alone writes the metadata in one of 24 orders."""
    tensors = {"b": torch.arange(3.0), "a": torch.zeros(2, 2, dtype=torch.int64)}
    orders = [METADATA, dict(reversed(METADATA.items()))] * 6
    for number, metadata in enumerate(orders):
        save_tensors(tmp_path / f"{number}", tensors, metadata)
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(len(orders))}) == 1


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 3), "none": torch.zeros(0)}
    for metadata in (METADATA, {}, None):
        save_tensors(tmp_path / "file", tensors, metadata)
        with safe_open(tmp_path / "file", framework="pt") as file:
            assert (file.metadata() or {}) == (metadata or {})
            assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
