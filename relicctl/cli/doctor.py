"""``relicctl doctor``: options and help."""

from __future__ import annotations

from typing import Annotated

import typer

from relicctl.cli import options as opt
from relicctl.cli.options import join_data, option, print_result, resolve_options

EXAMPLES = """\b
Examples:
  relicctl doctor
  relicctl doctor --preset r50-1000ep --data photos/ --device cuda
  relicctl doctor --json"""


def doctor(
    preset: Annotated[opt.Text, option("NAME", "Preset that the machine is meant for.")] = None,
    config: opt.ConfigFile = None,
    sets: opt.Sets = None,
    data: Annotated[
        opt.Texts, option("DATA", "Images (default: generated JPEGs and the demo's shapes); repeatable.", "--data")
    ] = None,
    download: opt.Download = False,
    device: opt.Device = None,
    workers: opt.Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Check this machine before a long run; prints ok, or the checks that fail (exit code 1)."""
    from relicctl.commands import doctor as command
    from relicctl.config.pretrain import PretrainConfig

    options = {"device": device, "workers": workers}
    resolved = resolve_options(preset, config, sets, options, PretrainConfig)
    result = command.doctor(resolved, join_data(data), quiet=quiet, download=download)
    print_result(" ".join(result["failed"]) or "ok", result if as_json else None)
    if result["failed"]:
        raise typer.Exit(1)
