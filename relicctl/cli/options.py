"""Options that several commands have, and what every command does with its result."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relicctl.console import Console
from relicctl.errors import UsageError, raise_interrupted

if TYPE_CHECKING:
    from relicctl.config.base import CommandConfig
    from relicctl.config.resolve import ResolvedConfig
    from relicctl.runs.resume import RunOptions


def option(metavar: str, help: str, *names: str) -> Any:
    """Define an option that takes a value; ``names`` where it is not named like its parameter."""
    return typer.Option(*names, metavar=metavar, help=help)


def set_option(example: str) -> Any:
    """Define ``--set``; the help shows a key of the command."""
    return option("KEY=VALUE", f"Override one key, as in {example}; repeatable.", "--set")


Text = str | None
Texts = list[str] | None
Preset = Annotated[Text, option("NAME", "Preset to start from.")]
ConfigFile = Annotated[Path | None, option("FILE", "YAML that overrides the preset.")]
Sets = Annotated[Texts, set_option("loss.beta=1")]
RunFolder = Annotated[Path | None, option("DIR", "The run's folder.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch torchvision:NAME data.")]
Device = Annotated[Text, option("auto|cpu|cuda", "Device to compute on.")]
Workers = Annotated[int | None, option("N", "Worker processes that decode and crop images.")]
Seed = Annotated[int | None, option("N", "Random seed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a path.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only print warnings and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
NetworkChoice = Annotated[str, option("online|target", "Encoder of which network.")]
OverwriteRun = Annotated[bool, typer.Option("--overwrite", help="Delete the run that --out holds.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the results that --out holds.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the config and where it comes from; then stop.")]
DryRunWithCost = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print the config, where its values come from and an estimate of the cost; then stop."
    ),
]


def resolve_options(
    preset: Text,
    config_file: Path | None,
    sets: Texts,
    options: dict[str, Any],
    schema: type[CommandConfig],
    run: RunOptions | None = None,
) -> ResolvedConfig:
    """``resolve_config``, with one warning that lists the keys given under their old names.

    ``run``: what the command line says of the run; where it resumes one, that run's values are not the defaults'.
    """
    from relicctl.config.resolve import get_command, resolve_config
    from relicctl.runs.resume import find_run_config

    run_config = None if run is None else find_run_config(run, preset, get_command(schema))
    resolved = resolve_config(preset, config_file, sets or (), options, schema=schema, run_config=run_config)
    if resolved.renamed and os.environ.get("RANK", "0") == "0":
        names = ", ".join(f"{old} -> {new}" for old, new in resolved.renamed.items())
        Console().warn(f"config keys have new names: {names}")
    return resolved


def join_data(values: Texts) -> tuple[str, ...] | None:
    """Return the data sets of a repeatable option, None where it is not given."""
    return tuple(values) if values else None


def take_single(values: Texts, name: str) -> Text:
    """Return the value of an option that names data and takes one: a second one would be ignored in silence."""
    if values and len(values) > 1:
        raise UsageError(f"--{name} is given {len(values)} times.", "Give it once.")
    return values[0] if values else None


def handle_early_interrupt() -> AbstractContextManager[None]:
    """Report a signal that arrives before training; once a run's folder exists, the run reports it itself."""
    return raise_interrupted("before the first step; nothing was lost.", "Start it again.")


def print_result(text: str, record: dict[str, Any] | None = None) -> None:
    """Print a command's result, ``record`` as JSON or else ``text``: the one thing that goes to stdout."""
    print(text if record is None else json.dumps(record, default=str), flush=True)


def print_run(result: dict[str, Any], as_json: bool) -> None:
    """Print the folder of a run or evaluation; of a process group, one process prints."""
    if os.environ.get("RANK", "0") == "0":
        print_result(str(result["run"]), result if as_json else None)
