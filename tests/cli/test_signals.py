"""Signals before and after the work of a command: an exit code and two sentences, never another error."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
import os, time
os.kill(os.getpid(), {number})
time.sleep({seconds})
print("imported", flush=True)
"""
SCRIPT = """
import os, sys, time
from relicctl import cli

def run(arguments):
    try:
        import slow
        time.sleep(1000)
    except (KeyboardInterrupt, cli.Terminated) as stop:
        print(type(stop).__name__, flush=True)
        return 7

cli.run = run
cli.main()
"""


@pytest.mark.parametrize("seconds", [0, 0.3])
@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "Terminated"), (signal.SIGINT, "KeyboardInterrupt")])
def test_a_signal_in_the_middle_of_an_import_waits_for_its_end(
    number: int, name: str, seconds: float, tmp_path: Path
) -> None:
    """torch aborts the process, or reports an error of its own, when an exception comes out of its imports."""
    (tmp_path / "slow.py").write_text(MODULE.format(number=int(number), seconds=seconds))
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{SCRIPT}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == (f"imported\n{name}\n", "", 7)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGTERM, "stopped: SIGTERM before anything was saved."),
        (signal.SIGINT, "stopped: SIGINT before anything was saved."),
    ],
)
def test_a_signal_while_torch_is_imported_ends_at_once(number: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(MODULE.format(number=int(number), seconds=1000))
    (tmp_path / "slow.py").write_text("import torch")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{SCRIPT}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout, ended.returncode) == ("", 128 + number)
    assert f"{words}\n" in ended.stderr


def test_a_signal_after_the_work_changes_nothing() -> None:
    script = (
        "import atexit, os, signal\n"
        "from relicctl import cli\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "cli.run = lambda arguments: 0\n"
        "cli.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("", "", 0)
