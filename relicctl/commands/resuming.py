"""``--resume``: which run is meant, and what of its config may change."""

from __future__ import annotations

from pathlib import Path

from relicctl.commands.options import PretrainOptions
from relicctl.config.resolve import Resolved, flatten, rebase
from relicctl.errors import UsageError

# What may differ between a run and its continuation; everything else would make it another run.
FREE_TO_CHANGE = ("runtime.", "checkpoint.", "eval.", "optim.max_steps", "data.")


def run_to_resume(options: PretrainOptions, preset: str | None) -> Path:
    """The folder that --resume means: its own value, --out, or the newest run of the preset."""
    if options.resume:
        return Path(options.resume)
    if options.out is not None:
        return options.out
    candidates = sorted(Path("runs").glob(f"{preset or ''}*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not candidates:
        raise UsageError("There is no run to resume under runs/.", "Name its folder: --resume RUN.")
    return candidates[-1].parent


def continued(resolved: Resolved, run: Path, free: tuple[str, ...] = FREE_TO_CHANGE) -> Resolved:
    """The run's own config, with what may change (keys that begin like ``free``) taken from the command line."""
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{run} is no run folder: it has no config.yaml.", "Give --resume the folder of a run.")
    merged = rebase(resolved, run / "config.yaml")
    before = flatten(rebase(Resolved(resolved.config, {}), run / "config.yaml").config.model_dump())
    after = flatten(merged.config.model_dump())
    changed = [k for k in after if after[k] != before[k] and not k.startswith(free)]
    if changed:
        raise UsageError(
            f"{changed[0]} is {before[changed[0]]} in {run}, not {after[changed[0]]}: that would be another run.",
            "Leave it as it is, or start another run with --init-from.",
        )
    return merged
