"""The command line: one module per command. Commands are imported when they run, so that help answers at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Annotated, Any

import typer

from relicctl.cli import bench, doctor, export, linear_eval, presets, pretrain, train_bgmask, transfer
from relicctl.console import report_error
from relicctl.errors import DataError, Terminated, UsageError
from relicctl.version import __version__

FIRST_RANK_SECONDS = 15.0  # for the first process to report an error; then others do it as well
# click's base of all wrong usage, wherever this typer keeps click
_ClickUsageError: type[Exception] = typer.BadParameter.__bases__[0]
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


def _print_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command(epilog=pretrain.EXAMPLES)(pretrain.pretrain)
app.command(epilog=train_bgmask.EXAMPLES)(train_bgmask.train_bgmask)
app.command(epilog=linear_eval.EXAMPLES)(linear_eval.linear_eval)
app.command(epilog=transfer.EXAMPLES)(transfer.transfer)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=bench.EXAMPLES)(bench.bench)
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)
app.add_typer(presets.app, name="presets")


def main() -> None:
    """The console entry point: every failure ends here, as two sentences and an exit code."""
    _open_standard_streams()
    _raise_on_signals()
    code = run(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGINT):  # all is written: a late signal must not change the exit code
        signal.signal(number, signal.SIG_IGN)
    if code in (130, 143):
        # All is saved. Threads of libraries that still run could abort the interpreter's own exit.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _open_standard_streams() -> None:
    """Open what was closed (``2>&-``) on nothing: or a checkpoint might become stream 2, where libraries write to."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one


def _raise_on_signals() -> None:
    """SIGTERM and ^C become exceptions until a training loop takes them over. Child processes die of them.

    In the middle of an import they wait until it is over: an exception there may come out as quite another error, or
    abort the process in the C++ code that imports a module. Importing torch takes seconds, before anything is written:
    then the process ends at once.
    """
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif _is_importing_torch():
            os._exit(report_error(_make_stop(number)))
        elif _is_importing(frame):
            again = threading.Timer(0.05, os.kill, (owner, number))
            again.daemon = True
            again.start()
        else:
            raise _make_stop(number)

    signal.signal(signal.SIGTERM, handle)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell's background job ignores it
        signal.signal(signal.SIGINT, handle)


def _make_stop(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated()


def _is_importing_torch() -> bool:
    return getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a frame, or one that led to it, is of Python's import system."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def run(arguments: list[str]) -> int:
    """Run a command line; its exit code."""
    try:
        code: Any = app(_normalize_arguments(arguments), prog_name="relicctl", standalone_mode=False)
        if code == 130:  # what typer makes of ^C outside the training loop
            raise KeyboardInterrupt
        return code or 0
    except _ClickUsageError as error:
        return _report_usage(error)
    except (Exception, KeyboardInterrupt, Terminated) as error:
        if isinstance(error, (UsageError, DataError)) and not error.of_one_rank:
            _wait_for_first_rank()
        is_abort = isinstance(error, typer.Abort)  # what click makes of ^C
        return report_error(KeyboardInterrupt() if is_abort else error, debug="--debug" in arguments)


def _wait_for_first_rank() -> None:
    """Leave it to the first process of this host to report an error that all have: torchrun then ends the others."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(FIRST_RANK_SECONDS)


def _normalize_arguments(arguments: list[str]) -> list[str]:
    """A bare ``--resume`` becomes ``--resume=``: click has no options whose value may be left out."""
    return [
        "--resume=" if argument == "--resume" and (not after or after[0].startswith("-")) else argument
        for argument, after in ((argument, arguments[i + 1 : i + 2]) for i, argument in enumerate(arguments))
    ]


def _report_usage(error: Any) -> int:
    """A wrong option or argument; or none at all where one is needed, which is answered with the help."""
    command = error.ctx.command_path if error.ctx else "relicctl"
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return int(error.exit_code)
    _wait_for_first_rank()
    what = error.format_message().rstrip(".")
    return report_error(UsageError(f"{what}.", f"See `{command} --help`."))
