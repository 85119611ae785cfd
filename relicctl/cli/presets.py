"""``relicctl presets``: options and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relicctl.cli.options import print_result

app = typer.Typer(
    help="Built-in presets.",
    epilog="""\b
Examples:
  relicctl presets ls
  relicctl presets show demo
  relicctl presets cp demo my.yaml""",
    rich_markup_mode=None,
    no_args_is_help=True,
)
PresetName = Annotated[str, typer.Argument(metavar="NAME")]


@app.command("ls")
def presets_ls() -> None:
    """List the presets with a one-line description of each."""
    from relicctl.commands.presets import format_preset_list

    print_result(format_preset_list())


@app.command("show")
def presets_show(name: PresetName) -> None:
    """Print a preset's whole config and where each value comes from."""
    from relicctl.commands.presets import format_preset

    print_result(format_preset(name))


@app.command("cp")
def presets_cp(name: PresetName, destination: Annotated[Path, typer.Argument(metavar="DEST")]) -> None:
    """Copy a preset to a file or folder, to change it and pass it to --config; prints the file."""
    from relicctl.commands.presets import copy_preset

    print_result(str(copy_preset(name, destination)))
