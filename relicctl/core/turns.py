"""Work that the processes of a run share out piece by piece, and whose outcome the main one takes.

Process r makes the pieces r, r + size, r + 2 size, ... A piece is the same whoever makes it, and the main process takes
all of them in their order: so the outcome is that of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from relicctl.core.distributed import World
from relicctl.core.loop import StopSignals
from relicctl.errors import RelicError, RunFailed, Terminated

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """What was made: tensors on the host, and words, anything that JSON can hold."""

    tensors: tuple[Tensor, ...] = ()
    words: Any = None


def own(world: World, units: Sequence[T]) -> Sequence[T]:
    """Those of all ``units`` of work that this process makes pieces of."""
    return units[world.rank :: world.size]


def in_turn(world: World, count: int, made: Iterable[Piece], take: Callable[[Piece], None]) -> None:
    """``made`` are this process's own of ``count`` pieces; the main process passes all of them to ``take``.

    On return all have been taken. Where one process fails, all end: that one with its error, the others with its exit
    code. A signal to one of several is answered by all, after the piece under way: KeyboardInterrupt or Terminated.
    """
    pieces = iter(made)
    if world.size == 1:
        for piece in pieces:
            take(piece)
        return
    failure: BaseException | None = None
    try:
        with StopSignals() as signals:
            for first in range(0, count, world.size):
                piece = Piece()
                if failure is None and first + world.rank < count:
                    piece, failure = _tried(partial(next, pieces), piece)
                shapes = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in piece.tensors]
                told = world.tell([_code(failure, signals), piece.words, shapes])
                codes = [code for code, _, _ in told]
                if any(codes):
                    break
                brought = _brought(world, piece, [(words, shapes) for _, words, shapes in told[: count - first]])
                _, failure = _tried(partial(_take_all, take, brought), None)  # told at the next turn
            else:
                codes = world.tell(_code(failure, signals))
        if failure is not None:
            raise failure
        _end_as_another(world, max(codes))
    finally:
        failure = None  # its traceback holds this frame, which holds the workers


def _brought(world: World, mine: Piece, told: list[tuple[Any, Any]]) -> list[Piece]:
    """On the main process, what every process made in this turn, by its words and the shapes of its tensors."""
    if not world.is_main:
        for tensor in mine.tensors:
            dist.send(tensor.contiguous(), 0, world.talk)
        return []
    pieces = [mine]
    for rank, (words, shapes) in enumerate(told[1:], 1):
        tensors = tuple(torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in shapes)
        for tensor in tensors:
            dist.recv(tensor, rank, world.talk)
        pieces.append(Piece(tensors, words))
    return pieces


def _take_all(take: Callable[[Piece], None], pieces: list[Piece]) -> None:
    for piece in pieces:
        take(piece)


def _tried(make: Callable[[], Any], otherwise: Any) -> tuple[Any, BaseException | None]:
    try:
        return make(), None
    except (Exception, KeyboardInterrupt, Terminated) as failure:
        return otherwise, failure


def _code(failure: BaseException | None, signals: StopSignals) -> int:
    """The exit code of a process that must end; 0 if it need not."""
    if isinstance(failure, KeyboardInterrupt):
        return 130
    if failure is not None:
        return int(failure.code or 1) if isinstance(failure, (RelicError, SystemExit)) else 1
    return 128 + signals.received if signals.received else 0


def _end_as_another(world: World, code: int) -> None:
    """Raises what ends this process where one has ended with ``code``; the main one's failure is the run's."""
    if code == 130:
        raise KeyboardInterrupt
    if code == 143:
        raise Terminated
    if code and world.is_main:
        elsewhere = RunFailed("Another process of this run failed.", "Do what it says itself; what was made is kept.")
        elsewhere.code = code
        raise elsewhere
    if code:
        raise SystemExit(code)
