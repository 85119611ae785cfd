"""The command line: one module per command. Commands are imported when they run, so that help answers at once."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from relicctl import __version__
from relicctl.cli import bench, export, linear_eval, presets, pretrain, transfer

# click's base of all wrong usage, wherever this typer keeps click
_WrongUsage: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="relicctl",
    help="ReLICv2: image encoders trained without labels.",
    epilog="""\b
Examples:
  relicctl pretrain --preset demo
  relicctl linear-eval runs/demo
  relicctl presets ls""",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command(epilog=pretrain.EXAMPLES)(pretrain.pretrain)
app.command(epilog=linear_eval.EXAMPLES)(linear_eval.linear_eval)
app.command(epilog=transfer.EXAMPLES)(transfer.transfer)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=bench.EXAMPLES)(bench.bench)
app.add_typer(presets.app, name="presets")


def main() -> None:
    """The console entry point: every failure ends here, as two sentences and an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line; its exit code."""
    try:
        code: Any = app(_normalised(arguments), prog_name="relicctl", standalone_mode=False)
        if code == 130:  # what typer makes of ^C outside the training loop
            return _report(KeyboardInterrupt(), arguments)
        return code or 0
    except _WrongUsage as error:
        return _report_usage(error)
    except typer.Abort:  # what click makes of ^C
        return _report(KeyboardInterrupt(), arguments)
    except (Exception, KeyboardInterrupt) as error:
        return _report(error, arguments)


def _normalised(arguments: list[str]) -> list[str]:
    """A bare ``--resume`` becomes ``--resume=``: click has no options whose value may be left out."""
    return [
        "--resume=" if argument == "--resume" and (not after or after[0].startswith("-")) else argument
        for argument, after in ((argument, arguments[i + 1 : i + 2]) for i, argument in enumerate(arguments))
    ]


def _report(error: BaseException, arguments: list[str]) -> int:
    from relicctl.console import report

    return report(error, debug="--debug" in arguments)


def _report_usage(error: Any) -> int:
    """A wrong option or argument; or none at all where one is needed, which is answered with the help."""
    from relicctl.console import report
    from relicctl.errors import UsageError

    command = error.ctx.command_path if error.ctx else "relicctl"
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return int(error.exit_code)
    what = error.format_message().rstrip(".")
    return report(UsageError(f"{what}.", f"See `{command} --help`."))
