"""SIGKILL at the worst moments: the same command line goes on, and ends with the bits of a run never killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from relicctl.core import checkpoint
from tests.helpers.faults import assert_same_run, command, in_a_process


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_step() -> None:
    from relicctl.pretraining.task import PretrainTask

    genuine = PretrainTask.after_step

    def after_step(self: PretrainTask, step: int) -> None:
        if step == 4:
            die()
        genuine(self, step)

    PretrainTask.after_step = after_step  # type: ignore[method-assign]


def before_the_first_checkpoint() -> None:
    from relicctl.pretraining.task import PretrainTask

    PretrainTask.after_step = lambda self, step: die()  # type: ignore[method-assign]


def in_half_a_checkpoint() -> None:
    genuine = checkpoint.save_tensors

    def save_tensors(path: Path, tensors: dict, metadata: dict) -> None:
        genuine(path, tensors, metadata)
        if checkpoint.format_checkpoint_name(6) in path.name:
            os.truncate(path, path.stat().st_size // 2)
            die()

    checkpoint.save_tensors = save_tensors


def _around_replace(name: str, *, after: bool) -> None:
    """Die before or after a temporary file takes its place as ``name``."""
    genuine = os.replace

    def replace(source: Any, target: Any) -> None:
        ours = Path(target).name == name
        if after or not ours:
            genuine(source, target)
        if ours:
            die()

    os.replace = replace  # type: ignore[assignment]


def before_the_rename() -> None:
    _around_replace(checkpoint.format_checkpoint_name(6), after=False)


def after_the_rename() -> None:
    _around_replace(checkpoint.format_checkpoint_name(6), after=True)


def before_there_is_a_config() -> None:
    _around_replace("config.yaml", after=False)


def before_the_results() -> None:
    _around_replace("results.json", after=False)


def in_half_a_line_of_metrics() -> None:
    import json

    from relicctl.runs import folder

    genuine = folder.RunFolder.write_metrics

    def metrics(self: folder.RunFolder, record: dict) -> None:
        if record["step"] == 5:
            with open(self.path / "metrics.jsonl", "a") as handle:
                handle.write(json.dumps(record)[:40])
            die()
        genuine(self, record)

    folder.RunFolder.write_metrics = metrics  # type: ignore[method-assign]


def while_old_checkpoints_go() -> None:
    checkpoint.prune_checkpoints = lambda folder, keep: die()  # type: ignore[assignment]


@pytest.mark.parametrize(
    "moment",
    [
        in_a_step, before_the_first_checkpoint, in_half_a_checkpoint, before_the_rename, after_the_rename,
        while_old_checkpoints_go, in_half_a_line_of_metrics, before_there_is_a_config, before_the_results,
    ],
    ids=lambda moment: moment.__name__,
)  # fmt: skip
def test_killed_and_resumed_is_never_killed(tiny, whole, tmp_path, moment):
    run = tmp_path / "run"
    killed = in_a_process(command(tiny, run), f"{__name__}.{moment.__name__}")
    assert killed.code == -signal.SIGKILL
    again = in_a_process(command(tiny, run), log=tmp_path / "log")
    assert again.code == 0, again.err
    assert_same_run(run, whole)


def test_a_run_killed_after_every_restart_still_finishes(tiny, whole, tmp_path):
    """Each life dies after its first checkpoint is in place: every kill costs that life's steps at most."""
    run = tmp_path / "run"
    while (ended := in_a_process(command(tiny, run), f"{__name__}.while_old_checkpoints_go")).code:
        assert ended.code == -signal.SIGKILL
        saved = len(list((run / "checkpoints").glob("step-*.safetensors")))
        assert saved <= 4
    assert_same_run(run, whole)


def test_one_command_line_starts_and_resumes_a_run(tiny, whole, tmp_path):
    """Also from given weights, which are the run's start and not that of its continuation."""
    run = tmp_path / "run"
    line = command(tiny, run, "--init-from", str(whole))
    assert in_a_process(line, f"{__name__}.in_a_step").code == -signal.SIGKILL
    assert in_a_process(line).code == 0
    assert in_a_process(line).code == 0  # there is nothing left to do
    other = in_a_process(command(tiny, run, "--init-from", str(whole / "encoder.safetensors")), log=tmp_path / "log")
    assert other.code == 2
    assert "cannot change in a resumed run" in other.err
    uncut = tmp_path / "uncut"
    assert in_a_process(command(tiny, uncut, "--init-from", str(whole))).code == 0
    assert_same_run(run, uncut)


def test_a_folder_that_is_no_run_is_never_resumed(tiny, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    assert in_a_process(command(tiny, precious)).code == 2
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]
