"""``relicctl doctor``: options and help."""

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
  relicctl doctor
  relicctl doctor --preset r50-1000ep --data photos/ --device cuda
  relicctl doctor --json"""


def doctor(
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="Preset that the machine is meant for.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="Images (default: generated JPEGs and the demo's shapes)."),
    ] = None,
    download: Download = False,
    device: Device = None,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check this machine before a long run; prints ok, or the checks that fail (exit code 1)."""
    from relicctl.commands import doctor as command
    from relicctl.config.pretrain import PretrainConfig

    options = {"device": device, "workers": workers}
    resolved = resolve_options(preset, config, sets, options, PretrainConfig)
    result = command.doctor(resolved, data, quiet=quiet, download=download)
    print_result(json.dumps(result) if as_json else " ".join(result["failed"]) or "ok")
    if result["failed"]:
        raise typer.Exit(1)
