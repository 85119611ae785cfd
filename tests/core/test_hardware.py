"""What ``runtime.precision: auto`` comes to."""

import pytest
import torch

from relicctl.core import hardware


@pytest.mark.parametrize(
    ("tiles", "vectors", "amd", "precision"),
    [
        (True, True, False, "bf16"),
        (False, True, True, "bf16"),
        (False, True, False, "fp32"),  # slower in bf16
        (False, False, True, "fp32"),
    ],
)
def test_a_cpu_computes_in_bf16_where_that_is_faster(monkeypatch, tiles, vectors, amd, precision):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: vectors, raising=False)
    monkeypatch.setattr(hardware, "_is_amd_cpu", lambda: amd)
    assert hardware.pick_precision("auto", torch.device("cpu")) == precision


def test_torch_without_cpu_capability_functions_means_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert hardware.pick_precision("auto", torch.device("cpu")) == "fp32"


def test_explicit_precision_is_unchanged():
    assert hardware.pick_precision("bf16", torch.device("cpu")) == "bf16"
