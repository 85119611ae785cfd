"""``relicctl transfer``: options and help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from relicctl.cli.options import (
    AsJson,
    ConfigFile,
    Debug,
    Device,
    Download,
    DryRun,
    Overwrite,
    Quiet,
    Seed,
    WhichNetwork,
    Workers,
    emit,
)

EXAMPLES = """\b
Examples:
  relicctl transfer runs/demo --baseline random --data shapes=shapes
  relicctl transfer runs/a runs/b --baseline torchvision:resnet50 --preset byol-suite --download
  relicctl transfer runs/a --data dtd=dtd.zip --protocol logistic --protocol knn --labels all --labels 0.1
  relicctl transfer runs/a --preset finetune-quick --data pets=pets-{split}.zip
  relicctl transfer --resume runs/transfer"""


def transfer(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|WEIGHTS|-",
            help="Encoders; - reads a path from stdin. Also random[:RUN], pixels[:RUN], torchvision:NAME.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DATA",
            help="Data with train, perhaps val, and test in it, or with {split} in its name; repeatable.",
        ),
    ] = None,
    baselines: Annotated[
        list[str] | None,
        typer.Option("--baseline", metavar="ENCODER", help="Also evaluated, and improved on; repeatable."),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(metavar="logistic|knn|finetune", help="How features are judged; repeatable. [logistic]"),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(metavar="all|SHARE|N-per-class|FILE", help="Training labels that are known; repeatable. [all]"),
    ] = None,
    network: WhichNetwork = "online",
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="byol-suite, finetune-byol or finetune-quick.")
    ] = None,
    config: ConfigFile = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as in data.metrics={x: map11}; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the results; else a new one.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="[DIR]", help="Go on; without DIR, with --out's. What is finished is kept.")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    download: Download = False,
    device: Device = None,
    workers: Workers = None,
    seed: Seed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare encoders on other data sets, by classification; prints the folder of the results."""
    from relicctl.commands import transfer as command
    from relicctl.commands.options import TransferOptions
    from relicctl.commands.transfer_job import named_data
    from relicctl.config.resolve import resolve
    from relicctl.config.transfer import TransferConfig

    options = {
        "sets": named_data(tuple(data or ())),
        "protocol": protocol or None,
        "labels": labels or None,
        "device": device,
        "workers": workers,
        "seed": seed,
    }
    resolved = resolve(preset, config, sets or (), options, schema=TransferConfig)
    told = TransferOptions(
        tuple(sources or ()), tuple(baselines or ()), network, out, resume, overwrite, download, quiet
    )
    if dry_run:
        emit(command.dry_run(resolved, told))
        return
    result = command.transfer(resolved, told)
    emit(json.dumps(result) if as_json else result["run"])
