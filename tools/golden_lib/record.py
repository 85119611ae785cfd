"""Runs the cases, two at a time, and writes what each did to a JSON file."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golden_lib.cases import Case, Command, list_cases
from golden_lib.inputs import make_inputs
from golden_lib.program import Program
from golden_lib.renames import Renames, find_command, flatten
from golden_lib.snapshot import LEFT_OUT, leave_out_timings, outline, read_config, take_snapshot
from golden_lib.warm import WarmPython


def record(tree: Path, out: Path, only: list[str], renames: Renames, *, jobs: int, work: Path | None) -> None:
    """Record the cases named (all of them where none is) and those that they need."""
    cases = select_cases(list_cases(tree), only)
    folder = work or Path(tempfile.mkdtemp(prefix="golden-"))
    folder.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    try:
        program = Program(tree, folder.resolve())
        program.check()
        make_inputs(program.work, renames)
        (program.work / "exports").mkdir()
        warm = WarmPython(program.work, program.make_environment())
        run_cases(cases, Recorder(program, warm, renames, out), jobs)
        warm.close()
    finally:
        if work is None:
            shutil.rmtree(folder, ignore_errors=True)


def select_cases(cases: list[Case], names: list[str]) -> list[Case]:
    """Those named or whose name begins so, with what they need, in the order of ``cases``."""
    if not names:
        return cases
    wanted = {case.name for case in cases if any(case.name.startswith(name) for name in names)}
    for case in reversed(cases):
        wanted |= set(case.needs) if case.name in wanted else set()
    if not wanted:
        raise SystemExit(f"No case is called {' or '.join(names)}: {' '.join(case.name for case in cases)}")
    by_name = {case.name: case for case in cases}
    while missing := {need for name in wanted for need in by_name[name].needs} - wanted:
        wanted |= missing
    return [case for case in cases if case.name in wanted]


@dataclass(frozen=True)
class Recorder:
    """What runs commands, and where recordings go."""

    program: Program
    warm: WarmPython
    renames: Renames
    out: Path

    def run(self, command: Command) -> subprocess.CompletedProcess[str]:
        """Run a command; several ranks, and what is measured, in processes of their own."""
        arguments = self.renames.translate_arguments(command.arguments)
        if command.ranks > 1 or command.outline_only:
            return self.program.run(arguments, ranks=command.ranks, stdin=command.stdin)
        return self.warm.run(arguments, command.stdin)


def run_cases(cases: list[Case], recorder: Recorder, jobs: int) -> None:
    """Each as soon as a place is free and what it needs is done."""
    waiting = list(cases)
    done: set[str] = set()
    running: dict[Future[None], Case] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            ready = [case for case in waiting if done.issuperset(case.needs)][: jobs - len(running)]
            for case in ready:
                waiting.remove(case)
                running[pool.submit(record_case, case, recorder)] = case
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                done.add(running.pop(future).name)
            print(f"{len(done)} of {len(cases)}", flush=True)


def record_case(case: Case, recorder: Recorder) -> None:
    """Run one case and write OUT/NAME.json."""
    began = time.monotonic()
    program = recorder.program
    commands = [record_command(command, recorder) for command in case.commands]
    if not program.work.is_dir():
        raise SystemExit(f"{program.work} was removed while {case.name} was recorded.")
    paths = [program.work / name for name in case.outputs]
    content = {
        "words": case.words,
        "commands": dict(commands),
        "files": take_snapshot(paths, program.work, program.normalise),
    }
    (recorder.out / f"{case.name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    codes = " ".join(sorted({str(result["exit"]["value"]) for _, result in commands}))
    print(f"{case.name}: exit {codes}, {time.monotonic() - began:.0f} s", flush=True)


def record_command(command: Command, recorder: Recorder) -> tuple[str, dict[str, Any]]:
    """The command line under its old keys, and its exit code, stdout and stderr."""
    ended, normalise = recorder.run(command), recorder.program.normalise
    title = " ".join(("relicctl", *command.arguments)) + (f"  ({command.ranks} ranks)" if command.ranks > 1 else "")
    stderr = [] if command.outline_only else normalise(ended.stderr).splitlines()
    stdout = describe_stdout(command, normalise(ended.stdout), ended)
    return title, {
        "exit": {"kind": "value", "value": ended.returncode},
        "stdout": stdout,
        "stderr": {"kind": "text", "lines": stderr},
    }


def describe_stdout(command: Command, text: str, ended: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Parsed where it is JSON or a config, and its lines."""
    arguments = command.arguments
    if "--json" in arguments and text.startswith("{"):
        content = json.loads(text)
        if "--dry-run" in arguments:
            config, origin = flatten(content.pop("config")), content.pop("origin")
            figures = leave_out_timings(content)
            return {"kind": "config", "command": find_command(arguments), "config": config, "origin": origin, **figures}
        if arguments[0] == "export":
            content["sha256"] = LEFT_OUT  # of a file whose metadata have no fixed order
        return {"kind": "json", "content": outline(content) if command.outline_only else leave_out_timings(content)}
    shown = "--dry-run" in arguments or arguments[:2] == ("presets", "show")
    if shown and ended.returncode == 0:
        return {"kind": "config", **read_config(text), "lines": text.splitlines()}
    return {"kind": "text", "lines": text.splitlines()}
