"""Law: k processes are one process on the joined batch, for loss, gradients, weights and running statistics.

In float64, where sums in another order cost nothing that five steps could amplify.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from relicctl.config.resolve import resolve_config
from relicctl.core.distributed import World, destroy_distributed, init_distributed
from relicctl.data.views import Batch
from relicctl.pretraining.task import PretrainTask, Schedule
from tests.helpers.ports import free_ports

BATCH, STEPS = 8, 5
TINY = [
    "model.arch=resnet18", "model.width=0.125", "model.stem=stride2", "optim.batch_size=8", "optim.epochs=2",
    "optim.warmup_epochs=0", "optim.base_lr=1.0",
]  # fmt: skip
PROJECTOR = ["model.projector.hidden=16", "model.projector.out=8"]
HEADS = [*PROJECTOR, "model.predictor.hidden=16", "model.predictor.out=8"]
CASES = {
    "relicv2 sampled": ["loss.negatives=3", *HEADS],
    "relicv2 all, swapped": ["loss.negatives=all", "loss.invariance=swapped", *HEADS],
    "relicv2, BatchNorm per view": ["loss.negatives=3", "model.bn_batch=view", *HEADS],
    "relic": ["objective=relic", *HEADS],
    "byol": ["objective=byol", *HEADS],
    "simclr": ["objective=simclr", *PROJECTOR],
    "supervised": ["objective=supervised"],
}


def views(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(count, BATCH, 3, 16, 16, generator=generator, dtype=torch.float64) for count in (2, 1)]


def train(case: str, world: World) -> dict[str, torch.Tensor]:
    """Loss of every step, gradients of the first, and everything the networks hold after the last."""
    config = resolve_config(sets=[*TINY, *CASES[case]]).config
    torch.set_default_dtype(torch.float64)
    task = PretrainTask(
        config, Schedule(config, 10, 20), classes=4,
        device=torch.device("cpu"), precision="fp32", world=world,
    )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    first, last = world.get_local_rows(BATCH)
    seen: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        mine = [view[:, first:last] for view in views(step)]
        batch = Batch(mine, torch.arange(first, last) % 4)
        loss = task.compute_loss(batch, step)["loss"]
        loss.backward()
        mean = loss.detach().clone()
        if world.size > 1:
            dist.all_reduce(mean)
            mean /= world.size
        seen[f"loss {step}"] = mean
        if step == 0:
            seen |= {f"gradient {n}": p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}
        for group in task.optimizer.param_groups:
            group["lr"] = task.get_learning_rate(step)
        task.optimizer.step()
        task.optimizer.zero_grad()
        task.after_step(step)
    return seen | {f"state {n}": t.clone() for n, t in task.model.state_dict().items()}


def work(rank: int, size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    world = init_distributed("cpu")
    for case in CASES:
        seen = train(case, world)
        np.savez(Path(folder) / f"{case}-{rank}.npz", **{name: t.numpy() for name, t in seen.items()})
    destroy_distributed()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_k_processes_are_one(size, tmp_path):
    (port,) = free_ports(1)
    torch.multiprocessing.spawn(work, (size, port, str(tmp_path)), nprocs=size)
    for case in CASES:
        one = train(case, World())
        for rank in range(size):
            several = np.load(tmp_path / f"{case}-{rank}.npz")
            assert set(several) == set(one)
            for name, tensor in one.items():
                np.testing.assert_allclose(
                    several[name], tensor.numpy(), rtol=1e-6, atol=1e-9, err_msg=f"{case} {name}"
                )


def test_rows_are_shared_out_evenly_or_the_batch_is_refused():
    from relicctl.errors import UsageError

    assert [World(rank, 4).get_local_rows(8) for rank in range(4)] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    with pytest.raises(UsageError, match="cannot be split"):
        World(0, 3).get_local_rows(8)
