"""The loop's own laws, on a task small enough to see through."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from relicctl.config.resolve import resolve_config
from relicctl.core.distributed import World
from relicctl.core.loop import LoopConfig, Task, TrainState, restore_state, snapshot_state, train
from relicctl.core.stop_signals import StopRequested, StopSignals
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.decoding import BadImages
from relicctl.data.loader import LoaderConfig, ViewLoader
from relicctl.data.photometric import AugmentConfig
from relicctl.data.sampler import Sampler
from relicctl.data.views import CropSpec, ViewSpec
from relicctl.errors import Diverged, Interrupted, UsageError
from relicctl.pretraining.task import PretrainTask, Schedule

CPU = torch.device("cpu")


class Batches:
    data_wait_seconds = 0.0

    def iter_from_step(self, step, stop):
        for number in range(step, stop):
            yield torch.randn(4, 3, generator=torch.Generator().manual_seed(number))


class Line(Task):
    """Fits a line; ``spoil`` may change the losses of a step."""

    def __init__(self, spoil=lambda step, loss: loss):
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.spoil = spoil

    def compute_loss(self, batch, step):
        loss = (self.model(batch) - batch.sum(1, keepdim=True)).square().mean()
        return {"loss": self.spoil(step, loss), "other": loss.detach() * 2}

    def get_learning_rate(self, step):
        return 0.1 / (step + 1)

    def compute_metrics(self, step):
        return {"ema": 0.5}


class Journal:
    def __init__(self):
        self.records, self.saved = [], {}

    def write_metrics(self, record):
        self.records.append({k: v for k, v in record.items() if k not in ("images_per_s", "data_wait", "eta_s")})

    def save(self, step, tensors, header):
        self.saved[step] = {name: t.clone() for name, t in tensors.items()}, dict(header)

    def get_last_checkpoint(self):
        return f"step {max(self.saved)}" if self.saved else None


def plan(total=20, **more):
    return LoopConfig(total, 10, 4, **{"log_every": 4, "checkpoint_every": 3, **more})


def run(task, journal, progress=None, **more):
    return train(task, Batches(), plan(**more), journal, state=progress or TrainState(), device=CPU)


def test_metrics_are_means_over_the_steps_since_the_last_line():
    every, fourth = Journal(), Journal()
    run(Line(), every, log_every=1)
    run(Line(), fourth, log_every=4)
    losses = [record["loss"] for record in every.records]
    for record in fourth.records:
        step = record["step"]
        assert record["loss"] == pytest.approx(sum(losses[step - 4 : step]) / 4, rel=1e-6)
        assert record["other"] == pytest.approx(2 * record["loss"], rel=1e-6)
        assert record["lr"] == 0.1 / step


@pytest.mark.parametrize("cut", range(3, 20, 3))
def test_resume_from_any_checkpoint_is_bitwise(cut):
    """Weights, momentum and metrics; the sums of a log line that the cut fell into as well."""
    whole = Journal()
    task = Line()
    run(task, whole)
    resumed, journal = Line(), Journal()
    tensors, header = whole.saved[cut]
    run(resumed, journal, restore_state(resumed, tensors, header, "here"))
    for a, b in zip(
        snapshot_state(task, TrainState())[0].values(), snapshot_state(resumed, TrainState())[0].values(), strict=True
    ):
        assert torch.equal(a, b)
    assert journal.records == [record for record in whole.records if record["step"] > cut]


def inf_gradient(step, loss):
    """A loss that is finite while its gradient is not: sqrt at 0."""
    return loss + (loss * 0).sqrt() if step == 7 else loss


@pytest.mark.parametrize(
    "spoil",
    [
        lambda step, loss: loss * float("nan") if step == 7 else loss,
        lambda step, loss: loss / 0 if step == 7 else loss,
        inf_gradient,
        # gradients of 1e30 are finite, though the sum of their squares is not
        lambda step, loss: loss * float("inf") if step == 7 else loss * 1e30 if step == 2 else loss,
    ],
    ids=["nan", "inf", "gradient only", "large but finite first"],
)
def test_the_first_step_that_is_not_finite_is_named_and_nothing_bad_is_saved(spoil):
    journal = Journal()
    task = Line(spoil)
    task.get_learning_rate = lambda step: 0.0 if step == 2 else 1e-3
    task.optimizer.param_groups[0]["momentum"] = 0.0
    with pytest.raises(Diverged) as error:
        run(task, journal)
    assert "at step 7." in error.value.what
    assert "step 6" in error.value.fix
    assert error.value.code == 4
    assert max(journal.saved) == 6
    assert all(t.isfinite().all() for t in journal.saved[6][0].values())


def test_a_checkpoint_of_other_networks_is_refused_before_anything_is_loaded():
    journal = Journal()
    run(Line(), journal)
    task = Line()
    task.model = nn.Linear(4, 1)
    before = task.model.weight.clone()
    with pytest.raises(UsageError, match="another architecture"):
        restore_state(task, *journal.saved[3], "here")
    assert torch.equal(task.model.weight, before)


def test_an_ordinary_step_reads_nothing_back_from_the_device(monkeypatch):
    """On a GPU each of these calls would make the host wait: they come with a log line, and not with steps."""
    asked: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "nonzero"):
        genuine = getattr(torch.Tensor, name)

        def spy(self, *args, _genuine=genuine, _name=name):
            asked.append(_name)
            return _genuine(self, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)

    class Listening(Journal):
        def write_metrics(self, record):
            asked.append("log line")

    before_the_log = []
    for steps in (1, 6):
        asked.clear()
        task, feed = tiny_pretraining()
        times = LoopConfig(total=7, steps_per_epoch=4, batch_size=8, log_every=steps)
        train(task, feed, times, Listening(), state=TrainState(), device=CPU)
        before_the_log.append(asked[: asked.index("log line")])
    assert "item" in before_the_log[0]  # the spies see what a log line reads
    assert before_the_log[0] == before_the_log[1]


def tiny_pretraining() -> tuple[PretrainTask, ViewLoader]:
    sets = ["model.arch=resnet18", "model.width=0.125", "model.stem=cifar", "optim.batch_size=8", "loss.negatives=3"]
    source = ShapesDataset.from_spec("shapes:size=16,train=32,val=8", "train")
    sampler = Sampler(0, len(source), 8)
    views = ViewSpec((CropSpec(2, 16, (0.2, 1.0)), CropSpec(1, 8, (0.1, 0.3))), (0.75, 1.33), AugmentConfig())
    feed = ViewLoader(
        source, sampler, views, LoaderConfig(0, CPU, cache="device"), BadImages(len(source), 0.1)
    )  # fmt: skip
    config = resolve_config(sets=sets).config
    task = PretrainTask(config, Schedule(config, 4, 99), classes=0, device=CPU, precision="bf16")
    return task, feed


def test_a_second_signal_ends_the_process_at_once():
    script = (
        "import os, signal\n"
        "from relicctl.core.stop_signals import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('one', signals.received, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('never', flush=True)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (130, "one 15\n")
    assert StopSignals().received is None


def test_a_scheduler_and_torchrun_may_both_send_sigterm():
    """Two at nearly the same time are one request: what the first asked to save must not be lost by the second."""
    script = (
        "import os, signal, time\n"
        "from relicctl.core.stop_signals import StopSignals\n"
        "now = [100.0]\n"
        "time.monotonic = lambda: now[0]\n"
        "with StopSignals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('one', signals.received, flush=True)\n"
        "    now[0] += StopSignals.REPEAT_SECONDS + 0.1\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('never', flush=True)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (143, "one 15\n")


class StoppedBatches(Batches):
    """Sends a signal while step ``stop_at`` waits for its batch, which never comes."""

    def __init__(self, stop_at):
        self.stop_at = stop_at

    def iter_from_step(self, step, stop):
        for number, batch in enumerate(super().iter_from_step(step, stop), step):
            if number == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1000)
            yield batch


@pytest.mark.parametrize("step", [0, 1, 7, 19])
def test_a_signal_while_waiting_for_data_saves_and_stops_at_once(step):
    whole, cut, rest = Journal(), Journal(), Journal()
    task, first, second = Line(), Line(), Line()
    run(task, whole)
    with pytest.raises(Interrupted, match=f"after step {step} of 20") as stopped:
        train(first, StoppedBatches(step), plan(), cut, state=TrainState(), device=CPU)
    assert stopped.value.code == 143
    run(second, rest, restore_state(second, *cut.saved[step], "here"))
    assert all(torch.equal(a, b) for a, b in zip(task.model.parameters(), second.model.parameters(), strict=True))
    assert cut.records + rest.records == whole.records


@pytest.mark.parametrize("step", [10, 20])
def test_an_evaluation_that_a_signal_ends_is_done_on_resume(step):
    """Also that of the last step: metrics, weights and the state that is saved are those of a run never stopped."""

    def evaluate(at):
        return {"knn": at / 100}

    def evaluate_until_stopped(at):
        if at == step:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1000)
        return evaluate(at)

    def go_on(task, journal, state, evaluate):
        config = plan(evaluate_every=5)
        return train(task, Batches(), config, journal, state=state, device=CPU, evaluate=evaluate)

    whole, cut, rest = Journal(), Journal(), Journal()
    task, first, second = Line(), Line(), Line()
    go_on(task, whole, TrainState(), evaluate)
    with pytest.raises(Interrupted, match=f"after step {step} of 20") as stopped:
        go_on(first, cut, TrainState(), evaluate_until_stopped)
    assert stopped.value.code == 130
    assert cut.saved[step][1]["evaluation_pending"]
    go_on(second, rest, restore_state(second, *cut.saved[step], "here"), evaluate)
    assert cut.records + rest.records == whole.records
    assert rest.saved[20][1] == whole.saved[20][1]
    for name, tensor in whole.saved[20][0].items():
        assert torch.equal(tensor, rest.saved[20][0][name]), name


def test_a_pending_evaluation_is_dropped_where_there_is_none_any_more():
    """Evaluation may be switched off on resume."""
    journal, task = Journal(), Line()
    run(task, journal, TrainState(step=0, evaluation_pending=True))
    assert "evaluation_pending" not in journal.saved[20][1]


@pytest.mark.parametrize("finite", [True, False])
def test_one_of_several_ranks_saves_after_a_grace_and_nothing_that_is_not_finite(finite, monkeypatch):
    monkeypatch.setattr("relicctl.core.loop.STOP_GRACE_SECONDS", 0.2)
    journal, task = Journal(), Line()
    if not finite:
        task.after_step = lambda step: task.model.weight.data.fill_(float("nan")) if step == 4 else None
    config = plan(log_every=100, checkpoint_every=None)
    with pytest.raises(Interrupted if finite else Diverged):
        train(task, StoppedBatches(5), config, journal, state=TrainState(), device=CPU, world=World(0, 2))
    assert list(journal.saved) == ([5] if finite else [])


def test_waiting_is_given_up_a_grace_after_the_signal():
    """What arrives within it is still used; a signal from before the block counts too."""
    with StopSignals() as signals:
        with signals.interruptible(grace_seconds=30):
            os.kill(os.getpid(), signal.SIGTERM)
            arrived = True
        assert arrived
        began = time.monotonic()
        with pytest.raises(StopRequested), signals.interruptible(grace_seconds=0.2):
            time.sleep(1000)
        assert time.monotonic() - began > 0.15
        with pytest.raises(StopRequested), signals.interruptible():
            raise AssertionError("never entered")
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
