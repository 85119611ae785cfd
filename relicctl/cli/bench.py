"""``relicctl bench``: options and help."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from relicctl.cli.options import (
    ConfigFile,
    Debug,
    Device,
    Download,
    Quiet,
    Sets,
    Workers,
    print_result,
    resolve_options,
)

EXAMPLES = """\b
Examples:
  relicctl bench --preset r50-1000ep
  relicctl bench --preset r50-1000ep --data photos.zip --json
  relicctl bench --preset cifar10-r18 --set model.width=0.25 --batch 64"""


def bench(
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="Preset to benchmark.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="Images (default: the preset's, else generated JPEGs).")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Batch size (default: the largest that fits and finishes in minutes)."),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="Measurements of each metric, after one warm-up.")] = 5,
    download: Download = False,
    device: Device = None,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Benchmark a pretraining on this machine: images/s, waits, memory, hours; prints the bottleneck."""
    from relicctl.commands import bench as command
    from relicctl.config.pretrain import PretrainConfig

    options = {"data": data, "device": device, "workers": workers}
    resolved = resolve_options(preset, config, sets, options, PretrainConfig)
    result = command.bench(resolved, batch=batch, repeats=repeats, quiet=quiet, download=download)
    print_result(json.dumps(result) if as_json else result["bottleneck"])
