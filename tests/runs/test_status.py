"""status.json: it tells every way a run can go, is never half written, and never ends a run itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from relicctl.cli import run as relicctl
from relicctl.errors import Diverged, Interrupted, RunFailed, Terminated
from relicctl.runs import status as module
from relicctl.runs.folder import RunFolder
from tests.helpers.configs import tiny_pretrain_yaml

TINY = tiny_pretrain_yaml()


class Batches:
    data_wait_seconds = 0.5

    def iter_from_step(self, step: int, stop: int) -> Iterator[int]:
        return iter(range(step, stop))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", overwrite=False, keep=2)


def read_status(run: RunFolder) -> dict[str, Any]:
    return json.loads((run.path / "status.json").read_text())


def save(run: RunFolder, step: int) -> None:
    run.save(step, {"x": torch.zeros(1)}, {})


# ---------------------------------------------------------------- what it shows


def test_status_follows_a_run_from_start_to_end(run: RunFolder) -> None:
    with run.track_status() as status:
        status.set_total(total=40, steps_per_epoch=10, resume="relicctl pretrain --resume run")
        first = read_status(run)
        assert (first["state"], first["step"], first["total"], first["last_checkpoint"]) == ("running", 0, 40, None)
        assert (first["pid"], first["resume"]) == (os.getpid(), "relicctl pretrain --resume run")
        assert datetime.fromisoformat(first["updated"]) >= datetime.fromisoformat(first["started"])
        run.write_metrics({"step": 5, "epoch": 0.5, "loss": 1.0, "eta_s": 7.0, "images_per_s": 80.0})
        assert {k: read_status(run)[k] for k in ("step", "epoch", "eta_s", "images_per_s")} == {
            "step": 5, "epoch": 0.5, "eta_s": 7.0, "images_per_s": 80.0,
        }  # fmt: skip
        save(run, 6)
        assert read_status(run)["last_checkpoint"].endswith("step-00000006.safetensors")
        assert (read_status(run)["last_checkpoint_step"], read_status(run)["step"]) == (6, 6)
        assert status.wrap_in_state("evaluating", lambda step: read_status(run)["state"])(7) == "evaluating"
        assert (read_status(run)["state"], read_status(run)["step"]) == ("running", 7)
        run.add_bad_image("a.jpg", "broken")
        run.write_metrics({"step": 40, "epoch": 4.0})
    last = read_status(run)
    assert (last["state"], last["step"], last["epoch"], last["images_skipped"]) == ("done", 40, 4.0, 1)
    assert last["error"] is None


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (Diverged("Not finite.", "Lower it."), "diverged", "Not finite. Lower it."),
        (RunFailed("It broke.", "Mend it."), "failed", "It broke. Mend it."),
        (ZeroDivisionError("by nought"), "failed", "Unexpected ZeroDivisionError: by nought. --debug"),
        (MemoryError("no room"), "failed", "Out of memory: no room. Lower optim.batch_size"),
        (Interrupted("Stopped by a signal.", "Resume."), "stopped", None),
    ],
)
def test_status_records_how_a_run_ends_and_raises_the_error(
    run: RunFolder, error: BaseException, state: str, said: str | None
) -> None:
    with pytest.raises(type(error)) as raised, run.track_status():
        raise error
    assert raised.value is error
    assert read_status(run)["state"] == state
    assert (read_status(run)["error"] or "").startswith(said or "")
    assert (read_status(run)["error"] is None) == (said is None)


@pytest.mark.parametrize(("signal_error", "code"), [(Terminated(), 143), (KeyboardInterrupt(), 130)])
def test_a_signal_outside_the_loop_says_what_is_saved(run: RunFolder, signal_error: BaseException, code: int) -> None:
    def stop(step: int) -> None:
        with run.track_status() as status:
            status.set_total(total=4, steps_per_epoch=1, resume="go on")
            run.write_metrics({"step": step})
            raise signal_error

    name = "SIGTERM" if code == 143 else "SIGINT"
    with pytest.raises(Interrupted) as early:
        stop(0)
    assert (early.value.what, early.value.code) == (f"{name} before the first step; nothing was lost.", code)
    assert "go on" in early.value.fix
    assert read_status(run)["state"] == "stopped"
    with pytest.raises(Interrupted, match="after step 4 of 4; everything is saved"):
        stop(4)


def test_resumed_run_starts_at_its_checkpoint(run: RunFolder) -> None:
    run.add_bad_image("a.jpg", "broken")
    save(run, 30)
    with run.track_status():
        now = read_status(run)
    assert (now["step"], now["last_checkpoint_step"], now["images_skipped"]) == (30, 30, 1)


# ---------------------------------------------------------------- when it is written


def test_heartbeat_is_written_every_half_minute(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    seen = []
    with run.track_status() as status:
        batches = module.HeartbeatBatches(Batches(), status)
        assert batches.data_wait_seconds == 0.5
        for batch in batches.iter_from_step(3, 203):
            seen.append(read_status(run)["step"])
            assert seen[-1] <= batch
            now[0] += 1.0
    assert sorted(set(seen)) == [3, *range(3 + 30, 203, 30)]


def test_readers_never_see_half_a_file(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with run.track_status():
        before = (run.path / "status.json").read_bytes()
        monkeypatch.setattr(module.os, "replace", failing(OSError(28, "No space left on device")))
        run.write_metrics({"step": 1})
        assert (run.path / "status.json").read_bytes() == before
    assert [path.name for path in run.path.glob(".status*")] == []


def test_full_disk_warns_once_and_training_continues(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with run.track_status():
        monkeypatch.setattr(module, "_replace_text", failing(OSError(28, "No space left on device")))
        for step in range(1, 4):
            run.write_metrics({"step": step})
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "status.json cannot be written (No space left on device); training continues" in said[0]


def failing(error: OSError) -> Callable[..., None]:
    def fail(*args: Any) -> None:
        raise error

    return fail


def test_only_the_writing_process_writes_status(tmp_path: Path) -> None:
    silent = RunFolder(tmp_path / "run", keep=2, writer=False)
    with silent.track_status() as status:
        status.set_total(total=1, steps_per_epoch=1, resume="")
    assert not (tmp_path / "run").exists()


def test_deleted_run_leaves_nothing(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        with run.track_status():
            run.delete()
            raise RunFailed("It broke.", "Mend it.")

    with pytest.raises(RunFailed):
        refuse()
    assert not run.path.exists()
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- the command


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_pretrain_writes_status(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert relicctl(["pretrain", "--config", str(tiny), "--out", str(out), "--quiet"]) == 0
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["step"], status["total"], status["epoch"]) == ("done", 16, 16, 2.0)
    assert status["last_checkpoint_step"] == 16
    assert status["images_per_s"] > 0


def test_pretrain_records_a_failure(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("relicctl.core.checkpoint.save_checkpoint", failing(OSError(28, "No space left on device")))
    assert relicctl(["pretrain", "--config", str(tiny), "--out", str(out), "--quiet"]) == 1
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 2)
    assert "could not be written" in status["error"]


# ---------------------------------------------------------------- signals before the first step

WAIT = """
import os, sys, time
from relicctl import cli
{before}
sys.argv[1:] = {arguments}
cli.main()
"""
# The command tells that it has begun, and waits for the signal there.
AT_IMPORT = """
import importlib.abc
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "relicctl.commands.pretrain":
            print("now", flush=True); time.sleep(2)  # a signal waits for the import
