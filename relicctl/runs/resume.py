"""Options of the commands that write a run; ``--resume``: which run is meant, and what of its config may change."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relicctl.config import yaml_io
from relicctl.config.resolve import ResolvedConfig, flatten, get_command, resolve_from_run
from relicctl.data.datasets.base import ImageDataset
from relicctl.errors import DataError, UsageError
from relicctl.runs.folder import check_is_run
from relicctl.runs.status import is_unfinished
from relicctl.version import __version__

# What may differ between a run and its continuation; everything else would make it another run.
MUTABLE_KEYS = {
    # The learning rate may: it is lowered after a divergence. So may the bank's path: another bank is refused by its
    # content.
    "pretrain": (
        "runtime.", "checkpoint.", "eval.", "optim.max_steps", "optim.base_lr", "data.train", "data.val",
        "data.max_corrupt_fraction", "data.decoding.max_pixels", "bgmask.bank",
    ),
    "train-bgmask": (
        "runtime.", "checkpoint.", "data.train", "data.eval", "data.mask_data", "data.max_corrupt_fraction",
        "data.decoding.max_pixels",
    ),
    "linear-eval": ("runtime.", "checkpoint.", "optim.max_steps", "analysis.", "data."),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line says about a run beside its config; the same for all commands that write one."""

    out: Path | None = None  # the run's folder; None: a new one, named by the command
    resume: str | None = None  # the folder of a run to resume; "": out's, or where the command allows it the newest
    overwrite: bool = False
    download: bool = False
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(RunOptions):
    """Options of ``pretrain`` and ``train-bgmask``."""

    init_from: str | None = None  # weights for the encoder; train-bgmask has them in its config too
    json: bool = False  # the format of a dry run


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(RunOptions):
    """Which encoders are evaluated."""

    sources: tuple[str, ...] = ()
    network: str = "online"


@dataclass(frozen=True, kw_only=True)
class LinearOptions(EvaluationOptions):
    """Options of ``linear-eval``: the first source is evaluated, others are only compared in the analysis."""

    tests: tuple[str, ...] = ()  # NAME=DATA each
    analysis: bool = False


@dataclass(frozen=True, kw_only=True)
class TransferOptions(EvaluationOptions):
    """Options of ``transfer``: the sources are also reported relative to each of the baselines."""

    baselines: tuple[str, ...] = ()


def find_run_config(options: RunOptions, preset: str | None, command: str) -> Path | None:
    """Return config.yaml of the run that --resume means; None where there is none, which is the command's to report."""
    run = None
    with suppress(UsageError):
        if isinstance(options, EvaluationOptions):
            run = find_folder_to_resume(options)
        elif isinstance(options, TrainingOptions) and options.resume is not None:
            run = find_run_to_resume(options, preset, command)
    return run / "config.yaml" if run is not None and (run / "config.yaml").is_file() else None


def find_resume_of_results(resume: str | None, out: Path | None) -> str | None:
    """Return --resume's value; None for a bare one with an --out that holds no results yet.

    That starts an evaluation: the same command line resumes it when executed again, as with ``pretrain``.
    """
    nothing_yet = resume == "" and out is not None and not (out / "config.yaml").is_file()
    return None if nothing_yet else resume


def find_folder_to_resume(options: EvaluationOptions) -> Path | None:
    """Return the folder of the results that are resumed, None if a new one is started. Raises UsageError."""
    if options.resume is None:
        return None
    out = Path(options.resume) if options.resume else options.out
    if out is None or not (out / "config.yaml").is_file():
        raise UsageError(f"--resume names no folder of results{f': {out}' if out else ''}.", "Write --resume DIR.")
    return out


def resolve_run(resolved: ResolvedConfig, options: TrainingOptions) -> tuple[ResolvedConfig, Path | None]:
    """Return the config, and the run that is resumed if one is; raise UsageError where the two contradict."""
    run = None
    if options.resume is not None:
        run = find_run_to_resume(options, resolved.preset, get_command(type(resolved.config)))
    return resolved if run is None else resume_config(resolved, run), run


