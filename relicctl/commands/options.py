"""What a command is told besides its config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PretrainOptions:
    """Where a run is written, what it starts from, and what is said about it."""

    out: Path | None = None  # the run's folder; None: one is named after the preset
    resume: str | None = None  # a run's folder; "": out's, or the newest run of the preset
    overwrite: bool = False
    init_from: str | None = None  # weights for the encoder
    dry_run: bool = False
    download: bool = False
    json: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class BgmaskOptions:
    """Where a run is written, and what is said about it."""

    out: Path | None = None  # the run's folder; None: one is named after the preset
    resume: str | None = None  # a run's folder; "": out's, or the newest run of the preset
    overwrite: bool = False
    init_from: str | None = None  # in the config too; here, so that --resume can refuse it
    download: bool = False
    json: bool = False  # of a dry run
    quiet: bool = False


@dataclass(frozen=True)
class LinearOptions:
    """Which encoders are evaluated, on what further images, and where the results are written."""

    sources: tuple[str, ...] = ()  # the first is evaluated; others stand beside it in the analysis
    network: str = "online"
    tests: tuple[str, ...] = ()  # NAME=DATA each
    analysis: bool = False
    out: Path | None = None  # None: a new folder linear-eval in the encoder's run
    resume: str | None = None  # a folder of results; "": out
    overwrite: bool = False
    download: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class TransferOptions:
    """Which encoders are compared, with what, and where the results are written."""

    sources: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()  # encoders too; the others' improvement over each is told
    network: str = "online"
    out: Path | None = None  # None: a new folder runs/transfer
    resume: str | None = None  # a folder of results; "": out
    overwrite: bool = False
    download: bool = False
    quiet: bool = False
