"""``relicctl pretrain``: options and help."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from relicctl.cli.options import (
    AsJson,
    ConfigFile,
    Debug,
    Device,
    Download,
    Quiet,
    Seed,
    Sets,
    Workers,
    handle_early_interrupt,
    print_result,
    resolve_options,
)

EXAMPLES = """\b
Examples:
  relicctl pretrain --preset demo
  relicctl pretrain --preset demo --dry-run
  relicctl pretrain --preset demo --set optim.max_steps=20 --out runs/short
  relicctl pretrain --preset cifar10-r18 --download --device auto
  relicctl train-bgmask --preset demo-bgmask | relicctl pretrain --preset demo --bgmask -
  relicctl pretrain --resume runs/short"""


def pretrain(
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="Preset to start from.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Training images: folder, .zip, .tar, torchvision:NAME or shapes [#subfolder].",
        ),
    ] = None,
    val: Annotated[str | None, typer.Option(metavar="DATA", help="Labelled images to evaluate on.")] = None,
    bgmask: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|BANK|-",
            help="Background masks of the training images: a run of train-bgmask, or its mask bank.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[RUN]",
            help="Resume a run. Default: the run in --out (started if missing), else the latest of this preset.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that --out holds.")] = False,
    init_from: Annotated[
        str | None, typer.Option(metavar="WEIGHTS", help="Start the encoder from these weights or this run.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the config, where its values come from and an estimate of the cost; then stop."
        ),
    ] = False,
    download: Download = False,
    device: Device = None,
    workers: Workers = None,
    seed: Seed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train an encoder on images, without their labels; prints the run's folder."""
    with handle_early_interrupt():
        from relicctl.config.pretrain import PretrainConfig
        from relicctl.runs.resume import PretrainOptions

    options = {"data": data, "val": val, "bgmask": bgmask, "device": device, "workers": workers, "seed": seed}
    resolved = resolve_options(preset, config, sets, options, PretrainConfig)
    pretrain_options = PretrainOptions(
        out=out, resume=resume, overwrite=overwrite, init_from=init_from, download=download, json=as_json, quiet=quiet
    )
    if dry_run:
        from relicctl.pretraining import estimate

        print_result(estimate.format_pretrain_dry_run(resolved, pretrain_options))
        return
    with handle_early_interrupt():
        from relicctl.commands import pretrain as command

        result = command.pretrain(resolved, pretrain_options)
    if os.environ.get("RANK", "0") == "0":  # of a process group, one process prints
        print_result(json.dumps(result, default=str) if as_json else str(result["run"]))
