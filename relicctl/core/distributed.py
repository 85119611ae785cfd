"""The ranks of a run: rows of the global batch, gathering and reducing over ranks, decisions of the main process.

Built on ``torch.distributed`` as started by ``torchrun``; with one process every call is a no-op.
Row r of the global batch belongs to rank r // (batch / ranks).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from relicctl.errors import RelicError, UsageError

T = TypeVar("T")
CPU_GROUP_TIMEOUT = timedelta(days=2)  # for work of one rank alone, such as fitting a large classifier


@dataclass(frozen=True)
class World:
    """This process's rank among those of a run; ``cpu_group`` connects the CPUs of all hosts."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    cpu_group: Any = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def get_local_rows(self, batch_size: int, key: str = "optim.batch_size") -> tuple[int, int]:
        """Return the first and last+1 row of the global batch on this rank; ``key`` is the config key of its size."""
        if batch_size % self.size:
            raise UsageError(
                f"A batch of {batch_size} cannot be split evenly over {self.size} processes.",
                f"Set {key} to a multiple of {self.size}, or start another number of processes.",
            )
        each = batch_size // self.size
        return self.rank * each, (self.rank + 1) * each

    def split_evenly(self, count: int) -> list[tuple[int, int]]:
        """Return for each rank the first and last+1 of ``count`` items in a row; some get one more than others."""
        return [(r * count // self.size, (r + 1) * count // self.size) for r in range(self.size)]

    def all_gather_object(self, local: Any) -> list[Any]:
        """Return ``local`` of all ranks in their order; anything that JSON can hold."""
        if self.size == 1:
            return [local]
        text = torch.frombuffer(bytearray(json.dumps(local).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)]), self.cpu_group)
        texts = [text.new_zeros(int(max(lengths))) for _ in lengths]
        dist.all_gather(texts, torch.nn.functional.pad(text, (0, len(texts[0]) - len(text))), self.cpu_group)
        return [json.loads(t[: int(n)].numpy().tobytes()) for t, n in zip(texts, lengths, strict=True)]

    def broadcast_from_main(self, function: Callable[[], T]) -> T:
        """Return on all ranks what ``function`` returns on the main process; if it fails there, all ranks end."""
        if self.size == 1:
            return function()
        result: Any = None
        if self.is_main:
            try:
                result = function()
            except Exception as error:
                self.all_gather_object([error.code if isinstance(error, RelicError) else 1, None])
                raise
        code, result = self.all_gather_object([0, result])[0]
        if code:
            raise SystemExit(code)
        return cast(T, result)

    def run_on_main(self, function: Callable[[], T]) -> T | None:
        """Return what ``function`` returns on the main process, None elsewhere; if it fails there, all ranks end."""
        results: list[T] = []
        self.broadcast_from_main(lambda: results.append(function()))
        return results[0] if results else None

    def all_reduce_mean(self, local: torch.Tensor) -> torch.Tensor:
        """Return the mean of equally shaped tensors of all ranks, differentiably.

        Used as a loss, with gradients averaged over ranks, it has the gradient of the mean.
        """
        return all_reduce_sum(local) / self.size if self.size > 1 else local

    def gather_rows(self, local: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Return the rows ``[N, ...]`` of all ranks on each of them; rank r has ``counts[r]`` rows."""
        if self.size == 1:
            return local
        whole = local.new_empty(sum(counts), *local.shape[1:])
        group = None if local.is_cuda else self.cpu_group
        for rank, part in enumerate(whole.split(counts)):
            if rank == self.rank:
                part.copy_(local)
            if counts[rank]:
                dist.broadcast(part, rank, group)
        return whole


SINGLE_PROCESS = World()


class StopConsensus:
    """The maximum of a number over ranks, returned one step after it was sent, so that no rank waits.

    The numbers are exchanged between CPUs while the devices compute.
    """

    def __init__(self, world: World) -> None:
        self._group: Any = world.cpu_group
        self._pending: tuple[torch.Tensor, Any] | None = None

    def all_reduce_max(self, number: int) -> int:
        """Send ``number``; return, the same on all ranks, the maximum of the numbers sent before, at first 0."""
        if self._group is None:
            return number
        previous = self._wait()
        sent = torch.tensor(number)
        self._pending = sent, dist.all_reduce(sent, dist.ReduceOp.MAX, self._group, async_op=True)
        return previous

    def close(self) -> None:
        """Wait until every rank is here."""
        self._wait()
        if self._group is not None:
            dist.barrier(self._group)

    def _wait(self) -> int:
        if self._pending is None:
            return 0
        reduced, work = self._pending
        work.wait()
        return int(reduced.item())


def init_distributed(device: str) -> World:
    """Join the process group that ``torchrun`` describes in the environment; without torchrun one rank."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    rank = int(os.environ["RANK"])
    if not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=_open_attempt_store(size), rank=rank, world_size=size)
    cpu_group = dist.new_group(backend="gloo", timeout=CPU_GROUP_TIMEOUT)
    return World(rank, size, int(os.environ.get("LOCAL_RANK", "0")), cpu_group)


def _open_attempt_store(size: int) -> Any:
    """Return the store where the processes of this attempt find each other; None for torch's default.

    When ``torchrun`` restarts a host's processes, it reuses the store (as of torch 2.14), which still holds the
    addresses of the dead ones. Over several hosts, which count attempts separately,
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes ``torchrun`` itself begin with an empty store.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
        return None
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), size, False)
    return dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", store)


def destroy_distributed() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class _AllGatherRows(torch.autograd.Function):
    """Rows of all ranks side by side; the gradient of a row is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, mine_VND: torch.Tensor) -> torch.Tensor:
        ctx.rank, ctx.rows = dist.get_rank(), mine_VND.shape[1]
        parts = [torch.empty_like(mine_VND) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine_VND.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        grad_VMD = grads[0].contiguous()
        dist.all_reduce(grad_VMD)
        return grad_VMD.narrow(1, ctx.rank * ctx.rows, ctx.rows)


class _AllReduceSum(torch.autograd.Function):
    """The sum over ranks; the gradient is summed over ranks, too."""

    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor) -> torch.Tensor:
        total = mine.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return _AllReduceSum.forward(ctx, grads[0])


def all_reduce_sum(local: torch.Tensor) -> torch.Tensor:
    """Return the sum of equally shaped tensors of all ranks, differentiably."""
    total: torch.Tensor = _AllReduceSum.apply(local)
    return total


@dataclass(frozen=True)
class DistributedGather:
    """For a loss over the joined batch of all ranks: their outputs, and where our rows lie among all rows.

    With it k ranks that average their gradients get the gradient of one process on the joined batch.
    """

    world: World

    def gather_online(self, mine_VND: torch.Tensor) -> torch.Tensor:
        """[V, N, D] here -> [V, M, D] of all ranks; the gradient of a row is summed over ranks."""
        gathered: torch.Tensor = _AllGatherRows.apply(mine_VND)
        return gathered

    @torch.no_grad()
    def gather_target(self, mine_LND: torch.Tensor) -> torch.Tensor:
        """[L, N, D] here -> [L, M, D] of all ranks, without gradient."""
        return self.gather_online(mine_LND)

    def get_offset_and_total(self, local: int) -> tuple[int, int]:
        """Return our first row and the number of all rows, where each rank has ``local`` of them."""
        return self.world.rank * local, self.world.size * local
