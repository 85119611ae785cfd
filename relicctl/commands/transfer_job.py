"""What a transfer evaluation is asked to do: from the command line, or the folder to go on with."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relicctl import __version__
from relicctl.baselines import open_encoder
from relicctl.commands.options import TransferOptions
from relicctl.config import plain_yaml
from relicctl.config.resolve import Resolved, rebase
from relicctl.config.transfer import TransferConfig
from relicctl.console import Console
from relicctl.errors import UsageError
from relicctl.evaluation.subsets import check_labels
from relicctl.reference import Reference, named
from relicctl.runs import RunFolder, free_name, refuse_occupied


@dataclass(frozen=True)
class Job:
    """Which encoders; noted in config.yaml, so that ``--resume`` needs nothing else."""

    sources: tuple[str, ...]
    baselines: tuple[str, ...]
    network: str

    @property
    def encoders(self) -> tuple[str, ...]:
        return self.sources + self.baselines


def settle(resolved: Resolved, options: TransferOptions) -> tuple[Job, Resolved, Path]:
    """Which encoders on what data, how, and where the results go; refusals that need no data come here."""
    job = Job(tuple(map(named, options.sources)), options.baselines, options.network)
    out = options.out
    if options.resume is not None:
        out = Path(options.resume) if options.resume else out
        if out is None or not (out / "config.yaml").is_file():
            raise UsageError(f"--resume names no folder of results{f': {out}' * bool(out)}.", "Write --resume DIR.")
        resolved = rebase(resolved, out / "config.yaml")
        before = plain_yaml.load_mapping(out / "config.yaml")["run"]["job"]
        job = Job(
            job.sources or tuple(before["sources"]), job.baselines or tuple(before["baselines"]), before["network"]
        )
    elif out is not None:
        refuse_occupied(out, overwrite=options.overwrite)
    if not job.sources:
        raise UsageError("No encoder is named.", "Give runs, files of weights, -, random or torchvision:NAME.")
    twice = [name for number, name in enumerate(job.encoders) if name in job.encoders[:number]]
    if twice:
        raise UsageError(f"The encoder {twice[0]} is named twice.", "Name every encoder once, baselines included.")
    if not resolved.config.data.sets:
        raise UsageError("No data are named.", "Give --data NAME=DATA, or --preset byol-suite.")
    for labels in resolved.config.labels:
        check_labels(text_of(labels))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("transfer runs in one process.", "Start it without torchrun.")
    return job, resolved, out or free_name(Path("runs"), "transfer")


def open_all(job: Job, config: TransferConfig, console: Console) -> list[Reference]:
    """``random`` is the untrained network of the first encoder that has a run, ``pixels`` go with its images."""
    found: list[Reference] = []
    for source in job.encoders:
        home = next((str(r.run) for r in found if r.run), None)
        told = f"{source}:{home}" if home and source in ("random", "pixels") else source
        size, seed = config.eval.size, config.seed
        found.append(
            open_encoder(told, network=job.network, model=config.model, size=size, seed=seed, warn=console.warn)
        )
    return found


def open_folder(out: Path, options: TransferOptions, config: TransferConfig) -> RunFolder:
    keep = config.checkpoint.keep
    if options.resume is not None:
        return RunFolder.reopen(out, keep=keep)
    return RunFolder.create(out, overwrite=options.overwrite, keep=keep)


def noted(job: Job) -> dict[str, Any]:
    return {
        "version": __version__,
        "job": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(job).items()},
    }


def text_of(labels: str | float) -> str:
    return labels if isinstance(labels, str) else f"{labels:g}"


def named_data(texts: tuple[str, ...]) -> dict[str, str] | None:
    """NAME=DATA, split at the first "="; None for none."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, spec = text.partition("=")
        if not (name and equals and spec):
            raise UsageError(f"--data {text!r} is no NAME=DATA.", "Write it like --data dtd=dtd.zip.")
        if name in found:
            raise UsageError(f"--data {name} is given twice.", "Name every data set differently.")
        found[name] = spec
    return found or None
