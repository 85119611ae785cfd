"""``relicctl train-bgmask``: options and help."""

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
    Workers,
    handle_early_interrupt,
    print_result,
    resolve_options,
)

EXAMPLES = """\b
Examples:
  relicctl train-bgmask --preset demo-bgmask --eval-data shapes
  relicctl train-bgmask --preset demo-bgmask | relicctl pretrain --preset demo --bgmask -
  relicctl train-bgmask --preset u2netp --data photos.zip --data more/ --eval-data ecssd.zip
  relicctl train-bgmask --preset u2netp --data photos.zip --dry-run
  relicctl train-bgmask --resume runs/u2netp
  relicctl train-bgmask --resume runs/u2netp --masks-for imagenet/train"""


def train_bgmask(
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="Preset to start from.")] = None,
    config: ConfigFile = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as in optim.epochs=5; repeatable."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Unlabelled images: folder, .zip, .tar, torchvision:NAME or shapes [#subfolder]; repeatable, then "
            "all are trained on together, and the first gets the masks.",
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images with true masks, to measure on and never to train: a folder or archive with images/ and "
            "masks/, or shapes.",
        ),
    ] = None,
    masks_for: Annotated[
        str | None, typer.Option(metavar="DATA", help="Images to generate masks for (default: the first --data).")
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|WEIGHTS", help="Encoder that model.arch=resnet starts from: one trained without labels."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="[RUN]", help="Resume a run. Default: the run in --out, else the latest of this preset."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that --out holds.")] = False,
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
    """Learn masks of objects from unlabelled images and make one for each; prints the run's folder."""
    with handle_early_interrupt():
        from relicctl.config.bgmask import BgmaskConfig
        from relicctl.runs.resume import BgmaskOptions

    options = {
        "data": tuple(data) if data else None,
        "eval-data": eval_data,
        "masks-for": masks_for,
        "init-from": init_from,
        "device": device,
        "workers": workers,
        "seed": seed,
    }
    resolved = resolve_options(preset, config, sets, options, BgmaskConfig)
    bgmask_options = BgmaskOptions(
        out=out, resume=resume, overwrite=overwrite, init_from=init_from, download=download, json=as_json, quiet=quiet
    )
    with handle_early_interrupt():
        from relicctl.bgmask.dry_run import format_bgmask_dry_run
        from relicctl.commands import train_bgmask as command

        if dry_run:
            print_result(format_bgmask_dry_run(resolved, bgmask_options))
            return
        result = command.train_bgmask(resolved, bgmask_options)
    if os.environ.get("RANK", "0") == "0":  # of a process group, one process prints
        print_result(json.dumps(result) if as_json else result["run"])
