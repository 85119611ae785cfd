"""The table of a comparison, one cell for each encoder on each data set: finished cells come from their files."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relicctl.errors import UsageError
from relicctl.runs.distributed import RunContext, Session, open_sub_run

Cell = dict[str, Any]


@dataclass(frozen=True)
class LoadedEncoder:
    """``hash``: SHA-256 over the weights and how images are shown. Two encoders of one hash are the same.

    ``record``: what results.json says of it.
    """

    name: str
    encoder: Any
    hash: str
    record: dict[str, Any]


class TransferTask(ABC):
    """What encoders are compared by: classification, segmentation or detection on the data sets of ``config``."""

    resume_option = ""  # what the command that resumes needs besides --resume

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def load_encoder(self, name: str, encoder: Any) -> LoadedEncoder:
        """Raises UsageError for an encoder that the task cannot use."""

    @abstractmethod
    def open_data(self, session: Session, download: bool) -> None:
        """Open all data sets, and refuse what cannot be evaluated on them before anything is computed."""

    @abstractmethod
    def compute_cells(self, encoders: Sequence[LoadedEncoder], context: RunContext) -> list[Cell]: ...

    @abstractmethod
    def describe_data(self) -> dict[str, Any]:
        """What results.json says of each data set, by name."""

    @abstractmethod
    def format_notes(self, cells: Sequence[Cell], abbreviations: list[str]) -> list[str]:
        """The notes under the table, with ``abbreviations`` (of the encoders' names) among them."""


def check_unique_encoders(encoders: Sequence[LoadedEncoder]) -> None:
    """Raises UsageError when two encoders are the same."""
    first_names: dict[str, str] = {}
    for encoder in encoders:
        first = first_names.setdefault(encoder.hash, encoder.name)
        if first != encoder.name:
            raise UsageError(f"{first} and {encoder.name} are the same encoder.", "Leave one of them out.")


def compute_digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def load_or_compute_cell(
    key: str, title: str, names: dict[str, str], context: RunContext, compute: Callable[[], Cell]
) -> Cell:
    """The cell of ``key``, a digest of all that decides its value; the same on every rank.

    ``names``: what encoder and data set are called in this table, whatever they were called when it was computed.
    """
    path = context.run.path / "cells" / f"{key}.json"
    finished: Cell | None = context.world.broadcast_from_main(
        lambda: json.loads(path.read_text("utf-8")) if path.is_file() else None
    )
    if finished:
        return finished | names
    cell = compute()
    context.run.write_json(path, cell)
    context.console.info(f"{title}: {cell['metric']} {cell['value']:.3f}")
    return cell


@contextmanager
def open_subfolder(context: RunContext, path: Path, num_checkpoints: int) -> Iterator[RunContext]:
    """A folder for one training within the run: it has its own checkpoints, and resumes when the run does."""
    with closing(open_sub_run(context.world, path, parent=context.run.path, keep=num_checkpoints)) as run:
        yield replace(context, run=run)
