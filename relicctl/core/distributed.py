"""The processes of one run: who am I, which rows are mine, and how outputs meet for the loss.

Everything rests on ``torch.distributed`` as started by ``torchrun``; alone, every call is a no-op.
Row r of the global batch belongs to process r // (batch / processes).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from relicctl.errors import UsageError


@dataclass(frozen=True)
class World:
    """This process's place among the processes of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def rows(self, batch_size: int) -> tuple[int, int]:
        """First and last+1 row of the global batch that this process works on."""
        if batch_size % self.size:
            raise UsageError(
                f"A batch of {batch_size} cannot be split evenly over {self.size} processes.",
                f"Set optim.batch_size to a multiple of {self.size}, or start another number of processes.",
            )
        each = batch_size // self.size
        return self.rank * each, (self.rank + 1) * each


class Agreement:
    """Has any process raised its flag? Asked once a step, answered one step later, so that nobody waits.

    The flags travel between the hosts' CPUs while the devices compute.
    """

    def __init__(self, world: World) -> None:
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._under_way: tuple[torch.Tensor, Any] | None = None

    def any(self, flag: bool) -> bool:
        """The same answer on every process: whether one of them had its flag raised when last asked."""
        if self._group is None:
            return flag
        answer = False
        if self._under_way is not None:
            raised, work = self._under_way
            work.wait()
            answer = bool(raised.item())
        raised = torch.tensor(float(flag))
        self._under_way = raised, dist.all_reduce(raised, dist.ReduceOp.MAX, self._group, async_op=True)
        return answer

    def close(self) -> None:
        if self._under_way is not None:
            self._under_way[1].wait()


def join(device: str) -> World:
    """Join the process group that ``torchrun`` describes in the environment; alone when it did not start us."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=world.rank, world_size=size)
    return world


def leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class _GatherRows(torch.autograd.Function):
    """All processes' rows side by side; the gradient of a row is the sum of what every process asks of it."""

    @staticmethod
    def forward(ctx, mine_VND: torch.Tensor) -> torch.Tensor:
        ctx.rank, ctx.rows = dist.get_rank(), mine_VND.shape[1]
        return _all_rows(mine_VND)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor) -> torch.Tensor:
        grad_VMD = grads[0].contiguous()
        dist.all_reduce(grad_VMD)
        return grad_VMD.narrow(1, ctx.rank * ctx.rows, ctx.rows)


def _all_rows(mine_VND: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(mine_VND) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine_VND.contiguous())
    return torch.cat(parts, dim=1)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' values; every process's gradient reaches every process's values."""

    @staticmethod
    def forward(ctx, mine: torch.Tensor) -> torch.Tensor:
        total = mine.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *grads: torch.Tensor) -> torch.Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def sum_over_processes(mine: torch.Tensor) -> torch.Tensor:
    """Differentiable sum of equally shaped tensors, one from each process."""
    return _SumOverProcesses.apply(mine)


@dataclass(frozen=True)
class Gather:
    """What the loss needs of the other processes: their outputs, and where our rows lie among all rows.

    With it k processes that average their gradients get the gradient of one process on the joined batch.
    """

    world: World

    def online(self, mine_VND: torch.Tensor) -> torch.Tensor:
        """[V, N, D] here -> [V, M, D] of all processes, differentiable."""
        return _GatherRows.apply(mine_VND)

    @torch.no_grad()
    def target(self, mine_LND: torch.Tensor) -> torch.Tensor:
        """[L, N, D] here -> [L, M, D] of all processes, without gradient."""
        return _all_rows(mine_LND)

    def rows(self, local: int) -> tuple[int, int]:
        """Our first row, and how many rows there are in all, when each process has ``local`` of them."""
        return self.world.rank * local, self.world.size * local
