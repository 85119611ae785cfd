"""What a step is said to take, held against what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from relicctl.config.pretrain import PretrainConfig
from relicctl.config.resolve import resolve_config
from relicctl.core import hardware
from relicctl.core.hardware import count_elements
from relicctl.errors import UsageError
from relicctl.pretraining import estimate
from relicctl.pretraining.estimate import check_view_memory, compute_view_bytes, count_activations, estimate_step_memory
from relicctl.pretraining.task import build_networks

CPU = torch.device("cpu")
SMALL = ["model.width=0.25", "model.projector.hidden=64", "model.predictor.hidden=64"]


def config(*sets: str) -> PretrainConfig:
    return resolve_config(sets=[*SMALL, *sets]).config


def saved_for_backward(networks: torch.nn.Module, views: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages, parameters aside, that autograd keeps after a forward pass."""
    own = {p.untyped_storage().data_ptr() for p in networks.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        networks(views)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("arch", "stem", "size"),
    [("resnet18", "imagenet", 96), ("resnet18", "cifar", 32), ("resnet50", "stride2", 64)],
)
def test_activations_are_what_autograd_keeps(arch: str, stem: str, size: int) -> None:
    """Within a quarter: pooling's indices and the mean are left out of the estimate."""
    networks = build_networks(config(f"model.arch={arch}", f"model.stem={stem}"))
    truth = saved_for_backward(networks, [torch.randn(1, 4, 3, size, size)]) / 4 / 4
    assert count_activations(networks, size, checkpointing=False) == pytest.approx(truth, rel=0.25)


def test_the_estimate_needs_no_memory_and_leaves_no_hook() -> None:
    with torch.device("meta"):
        networks = build_networks(resolve_config("r50-1000ep").config)
    before = count_activations(networks, 4096, checkpointing=False)
    assert before > 300 * count_activations(networks, 224, checkpointing=False)
    assert not any(module._forward_hooks for module in networks.modules())


def test_checkpointing_needs_less() -> None:
    networks = build_networks(config())
    assert (
        count_activations(networks, 64, checkpointing=True) < count_activations(networks, 64, checkpointing=False) / 1.5
    )


def test_parts_of_a_step() -> None:
    given = config("model.arch=resnet18", "optim.batch_size=16", "optim.name=adamw")
    networks = build_networks(given)
    parts = estimate_step_memory(given, networks, "fp32")
    assert parts["weights"] == parts["gradients"] == 4 * count_elements(networks.online.parameters())
    assert parts["optimiser"] == 2 * parts["weights"]
    assert parts["target"] < parts["weights"]  # no predictor
    halved = estimate_step_memory(given, networks, "bf16", processes=2)
    assert halved["activations"] * 4 == parts["activations"]
    assert halved["views"] * 2 == parts["views"]
    alone = resolve_config(sets=["model.width=0.25", "objective=simclr"]).config
    assert estimate_step_memory(alone, build_networks(alone), "fp32")["target"] == 0


def test_views_are_counted_to_the_byte() -> None:
    given = config("optim.batch_size=64", "views.large.size=32", "views.small.count=0")
    crops = torch.empty(4, 64, 32, 32, 3, dtype=torch.uint8)
    assert compute_view_bytes(given) == crops.nbytes + crops.float().nbytes


def test_views_larger_than_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = config("optim.batch_size=64")
    monkeypatch.setattr(estimate, "get_free_memory", lambda device: compute_view_bytes(given))
    check_view_memory(given, CPU)
    monkeypatch.setattr(estimate, "get_free_memory", lambda device: compute_view_bytes(given) - 1)
    with pytest.raises(UsageError, match="views of one batch take"):
        check_view_memory(given, CPU)
    check_view_memory(given, CPU, processes=2)


def test_free_memory_is_some_of_what_is_there() -> None:
    assert 2**20 < hardware.get_free_host_memory() < 2**50


@pytest.mark.parametrize(
    ("groups", "folder", "limit", "usage", "prefix"),
    [
        ("0::/\n", ".", "max", "current", ""),  # a container, version 2 of control groups
        ("0::/system.slice/job_7/step_0\n", "system.slice/job_7", "max", "current", ""),  # a SLURM job
        ("4:cpu:/x\n9:memory:/docker/abc\n0::/\n", "memory", "limit_in_bytes", "usage_in_bytes", "total_"),  # version 1
        ("9:cpu,memory:/job\n", "memory/job", "limit_in_bytes", "usage_in_bytes", "total_"),
    ],
)
def test_limits_of_containers_and_jobs_hold_and_files_read_are_not_counted_as_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, folder: str, limit: str, usage: str, prefix: str
) -> None:
    group = tmp_path / "cgroup" / folder
    group.mkdir(parents=True)
    (tmp_path / "groups").write_text(groups)
    stat = f"anon 900000\n{prefix}inactive_file 1500000\n{prefix}active_file 500000\n"
    for name, text in {limit: "3000000", usage: "2900000", "stat": stat}.items():
        (group / f"memory.{name}").write_text(text)
    monkeypatch.setattr(hardware, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(hardware, "PROCESS_CGROUPS", tmp_path / "groups")
    assert hardware.get_free_host_memory() == 2_100_000
    (group / f"memory.{limit}").write_text("max")
    assert hardware.get_free_host_memory() > 2_100_000


@pytest.mark.parametrize(
    ("size", "text"),
    [(999, "999 B"), (2**20, "1 MiB"), (1.5 * 2**30, "1.5 GiB"), (2000 * 2**30, "2,000 GiB")],
)
def test_units(size: float, text: str) -> None:
    assert hardware.format_bytes(size) == text
