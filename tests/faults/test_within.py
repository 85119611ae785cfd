"""What breaks inside the process: numbers, memory, the streams that it speaks on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from relicctl.core import checkpoint
from tests.helpers.faults import assert_same_run, command, in_a_process, two_sentences

WAYS = ("optim.batch_size", "views.large", "runtime.activation_checkpointing")


def not_a_number_in_one_gradient() -> None:
    from relicctl.pretraining.task import PretrainTask

    genuine = PretrainTask.compute_loss

    def loss(self: PretrainTask, batch, step: int):
        if step == 4:
            weight = self.encoder.conv1.weight
            weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), float("nan")))
        return genuine(self, batch, step)

    PretrainTask.compute_loss = loss  # type: ignore[method-assign]


def test_one_nan_in_one_gradient_ends_the_run_with_exit_4(tiny, whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    ended = in_a_process(command(tiny, run), f"{__name__}.not_a_number_in_one_gradient", log)
    assert ended.code == 4
    assert two_sentences(ended.err)
    assert "not finite at step 4" in ended.err
    (kept,) = checkpoint.list_checkpoints(run / "checkpoints")
    assert kept.name in ended.err
    assert in_a_process(command(tiny, run)).code == 0
    assert_same_run(run, whole)


def the_same_signal_twice() -> None:
    from relicctl.pretraining.task import PretrainTask

    genuine = PretrainTask.after_step

    def after_step(self: PretrainTask, step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        genuine(self, step)

    PretrainTask.after_step = after_step  # type: ignore[method-assign]


@pytest.mark.parametrize(("launcher", "saved"), [({"TORCHELASTIC_RUN_ID": "x"}, [3, 5]), ({}, [3])])
def test_a_signal_sent_twice_under_torchrun_counts_once(tiny, tmp_path, launcher, saved):
    """A scheduler sends it to all processes, and torchrun hands it on; a person's second one means at once."""
    run = tmp_path / "run"
    fault = f"{__name__}.the_same_signal_twice"
    ended = in_a_process(command(tiny, run), fault, tmp_path / "log", **launcher)
    assert ended.code == 130
    assert [
        checkpoint.load_checkpoint(path)[1]["step"] for path in checkpoint.list_checkpoints(run / "checkpoints")
    ] == saved


def _no_memory(error: BaseException) -> None:
    from relicctl.pretraining.task import PretrainTask

    def loss(self, batch, step):
        raise error

    PretrainTask.compute_loss = loss  # type: ignore[method-assign]


def no_memory_on_the_device() -> None:
    _no_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ..."))


def no_memory_for_a_library() -> None:
    _no_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


def no_memory_on_the_host() -> None:
    _no_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"))


def no_memory_elsewhere() -> None:
    _no_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 123 bytes."))


def no_memory_for_python() -> None:
    _no_memory(MemoryError())


@pytest.mark.parametrize(
    "where",
    [
        no_memory_on_the_device,
        no_memory_for_a_library,
        no_memory_on_the_host,
        no_memory_elsewhere,
        no_memory_for_python,
    ],
    ids=lambda where: where.__name__,
)
def test_out_of_memory_names_what_to_change(tiny, tmp_path, where):
    ended = in_a_process(command(tiny, tmp_path / "run"), f"{__name__}.{where.__name__}", tmp_path / "log")
    assert ended.code == 1
    assert two_sentences(ended.err)
    assert "Out of memory" in ended.err
    assert all(way in ended.err for way in WAYS)


@pytest.mark.slow
@pytest.mark.parametrize(("redirection", "code"), [("<&- >&- 2>&-", 0), ("2> >(true)", 0), ("> >(true)", 1)])
def test_closed_or_broken_streams_do_not_harm_the_run(tiny, whole, tmp_path, redirection, code):
    """1 says that nobody got the result, the path; the run itself is whole."""
    run = tmp_path / "run"
    line = [part for part in command(tiny, run) if part != "--quiet"]
    shell = f'trap "" PIPE; exec "$@" {redirection}'
    done = subprocess.run(
        ["bash", "-c", shell, "-", sys.executable, "-m", "relicctl", *line], env=os.environ, check=False
    )
    assert done.returncode == code
    assert_same_run(run, whole)
