"""From samples to batches of prepared images with their targets; whatever the number of workers, the same."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from relicctl.core.counted import Stream, counted_uniform
from relicctl.core.distributed import World
from relicctl.data.bad_images import BadImages, Undecodable, load_or_next
from relicctl.data.sampler import Sampler
from relicctl.data.workers import working
from relicctl.errors import RelicError
from relicctl.evaluation.dense.samples import Samples

DRAWS = 6  # uniform numbers for each image: more than any way of preparing needs

Prepare = Callable[[np.ndarray, Any, np.ndarray], Any]  # image, target, uniforms [DRAWS] -> an item of the batch
Collate = Callable[[list[Any]], Any]


class DenseFeed:
    """The loop's batches, this process's rows of each. An item is a function of (seed, epoch, its sample) alone.

    ``collate`` makes nested tuples and lists of tensors, which are sent to the device. Images that cannot be decoded
    are replaced by the next one.
    """

    def __init__(
        self,
        samples: Samples,
        sampler: Sampler,
        prepare: Prepare,
        collate: Collate,
        *,
        seed: int,
        device: torch.device,
        world: World,
        workers: int,
        bad: BadImages,
    ) -> None:
        self.waited = 0.0
        self._batches = _Batches(samples, sampler, prepare, collate, seed, world.rows(sampler.batch_size))
        self._key, self._device, self._workers, self._bad = samples.key, device, workers, bad

    def from_step(self, step: int, stop: int) -> Iterator[Any]:
        """The batches of steps ``step`` to ``stop - 1``."""
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=range(step, stop),
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_quiet,
            prefetch_factor=2 if self._workers else None,
        )
        with working(loader) as items:
            for _ in range(step, stop):
                asked = time.perf_counter()
                made = next(items)
                self.waited += time.perf_counter() - asked
                if isinstance(made, Undecodable):
                    self._note(made.passed)
                if isinstance(made, RelicError):
                    raise made
                batch, passed = made
                self._note(passed)
                yield sent(batch, self._device)

    def _note(self, passed: list[tuple[int, str]]) -> None:
        for index, reason in passed:
            self._bad.add(self._key(index), reason)


class _Batches(Dataset):
    """Item k: the batch of step k, and what was passed over."""

    def __init__(
        self, samples: Samples, sampler: Sampler, prepare: Prepare, collate: Collate, seed: int, rows: tuple[int, int]
    ) -> None:
        self._samples, self._sampler, self._seed, self._rows = samples, sampler, seed, slice(*rows)
        self._prepare, self._collate = prepare, collate

    def __getitem__(self, step: int) -> tuple[Any, list[tuple[int, str]]] | RelicError:
        try:
            return self._make(step)
        except RelicError as error:
            return error  # raised in the training process: torch would wrap it up, with a traceback, on the way

    def _make(self, step: int) -> tuple[Any, list[tuple[int, str]]]:
        picked = self._sampler.batch(step)[self._rows]
        uniforms = counted_uniform(self._seed, Stream.GEOMETRY, self._sampler.epoch(step), picked, n=DRAWS)
        items, passed = [], []
        for index, uniform in zip(picked.tolist(), uniforms, strict=True):
            image, used, skipped = load_or_next(self._samples, index)
            passed += skipped
            items.append(self._prepare(image, self._samples.target(used), uniform))
        return self._collate(items), passed


def sent(batch: Any, device: torch.device) -> Any:
    """``batch`` with all its tensors on ``device``."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: sent(part, device) for name, part in batch.items()}
    return type(batch)(sent(part, device) for part in batch)


def _quiet(_: int) -> None:
    """Signals are the training process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
