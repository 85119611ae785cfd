"""``relicctl linear-eval``: options and help."""

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
    DryRun,
    NetworkChoice,
    Overwrite,
    Quiet,
    Seed,
    Workers,
    print_result,
    resolve_options,
)

EXAMPLES = """\b
Examples:
  relicctl linear-eval runs/demo
  relicctl linear-eval random:runs/demo
  relicctl linear-eval runs/demo --test swapped=shapes:backgrounds=swapped
  relicctl linear-eval runs/demo random:runs/demo pixels:runs/demo --analysis
  relicctl linear-eval torchvision:resnet50 --data birds.zip#train --val birds.zip#val
  relicctl linear-eval --preset linear-imagenet runs/r50 --data imagenet/train --val imagenet/val
  relicctl pretrain --preset demo | relicctl linear-eval -"""


def linear_eval(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|WEIGHTS|-",
            help="The encoder; - reads a path from stdin. Also random[:RUN], pixels[:RUN], torchvision:NAME. "
            "More than one with --analysis.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="Labelled training images (default: the run's).")
    ] = None,
    val: Annotated[str | None, typer.Option(metavar="DATA", help="Labelled images to test on.")] = None,
    tests: Annotated[
        list[str] | None,
        typer.Option(
            "--test", metavar="NAME=DATA", help="Additional test set, with classes matched by name; repeatable."
        ),
    ] = None,
    analysis: Annotated[
        bool, typer.Option("--analysis", help="Cluster analysis of the test images' features, with a map.")
    ] = False,
    network: NetworkChoice = "online",
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="linear-imagenet for the ImageNet protocol (default: the fast one)."),
    ] = None,
    config: ConfigFile = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as in sweep.lrs=[0.3]; repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Results folder (default: a new one in the encoder's run).")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="[DIR]", help="Resume an evaluation. Default: the one in --out.")
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
    """Train a linear classifier on an encoder's frozen features; prints the folder of the results."""
    from relicctl.commands import linear_eval as command
    from relicctl.config.linear_eval import LinearEvalConfig
    from relicctl.runs.resume import LinearOptions

    options = {"data": data, "val": val, "device": device, "workers": workers, "seed": seed}
    resolved = resolve_options(preset, config, sets, options, LinearEvalConfig)
    linear_options = LinearOptions(
        sources=tuple(sources or ()), network=network, tests=tuple(tests or ()), analysis=analysis,
        out=out, resume=resume, overwrite=overwrite, download=download, quiet=quiet,
    )  # fmt: skip
    if dry_run:
        print_result(command.format_linear_dry_run(resolved, linear_options))
        return
    result = command.linear_eval(resolved, linear_options)
    if os.environ.get("RANK", "0") == "0":  # of a process group, one process prints
        print_result(json.dumps(result) if as_json else result["run"])
