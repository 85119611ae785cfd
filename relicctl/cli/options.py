"""Options that several commands have, and what every command does with its result."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relicctl.errors import Interrupted, Terminated

if TYPE_CHECKING:
    from relicctl.config.base import CommandConfig
    from relicctl.config.resolve import ResolvedConfig

ConfigFile = Annotated[Path | None, typer.Option(metavar="FILE", help="YAML that overrides the preset.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as in loss.beta=1; repeatable."),
]
Download = Annotated[bool, typer.Option("--download", help="Fetch torchvision:NAME data.")]
Device = Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help="Device to compute on.")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Worker processes that decode and crop images.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of every random draw.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a path.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only print warnings and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
NetworkChoice = Annotated[str, typer.Option(metavar="online|target", help="Which network's encoder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the results that --out holds.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the config and where it comes from; then stop.")]


def resolve_options(
    preset: str | None,
    config_file: Path | None,
    sets: list[str] | None,
    options: dict[str, Any],
    schema: type[CommandConfig],
) -> ResolvedConfig:
    """``resolve_config``, with one warning that lists the keys given under their old names."""
    from relicctl.config.resolve import resolve_config
    from relicctl.console import Console

    resolved = resolve_config(preset, config_file, sets or (), options, schema=schema)
    if resolved.renamed and os.environ.get("RANK", "0") == "0":
        names = ", ".join(f"{old} -> {new}" for old, new in resolved.renamed.items())
        Console().warn(f"config keys have new names: {names}")
    return resolved


@contextmanager
def handle_early_interrupt() -> Iterator[None]:
    """Report a signal that arrives before training; once a run's folder exists, the run reports it itself."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        signum = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        what = "Stopped before the first step; nothing was lost."
        raise Interrupted(what, "Start it again.", signum) from None


def print_result(result: str) -> None:
    """Print a command's result: the one thing that goes to stdout."""
    from relicctl.console import write_result

    write_result(result)
