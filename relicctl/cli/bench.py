"""``relicctl bench``: options and help."""

from __future__ import annotations

from typing import Annotated

import typer

from relicctl.cli import options as opt
from relicctl.cli.options import join_data, option, print_result, resolve_options

EXAMPLES = """\b
Examples:
  relicctl bench --preset r50-1000ep
  relicctl bench --preset r50-1000ep --data photos.zip --json
  relicctl bench --preset cifar10-r18 --set model.width=0.25 --batch 64"""


def bench(
    preset: Annotated[opt.Text, option("NAME", "Preset to benchmark.")] = None,
    config: opt.ConfigFile = None,
    sets: opt.Sets = None,
    data: Annotated[
        opt.Texts, option("DATA", "Images (default: the preset's, else generated JPEGs); repeatable.", "--data")
    ] = None,
    batch: Annotated[
        int | None, option("N", "Batch size (default: the largest that fits and finishes in minutes).")
    ] = None,
    repeats: Annotated[int, option("N", "Measurements of each metric, after one warm-up.")] = 5,
    download: opt.Download = False,
    device: opt.Device = None,
    workers: opt.Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Benchmark a pretraining on this machine: images/s, waits, memory, hours; prints the bottleneck."""
    from relicctl.commands import bench as command
    from relicctl.config.pretrain import PretrainConfig

    options = {"data": join_data(data), "device": device, "workers": workers}
    resolved = resolve_options(preset, config, sets, options, PretrainConfig)
    result = command.bench(resolved, batch=batch, repeats=repeats, quiet=quiet, download=download)
    print_result(result["bottleneck"], result if as_json else None)
