"""A process that has torch loaded and forks for every command, since loading it takes longer than most commands.

What is loaded are libraries alone: each command imports relicctl itself, as ``python -m relicctl`` does.

It reads lines of JSON, ``{"arguments": [...], "files": [stdin, stdout, stderr]}``, and answers each with the exit code.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

LIBRARIES = (
    "torch", "torchvision", "torch.utils.data", "torch.distributed", "scipy.ndimage", "skimage", "PIL.Image",
    "safetensors.torch", "pydantic", "typer", "yaml",
)  # fmt: skip


def serve() -> None:
    """Answer until stdin ends."""
    for name in LIBRARIES:
        importlib.import_module(name)
    while line := os.read(0, 1 << 16):  # one line at a time is sent, and none is left in a buffer of a child
        order = json.loads(line)
        child = os.fork()
        if not child:
            for number, path in enumerate(order["files"]):
                file = os.open(path, os.O_RDWR)
                os.dup2(file, number)
                os.close(file)
            sys.argv = ["relicctl", *order["arguments"]]
            sys.path[0] = os.getcwd()  # where this file lies until now
            leave_quickly(run_program())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(1, f"{code}\n".encode())


def run_program() -> int:
    """``python -m relicctl``; its exit code."""
    try:
        runpy.run_module("relicctl", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def leave_quickly(code: int) -> NoReturn:
    """Leave as the interpreter does, but let the system free the libraries' memory: that saves a second."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class WarmPython:
    """One such process for each thread that asks, in the folder ``work`` with ``environment``."""

    def __init__(self, work: Path, environment: dict[str, str]) -> None:
        self._work, self._environment = work, environment
        self._local = threading.local()
        self._all: list[subprocess.Popen[str]] = []

    def run(self, arguments: list[str], stdin: str) -> subprocess.CompletedProcess[str]:
        """Run relicctl to its end."""
        if not hasattr(self._local, "process"):
            self._local.process = self._start()
        process: subprocess.Popen[str] = self._local.process
        assert process.stdin is not None
        assert process.stdout is not None
        with TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
            for file, text in zip(files, (stdin, "", ""), strict=True):
                file.write_text(text)
            print(json.dumps({"arguments": arguments, "files": [*map(str, files)]}), file=process.stdin, flush=True)
            code = int(process.stdout.readline())
            output, errors = (file.read_text("utf-8", errors="replace") for file in files[1:])
        return subprocess.CompletedProcess(arguments, code, output, errors)

    def close(self) -> None:
        """End the processes."""
        for process in self._all:
            process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=self._work,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._all.append(process)
        return process


if __name__ == "__main__":
    serve()
