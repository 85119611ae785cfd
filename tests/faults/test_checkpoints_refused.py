"""Checkpoints that cannot be read, through the command: the one before is taken, and stays safe from then on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from relicctl.core import checkpoint
from tests.helpers.faults import assert_same_run, command, in_a_process, two_sentences


@pytest.fixture(scope="module")
def cut(tiny, tmp_path_factory) -> Path:
    """A run that was killed after step 6, with checkpoints of steps 3 and 6."""
    run = tmp_path_factory.mktemp("cut") / "run"
    assert in_a_process(command(tiny, run), f"{__name__}.after_step_6").code == 7
    assert [path.name for path in checkpoint.list_checkpoints(run / "checkpoints")] == list(
        map(checkpoint.format_checkpoint_name, (3, 6))
    )
    return run


def after_step_6() -> None:
    import os

    from relicctl.pretraining.task import PretrainTask

    genuine = PretrainTask.after_step
    PretrainTask.after_step = lambda self, step: os._exit(7) if step == 6 else genuine(self, step)  # type: ignore


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def with_a_flipped_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def of_a_newer_version(path: Path) -> None:
    tensors, _ = checkpoint.load_checkpoint(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"format_version": "99"}
    save_file(tensors, path, metadata)


def with_a_flipped_bit_in_its_step(path: Path) -> None:
    """Or a run would go on in silence at a step that is not its own."""
    data = path.read_bytes()
    path.write_bytes(data.replace(b'step\\": 6', b'step\\": 7', 1))
    assert path.read_bytes() != data


SPOILT = [truncated, emptied, with_a_flipped_bit, of_a_newer_version, with_a_flipped_bit_in_its_step]


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(tiny, whole, cut, tmp_path, spoil):
    run = tmp_path / "run"
    shutil.copytree(cut, run)
    spoil(run / "checkpoints" / checkpoint.format_checkpoint_name(6))
    ended = in_a_process(command(tiny, run), log=tmp_path / "log")
    assert ended.code == 0, ended.err
    assert "warning: " in ended.err
    assert checkpoint.format_checkpoint_name(6) in ended.err
    assert_same_run(run, whole)
    assert len(list((run / "checkpoints").glob("*.unreadable"))) == 1  # the user may want it: it is not deleted


def test_an_unreadable_checkpoint_never_displaces_a_readable_one(tiny, whole, cut, tmp_path):
    """With checkpoint.keep 1, a later step's broken file would make the run delete every new checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(cut, run)
    (run / "checkpoints" / checkpoint.format_checkpoint_name(6)).rename(
        run / "checkpoints" / checkpoint.format_checkpoint_name(7)
    )
    truncated(run / "checkpoints" / checkpoint.format_checkpoint_name(7))
    line = command(tiny, run, "--set", "checkpoint.keep=1", "--set", "checkpoint.every_steps=2")
    assert in_a_process(line, f"{__name__}.after_step_6").code == 7
    (newest,) = checkpoint.list_checkpoints(run / "checkpoints")
    assert checkpoint.load_checkpoint(newest)[1]["step"] == 6
    assert in_a_process(line).code == 0
    assert_same_run(run, whole)


def test_a_run_without_readable_checkpoints_does_not_restart_silently(tiny, cut, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(cut, run)
    for path in checkpoint.list_checkpoints(run / "checkpoints"):
        truncated(path)
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    ended = in_a_process(command(tiny, run), log=tmp_path / "log")
    assert ended.code == 2
    assert two_sentences(ended.err)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before


def test_file_times_do_not_matter(tiny, whole, cut, tmp_path):
    """The newest checkpoint is that of the latest step, whatever a clock that jumped back has stamped on it."""
    import os

    run = tmp_path / "run"
    shutil.copytree(cut, run)
    os.utime(run / "checkpoints" / checkpoint.format_checkpoint_name(3), (4e9, 4e9))
    os.utime(run / "checkpoints" / checkpoint.format_checkpoint_name(6), (0, 0))
    ended = in_a_process([part for part in command(tiny, run) if part != "--quiet"], log=tmp_path / "log")
    assert ended.code == 0
    assert "at step 6" in ended.err
    assert_same_run(run, whole)


def test_a_clock_that_jumps_back_changes_nothing(tiny, whole, tmp_path):
    run = tmp_path / "run"
    by_time = ("--set", "checkpoint.every_minutes=1")
    assert in_a_process(command(tiny, run, *by_time), f"{__name__}.clock_back", tmp_path / "log").code == 0
    assert_same_run(run, whole)
    assert all(x > 0 for x in eta(run))


def clock_back() -> None:
    """Each look at the wall clock shows an hour earlier than the one before."""
    import itertools
    import time

    hours = itertools.count()
    now = time.time()
    time.time = lambda: now - 3600 * next(hours)  # type: ignore[assignment]
    time.time_ns = lambda: int(time.time() * 1e9)  # type: ignore[assignment]


def eta(run: Path) -> list[float]:
    import json

    return [json.loads(line)["images_per_s"] for line in (run / "metrics.jsonl").read_text().splitlines()]
