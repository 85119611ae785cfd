"""``--resume``: which run is meant, and what of its config may change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relicctl.config import yaml_io
from relicctl.config.resolve import ResolvedConfig, flatten, resolve_from_run
from relicctl.errors import UsageError

# What may differ between a run and its continuation; everything else would make it another run.
# The learning rate may: it is the way on after a divergence.
PRETRAIN_MUTABLE_KEYS = (
    "runtime.", "checkpoint.", "eval.", "optim.max_steps", "optim.base_lr", "data.train", "data.val",
    "data.max_corrupt_fraction",
    "bgmask.bank",  # where it lies: another bank is refused by its content
)  # fmt: skip


def find_run_to_resume(
    options: PretrainOptions | BgmaskOptions, preset: str | None, command: str = "pretrain"
) -> Path | None:
    """The folder that --resume means: its own value, --out, or the newest run of the command and preset.

    None for a bare --resume with an --out that holds no run yet, which starts one.
    """
    if not options.resume and options.out is not None and not options.overwrite:
        return _find_run_at(options.out, options.init_from)
    for given, name in ((options.overwrite, "--overwrite"), (options.init_from, "--init-from")):
        if given:
            raise UsageError(f"{name} starts a run, --resume goes on with one.", "Give one of the two.")
    if options.resume:
        if options.out is not None and options.out != Path(options.resume):
            raise UsageError("--resume goes on in the run's own folder, and --out names another.", "Leave --out away.")
        return Path(options.resume)
    found = sorted(Path("runs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    records = [
        (path.parent, read_run_record(path.parent)) for path in found if read_run_command(path.parent) == command
    ]
    runs = [path for path, record in records if "preset" in record and preset in (None, record["preset"])]
    if not runs:
        of = f" of preset {preset}" if preset else ""
        raise UsageError(f"There is no run{of} to resume under runs/.", "Name its folder: --resume RUN.")
    return runs[-1]


def _find_run_at(out: Path, init_from: str | None) -> Path | None:
    """``out`` if it holds a run. So one command line starts a run, and goes on with it when it is executed again."""
    if not (out / "config.yaml").is_file():
        return None
    before = read_run_record(out).get("init_from")
    if init_from not in (None, before):
        raise UsageError(
            f"{out} was started from {before or 'a new network'}, not from {init_from}: that would be another run.",
            "Leave --init-from as it was, or choose another --out.",
        )
    return out


def read_run_record(run: Path) -> dict[str, Any]:
    """What config.yaml says under ``run``: facts noted at the run's start. {} for another file."""
    try:
        return yaml_io.load_mapping(run / "config.yaml").get("run") or {}
    except UsageError:
        return {}


def read_resumable_record(run: Path) -> dict[str, Any]:
    """What ``recorded`` gives for a run that can go on. Raises UsageError where a fact is missing."""
    record = read_run_record(run)
    if not {"data_fingerprint", "precision"} <= record.keys():
        raise UsageError(
            f"{run}/config.yaml does not say what the run was started with (run.data_fingerprint, run.precision).",
            "Restore the file, or start another run with --init-from.",
        )
    return record


def read_run_command(run: Path) -> str | None:
    """The command that made the run; None for another file."""
    try:
        return yaml_io.load_mapping(run / "config.yaml").get("command", "pretrain")
    except UsageError:
        return None


def resume_config(
    resolved: ResolvedConfig, run: Path, mutable: tuple[str, ...] = PRETRAIN_MUTABLE_KEYS
) -> ResolvedConfig:
    """The run's own config, with what may change (keys that begin like ``free``) taken from the command line."""
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{run} is no run folder: it has no config.yaml.", "Give --resume the folder of a run.")
    merged = resolve_from_run(resolved, run / "config.yaml")
    before = flatten(resolve_from_run(ResolvedConfig(resolved.config, {}), run / "config.yaml").config.model_dump())
    after = flatten(merged.config.model_dump())
    changed = [k for k in after if after[k] != before[k] and not k.startswith(mutable)]
    if changed:
        raise UsageError(
            f"{changed[0]} is {before[changed[0]]} in {run}, not {after[changed[0]]}: that would be another run.",
            "Leave it as it is, or start another run with --init-from.",
        )
    preset = read_run_record(run).get("preset")
    if resolved.preset not in (None, preset):
        raise UsageError(f"{run} is a run of preset {preset}, not {resolved.preset}.", "Leave --preset away.")
    return ResolvedConfig(merged.config, merged.origin, preset)


@dataclass(frozen=True)
class PretrainOptions:
    """Where a run is written, what it starts from, and what is said about it."""

    out: Path | None = None  # the run's folder; None: one is named after the preset
    resume: str | None = None  # a run's folder; "": out's, or the newest run of the preset
    overwrite: bool = False
    init_from: str | None = None  # weights for the encoder
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
