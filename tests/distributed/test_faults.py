"""Signals and deaths among the processes that torchrun has started: saved once, told by exit codes, gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from relicctl.config.resolve import resolve_config
from relicctl.core import checkpoint
from relicctl.core.distributed import World
from relicctl.data.datasets.open import open_dataset
from relicctl.errors import DataError, UsageError
from relicctl.pretraining.data import check_batch_split, check_same_images
from tests.helpers.faults import STEPS, command, in_a_process

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="processes are found through /proc"),
]
LONG = ("--set", "optim.epochs=500", "--set", "checkpoint.every_steps=1000000")  # ends by a signal alone


@dataclass
class Group:
    """A torchrun of two processes, the run's folder, and what they say."""

    process: subprocess.Popen
    run: Path
    log: Path

    def ranks(self) -> dict[int, int]:
        """The process of each rank."""
        found = {}
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = environ.read_bytes().split(b"\0")
                parent = int(re.search(r"PPid:\s*(\d+)", (environ.parent / "status").read_text())[1])
            except OSError:  # it has ended, or is another user's
                continue
            for variable in variables:
                if parent == self.process.pid and variable.startswith(b"RANK="):
                    found[int(variable[5:])] = int(environ.parent.name)
        return found

    def wait_for_steps(self, count: int) -> None:
        """Until ``count`` more lines are logged."""
        metrics = self.run / "metrics.jsonl"
        lines = lambda: len(metrics.read_text().splitlines()) if metrics.exists() else 0  # noqa: E731
        until = lines() + count
        while lines() < until:
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """End torchrun and its workers, which have sessions of their own, without a word."""
        for pid in (self.process.pid, *self.ranks().values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> int:
        return self.process.wait(400)

    def steps_saved(self) -> list[int]:
        return [
            checkpoint.load_checkpoint(path)[1]["step"]
            for path in checkpoint.list_checkpoints(self.run / "checkpoints")
        ]


@pytest.fixture
def start(tiny, tmp_path):
    """Start a group; whatever is left of it is killed at the end."""
    groups: list[Group] = []

    def start(*more: str, restarts: int = 0) -> Group:
        run, log = tmp_path / "run", tmp_path / "log"
        launch = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            str(restarts),
        ]
        with open(log, "w") as out:
            process = subprocess.Popen(
                [sys.executable, *launch, "-m", "relicctl", *command(tiny, run, *more)],
                stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip
        groups.append(Group(process, run, log))
        return groups[-1]

    yield start
    for group in groups:
        if group.process.poll() is None:
            group.kill()


@pytest.mark.parametrize(("number", "rank", "code"), [(signal.SIGTERM, 1, 143), (signal.SIGINT, 0, 130)])
def test_a_signal_at_any_rank_saves_once_and_every_rank_ends_with_its_code(start, number, rank, code):
    group = start(*LONG)
    group.wait_for_steps(3)
    os.kill(group.ranks()[rank], number)
    assert group.wait() == 1  # torchrun's own, for any worker's failure
    said = group.log.read_text()
    assert re.findall(r"exitcode\s*: (\d+)", said)[-1] == str(code)  # the first rank that ended
    (step,) = group.steps_saved()
    # Whoever says it says the same; torchrun may cut the slower rank short.
    assert set(re.findall(r"stopped: SIG\w+ after step (\d+) of", said)) == {str(step)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_saves(start, number):
    """As by ^C in a terminal, and by a scheduler that wants its machines back."""
    group = start(*LONG)
    group.wait_for_steps(3)
    group.process.send_signal(number)
    assert group.wait() == 1
    (step,) = group.steps_saved()
    assert f"after step {step} of" in group.log.read_text()


def test_killed_at_two_processes_it_goes_on_at_one_and_back(start, tiny, tmp_path):
    """With the same batches: the weights after a further step are those of the other number, up to rounding."""
    gentle = ("--set", "optim.name=sgd", "--set", "optim.epochs=8", "--set", "checkpoint.keep=99")
    group = start(*gentle)
    group.wait_for_steps(4)
    group.kill()
    for path in group.run.glob("checkpoints/*"):
        if path.name != checkpoint.format_checkpoint_name(3):
            path.unlink()
    shutil.copytree(group.run, tmp_path / "one")
    one = in_a_process(command(tiny, tmp_path / "one", *gentle, "--set", "optim.max_steps=4"), log=tmp_path / "log-one")
    assert one.code == 0, one.err
    two = start(*gentle, "--set", "optim.max_steps=4")
    assert two.wait() == 0, two.log.read_text()
    assert_nearly_the_same(two.run, tmp_path / "one", 4)

    shutil.rmtree(two.run)
    shutil.copytree(tmp_path / "one", two.run)
    back = start(*gentle, "--set", "optim.max_steps=5")
    assert back.wait() == 0, back.log.read_text()
    assert in_a_process(command(tiny, tmp_path / "one", *gentle, "--set", "optim.max_steps=5")).code == 0
    assert_nearly_the_same(back.run, tmp_path / "one", 5)


def assert_nearly_the_same(one: Path, other: Path, step: int) -> None:
    """Another batch would change weights and momenta by much more than the rounding of sums in another order."""
    tensors, others = (
        checkpoint.load_checkpoint(run / "checkpoints" / checkpoint.format_checkpoint_name(step))[0]
        for run in (one, other)
    )
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        if name.startswith(("state.", "optim.")):
            difference = (tensor.double() - others[name].double()).norm()
            assert difference < 1e-3 * tensor.double().norm().clamp_min(1e-2), name


def test_a_worker_that_is_killed_is_started_again_and_goes_on(start, tmp_path):
    """By the same command line, which torchrun executes again; the end is that of a group never killed."""
    slow = ("--set", "optim.epochs=4")
    group = start(*slow, restarts=3)
    group.wait_for_steps(1)
    ranks = group.ranks()
    group.wait_for_steps(3)
    os.kill(ranks[1], signal.SIGKILL)
    assert group.wait() == 0, group.log.read_text()
    assert group.steps_saved()[-1] == 4 * STEPS
    killed, _ = checkpoint.load_checkpoint(checkpoint.list_checkpoints(group.run / "checkpoints")[-1])
    group.run.rename(tmp_path / "killed")
    whole = start(*slow)
    assert whole.wait() == 0
    expected, _ = checkpoint.load_checkpoint(checkpoint.list_checkpoints(whole.run / "checkpoints")[-1])
    assert [name for name in expected if not (expected[name] == killed[name]).all()] == []


def test_the_log_is_of_the_whole_batch(start, tiny, tmp_path):
    short = ("--set", "optim.name=sgd", "--set", "optim.max_steps=2")
    group = start(*short)
    assert group.wait() == 0, group.log.read_text()
    one = in_a_process(command(tiny, tmp_path / "one", *short), log=tmp_path / "log-one")
    assert one.code == 0, one.err
    of_two, of_one = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (group.run, tmp_path / "one")
    )
    assert len(of_two) == len(of_one) == 2
    for name in ("loss", "nll", "kl", "rankme", "embedding_std", "feature_std"):
        assert of_two[0][name] == pytest.approx(of_one[0][name], rel=1e-3), name


def test_bad_images_that_any_process_meets_are_listed(start, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(16):
        Image.new("RGB", (24, 24), (number, 9, 9)).save(photos / f"{number:02d}.png")
    for number in (2, 7, 11):
        (photos / f"{number:02d}.png").write_bytes(b"no picture")
    group = start("--data", str(photos), "--set", "data.max_corrupt_fraction=0.5", "--set", "data.cache=none")
    assert group.wait() == 0, group.log.read_text()
    listed = [line.split("\t")[0] for line in (group.run / "bad_images.txt").read_text().splitlines()]
    assert sorted(listed) == ["02.png", "07.png", "11.png"]
    assert json.loads((group.run / "results.json").read_text())["bad_images"] == 3


def test_processes_that_see_different_images_are_refused(tmp_path):
    one, other = (World(rank, 2) for rank in range(2))
    images = open_dataset("shapes:size=16,train=8,val=4")
    for world in (one, other):
        object.__setattr__(world, "all_gather_object", lambda mine: [mine, mine])
        check_same_images(images, world)
        object.__setattr__(world, "all_gather_object", lambda mine: [mine, "another"])
        with pytest.raises(DataError, match="different images"):
            check_same_images(images, world)


@pytest.mark.parametrize(("size", "microbatch", "fits"), [(1, 4, True), (2, 4, True), (2, 8, False)])
def test_a_share_is_made_of_whole_microbatches(size, microbatch, fits):
    config = resolve_config(sets=["optim.batch_size=8", f"optim.microbatch={microbatch}", "loss.negatives=4"]).config
    refused = contextlib.nullcontext() if fits else pytest.raises(UsageError, match="microbatch")
    with refused:
        check_batch_split(config, World(0, size))