sys.meta_path.insert(0, Slow())
"""
AT_EVALUATION = """
import relicctl.evaluation.online as during
def slow(*args): print("now", flush=True); time.sleep(60)
during.OnlineEvaluator.__call__ = slow
"""


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [("import", signal.SIGTERM, 143), ("import", signal.SIGINT, 130), ("evaluation", signal.SIGTERM, 143)],
)
def test_signal_before_the_first_step_is_recorded(
    tiny: Path, tmp_path: Path, moment: str, number: int, code: int
) -> None:
    out = tmp_path / "run"
    arguments = ["pretrain", "--config", str(tiny), "--out", str(out), "--quiet"]
    script = WAIT.format(before={"import": AT_IMPORT, "evaluation": AT_EVALUATION}[moment], arguments=arguments)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    time.sleep(0.2)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    fix = "Start it again." if moment == "import" else f"Resume with: relicctl pretrain --resume {out}"
    name = signal.Signals(number).name
    assert stderr == f"stopped: {name} before the first step; nothing was lost.\n  {fix}\n"
    assert (stdout, process.returncode) == ("", code)
    if moment == "evaluation":
        assert json.loads((out / "status.json").read_text())["state"] == "stopped"


def test_child_processes_die_of_sigterm() -> None:
    """A forked worker that receives SIGTERM prints nothing."""
    script = """
import os, signal, time
from relicctl import cli
def work(arguments):
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(there, b".")
        time.sleep(60)
    os.read(here, 1)  # a signal during the fork would be lost
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return 0
cli.run = work
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr, done.returncode) == ("-15\n", "", 0)
