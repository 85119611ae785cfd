"""Work shared between ranks item by item; the main process takes all results in their order.

Rank r computes the items r, r + size, r + 2 size, ... An item's result does not depend on the rank, so the outcome is
that of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from relicctl.core.distributed import World
from relicctl.core.stop_signals import StopRequested, StopSignals
from relicctl.errors import RelicError, RunFailed, Terminated

T = TypeVar("T")
FAILURES = (Exception, KeyboardInterrupt, Terminated)  # of an item, reported to the other ranks


@dataclass(frozen=True)
class WorkResult:
    """The result of an item: tensors on the CPU, and ``meta``, anything that JSON can hold."""

    tensors: tuple[Tensor, ...] = ()
    meta: Any = None


def shard(world: World, items: Sequence[T]) -> Sequence[T]:
    """Return the items that this rank computes."""
    return items[world.rank :: world.size]


def gather_in_order(
    world: World, count: int, results: Iterable[WorkResult], consume: Callable[[WorkResult], None]
) -> None:
    """Pass the results of all ``count`` items to ``consume``, on the main process; ``results`` are this rank's.

    On return all have been consumed. If one rank fails, all end: that one with its error, the others with its exit
    code. A signal to one rank ends all, once the others have their current items, by KeyboardInterrupt or Terminated.
    """
    iterator = iter(results)
    if world.size == 1:
        for result in iterator:
            consume(result)
        return
    failure: BaseException | None = None
    try:
        with StopSignals() as signals:
            for first in range(0, count, world.size):
                result = WorkResult()
                if failure is None and first + world.rank < count:
                    try:
                        with signals.interruptible():
                            result = next(iterator)
                    except StopRequested:
                        pass  # its exit code follows
                    except FAILURES as error:
                        failure = error
                shapes = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in result.tensors]
                gathered = world.all_gather_object([_get_exit_code(failure, signals), result.meta, shapes])
                codes = [code for code, _, _ in gathered]
                if any(codes):
                    break
                received = _gather_results(world, result, [header[1:] for header in gathered[: count - first]])
                try:
                    for result in received:
                        consume(result)
                except FAILURES as error:
                    failure = error  # sent with the next item
            else:
                codes = world.all_gather_object(_get_exit_code(failure, signals))
        if failure is not None:
            raise failure
        _raise_remote_exit(world, max(codes))
    finally:
        failure = None  # its traceback holds this frame, which holds the workers


def _gather_results(world: World, local: WorkResult, headers: list[Any]) -> list[WorkResult]:
    """Return, on the main process, each rank's result of this turn; ``headers`` hold their meta and tensor shapes."""
    if not world.is_main:
        for tensor in local.tensors:
            dist.send(tensor.contiguous(), 0, world.cpu_group)
        return []
    results = [local]
    for rank, (meta, shapes) in enumerate(headers[1:], 1):
        tensors = tuple(torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in shapes)
        for tensor in tensors:
            dist.recv(tensor, rank, world.cpu_group)
        results.append(WorkResult(tensors, meta))
    return results


def _get_exit_code(failure: BaseException | None, signals: StopSignals) -> int:
    """Return the exit code of a process that must end, else 0."""
    if isinstance(failure, KeyboardInterrupt):
        return 130
    if failure is not None:
        return int(failure.code or 1) if isinstance(failure, (RelicError, SystemExit)) else 1
    return 128 + signals.received if signals.received else 0


def _raise_remote_exit(world: World, code: int) -> None:
    """End this process if another one ended with ``code``; on the main one by the error that is reported."""
    if code == 130:
        raise KeyboardInterrupt
    if code == 143:
        raise Terminated
    if code and world.is_main:
        failure = RunFailed("Another process of this run failed.", "See its own message; completed work is saved.")
        failure.code = code
        raise failure
    if code:
        raise SystemExit(code)