def find_run_to_resume(options: TrainingOptions, preset: str | None, command: str) -> Path | None:
    """Return the folder that --resume means: its value, --out, or the newest run of ``command`` and ``preset``.

    None for a bare --resume with an --out that holds no run yet, which starts one.
    """
    if not options.resume and options.out is not None and not options.overwrite:
        return _find_run_at(options.out, options.init_from)
    for given, name in ((options.overwrite, "--overwrite"), (options.init_from, "--init-from")):
        if given:
            raise UsageError(f"{name} starts a run, --resume continues one.", "Give one of the two.")
    if options.resume:
        if options.out is not None and options.out != Path(options.resume):
            raise UsageError("--resume continues in the run's folder, but --out names another.", "Omit --out.")
        return Path(options.resume)
    configs = sorted(Path("runs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    runs = [path.parent for path in configs if _is_same_kind(_load_run_config(path.parent), preset, command)]
    if not runs:
        of = f" of preset {preset}" if preset else ""
        raise UsageError(f"There is no run{of} to resume under runs/.", "Name its folder: --resume RUN.")
    return runs[-1]


def find_unfinished_run(preset: str | None, command: str) -> Path | None:
    """Return the newest run of the command and preset under runs/ that was stopped or killed; none that is running."""
    configs = sorted(Path("runs").glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
    unfinished = (path.parent for path in configs if is_unfinished(path.parent))
    return next((run for run in unfinished if _is_same_kind(_load_run_config(run), preset, command)), None)


def _is_same_kind(content: dict[str, Any], preset: str | None, command: str) -> bool:
    """Return whether the ``content`` of a config.yaml is of a run of the same command and, if one is given, preset."""
    record = content.get("run") or {}
    if content.get("command", "pretrain") != command or "preset" not in record:
        return False
    return preset in (None, record["preset"])


def _find_run_at(out: Path, init_from: str | None) -> Path | None:
    """Return ``out`` if it holds a run: the same command line starts a run, and resumes it when executed again."""
    if not (out / "config.yaml").is_file():
        return None
    before = read_run_record(out).get("init_from")
    if init_from not in (None, before):
        start = before or "a new network"
        what = f"{out} was started from {start}, not from {init_from}: this cannot change in a resumed run."
        raise UsageError(what, "Leave --init-from unchanged, or start a new run with another --out.")
    return out


def read_run_record(run: Path) -> dict[str, Any]:
    """Return what config.yaml recorded under ``run`` when the run started; {} for another file."""
    return _load_run_config(run).get("run") or {}


def _load_run_config(run: Path) -> dict[str, Any]:
    with suppress(UsageError):
        return yaml_io.load_mapping(run / "config.yaml")
    return {}


def make_record(resolved: ResolvedConfig, images: ImageDataset, **facts: Any) -> dict[str, Any]:
    """Return what config.yaml stores under ``run``: facts that must hold when the run is resumed."""
    fingerprint = images.compute_fingerprint()
    start = {"version": __version__, "preset": resolved.preset, "data_fingerprint": fingerprint, "images": len(images)}
    return start | facts


def read_resumable_record(run: Path, images: ImageDataset, fix: str) -> dict[str, Any]:
    """Return the record of a run that can be resumed. Raises UsageError where a field is missing.

    Raises DataError with the advice ``fix`` where ``images`` are not those of the run.
    """
    record = read_run_record(run)
    if not {"data_fingerprint", "precision"} <= record.keys():
        what = f"{run}/config.yaml lacks what the run was started with (run.data_fingerprint, run.precision)."
        raise UsageError(what, "Restore the file, or start a new run with --init-from.")
    if record["data_fingerprint"] != images.compute_fingerprint():
        raise DataError(f"The images are not those that {run} was started with.", fix)
    return record


def resume_config(resolved: ResolvedConfig, run: Path) -> ResolvedConfig:
    """Return the run's config, with those of MUTABLE_KEYS that the user gave taken from the command line."""
    check_is_run(run)
    mutable = MUTABLE_KEYS[get_command(type(resolved.config))]
    merged = resolve_from_run(resolved, run / "config.yaml")
    before = flatten(resolve_from_run(ResolvedConfig(resolved.config, {}), run / "config.yaml").config.model_dump())
    after = flatten(merged.config.model_dump())
    changed = [k for k in after if after[k] != before[k] and not k.startswith(mutable)]
    if changed:
        key = changed[0]
        what = f"{key} is {before[key]} in {run}, not {after[key]}: this cannot change in a resumed run."
        raise UsageError(what, "Leave it unchanged, or start a new run with another --out.")
    record = read_run_record(run)
    preset = record.get("preset")
    if "preset" in record and resolved.preset not in (None, preset):  # evaluations do not record theirs
        raise UsageError(f"{run} is a run of preset {preset}, not {resolved.preset}.", "Omit --preset.")
    return ResolvedConfig(merged.config, merged.origin, preset)
