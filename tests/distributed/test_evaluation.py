"""Laws of evaluations over processes: k are one; any of them may be stopped; another number goes on.

Exactly where every process computes what one would: frozen features, and classifiers trained on them. Where a batch
is split, sums in float32 are taken in another order: it costs the eighth digit at each step, of which tens of steps
leave five; an accuracy then moves by one image at most, one that lies on the boundary of two classes.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor

from relicctl.cli import run as relicctl
from relicctl.core.distributed import World, destroy_distributed, init_distributed
from relicctl.data.views import Batch
from relicctl.encoders.file import save_encoder
from relicctl.evaluation.finetune import FinetuneParams, FinetuneTask
from relicctl.evaluation.linear import LinearTask
from tests.helpers.ports import free_ports
from tests.helpers.runs import cpu_context, lively_encoder

SIZE = 2
TRAIN, VAL = 200, 140  # two chunks each: one for each process
DATA = f"shapes:size=16,train={TRAIN},val={VAL}"
CONFIG = """
runtime: {device: cpu, threads: 1, precision: fp32, workers: 0}
checkpoint: {every_steps: 3, every_minutes: null}
"""
LINEAR = ["linear-eval", "ENCODER", "--data", DATA, "--val", DATA, "--set", "optim.epochs=2"]
IMAGENET = [*LINEAR, "--set", "protocol=imagenet", "--set", "optim.batch_size=32", "--set", "sweep.lrs=[0.3,30]"]
TRANSFER = ["transfer", "ENCODER", "--data", f"x={DATA}", "--set", "logistic.l2=[0.1,1,10]"]
FINETUNE = ["--protocol=finetune", "--set", "finetune.lrs=[0.001,0.1]", "--set", "finetune.steps=5"]
WHOLE = {
    "fast": [*LINEAR, "--test", f"swapped={DATA},backgrounds=swapped"],
    "imagenet": IMAGENET,
    "frozen": [*TRANSFER, "--protocol=logistic", "--protocol=knn"],
    "finetune": [*TRANSFER, *FINETUNE],
}
REFUSED = {
    "uneven": [*IMAGENET, "--set", "optim.batch_size=15"],
    "uneven finetune": [*TRANSFER, *FINETUNE, "--set", "finetune.batch_size=15"],
    "occupied": ["linear-eval", "ENCODER", "--data", DATA, "--val", DATA],
}


def command(name: str, told: list[str], folder: Path) -> list[str]:
    arguments = [str(folder / "encoder.safetensors") if a == "ENCODER" else a for a in told]
    if "--resume" in told:
        return arguments
    return [*arguments, "--config", str(folder / f"{told[0]}.yaml"), "--out", str(folder / name), "--quiet"]


def prepare(folder: Path) -> None:
    for name in ("linear-eval", "transfer"):
        (folder / f"{name}.yaml").write_text(f"command: {name}\n{CONFIG}")
    metadata = {"size": "16", "crop_ratio": "1.0", "mean": "[0.485, 0.456, 0.406]", "std": "[0.229, 0.224, 0.225]"}
    save_encoder(folder / "encoder.safetensors", lively_encoder("resnet18", 0.125, "stride2"), metadata)
    (folder / "occupied").mkdir()
    (folder / "occupied" / "thing").write_text("")


# Fine-tuning by itself, in float64: there a batch split is a batch whole.


def tuned(world: World) -> dict[str, Tensor]:
    """All that the network holds after four steps on batches of which each process has its rows."""
    torch.set_default_dtype(torch.float64)
    params = FinetuneParams(0.1, 0.01, 0.9, 4, 400, False, 0)
    task = FinetuneTask(lively_encoder("resnet18", 0.125, "stride2"), 3, params, cpu_context(world))
    torch.set_default_dtype(torch.float32)
    first, last = world.get_local_rows(8)
    for step in range(4):
        views = torch.randn(1, 8, 3, 16, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        task.compute_loss(Batch([views[:, first:last]], torch.arange(first, last) % 3), step)["loss"].backward()
        task.optimizer.step()
        task.optimizer.zero_grad()
    return {name: tensor.contiguous() for name, tensor in task.model.state_dict().items()}


# The processes.


def work(rank: int, ports: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ["LOCAL_WORLD_SIZE"] = str(SIZE)

    def call(name: str, told: list[str]) -> None:
        os.environ["MASTER_PORT"] = str(ports.pop())
        with open(folder / f"{name}-{rank}.out", "w") as out, redirect_stdout(out):
            try:
                code = str(relicctl(command(name, told, folder)))
            except SystemExit as end:
                code = str(end.code)
        (folder / f"{name}-{rank}.code").write_text(code)

    for name, told in (WHOLE | REFUSED).items():
        call(name, told)
    call("resumed by two", ["linear-eval", "--resume", str(folder / "cut by one"), "--set", "optim.max_steps=null"])
    loss = LinearTask.compute_loss

    def killing(self, batch, step):
        if rank == 1 and step == 4 and len(self.model.rates) == 1:  # in the last training
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, batch, step)

    LinearTask.compute_loss = killing  # type: ignore[method-assign]
    call("cut by two", IMAGENET)
    os.environ["MASTER_PORT"] = str(ports.pop())
    save_file(tuned(init_distributed("cpu")), folder / f"tuned-{rank}.safetensors")
    destroy_distributed()


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    """Where two processes have done everything."""
    folder = tmp_path_factory.mktemp("several")
    prepare(folder)
    assert relicctl(command("cut by one", [*IMAGENET, "--set", "optim.max_steps=4"], folder)) == 0
    ports = free_ports(len(WHOLE | REFUSED) + 3)
    torch.multiprocessing.spawn(work, (ports, folder), nprocs=SIZE)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """Where one process has done the same."""
    folder = tmp_path_factory.mktemp("one")
    prepare(folder)
    for name, told in WHOLE.items():
        assert relicctl(command(name, told, folder)) == 0
    return folder


def results(folder: Path, name: str) -> dict:
    content = json.loads((folder / name / "results.json").read_text().replace(str(folder), ""))
    content.pop("seconds", None)
    return content


def codes(folder: Path, name: str) -> list[str]:
    return [(folder / f"{name}-{rank}.code").read_text() for rank in range(SIZE)]


def assert_nearly_the_same(folder: Path, name: str, one: Path) -> None:
    """A linear evaluation whose batches were split, against the one of a single process."""
    here, there = (load_file(f / "classifier.safetensors") for f in (folder / name, one / "imagenet"))
    for key in ("weight", "bias"):
        torch.testing.assert_close(here[key], there[key], rtol=1e-5, atol=1e-5 * there[key].abs().max().item())
    mine, whole = results(folder, name), results(one, "imagenet")
    for key in ("top1", "top5", "mean_per_class"):
        assert mine[key] == pytest.approx(whole[key], abs=1.01 * 10 / VAL if key == "mean_per_class" else 1.01 / VAL)
    for key in ("knn20", "knn200", "protocol", "encoder", "tests"):
        assert mine[key] == whole[key]  # features, and what was chosen


@pytest.mark.slow
class TestSeveralAreOne:
    def test_a_classifier_on_features_to_the_bit(self, several, one):
        assert results(several, "fast") == results(one, "fast")
        here, there = (load_file(f / "fast" / "classifier.safetensors") for f in (several, one))
        assert all(torch.equal(here[key], there[key]) for key in ("weight", "bias"))

    def test_a_classifier_on_random_crops(self, several, one):
        assert_nearly_the_same(several, "imagenet", one)

    def test_frozen_features_on_other_data_to_the_bit(self, several, one):
        assert results(several, "frozen") == results(one, "frozen")
        (here,), (there,) = ([*(f / "frozen" / "features").glob("*")][:1] for f in (several, one))
        here = several / "frozen" / "features" / there.name
        assert torch.equal(load_file(here)["features"], load_file(there)["features"])

    def test_fine_tuning(self, several, one):
        (mine,), (whole,) = results(several, "finetune")["cells"], results(one, "finetune")["cells"]
        assert mine["chosen"] == whole["chosen"]
        assert mine["value"] == pytest.approx(whole["value"], abs=1.01 / VAL)
        for here, there in zip(mine["tried"], whole["tried"], strict=True):
            assert here["value"] == pytest.approx(there["value"], abs=1.01 / whole["images"]["validation"])

    def test_fine_tuning_in_float64(self, several):
        whole = tuned(World())
        for rank in range(SIZE):
            mine = load_file(several / f"tuned-{rank}.safetensors")
            assert set(mine) == set(whole)
            for name, tensor in whole.items():
                torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.slow
def test_one_process_speaks_and_writes(several):
    for name in WHOLE:
        assert codes(several, name) == ["0", "0"]
        said = [(several / f"{name}-{rank}.out").read_text() for rank in range(SIZE)]
        assert said == [f"{several / name}\n", ""]
    steps = [json.loads(line)["step"] for line in (several / "imagenet" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_signal_at_one_process_stops_all_and_one_goes_on(several, one):
    assert codes(several, "cut by two") == ["143", "143"]
    assert not (several / "cut by two" / "results.json").exists()
    saved = sorted(p.name for p in (several / "cut by two" / "checkpoints").iterdir())
    assert saved[-1] in ("step-00000005.safetensors", "step-00000006.safetensors")  # all agree one step later
    assert relicctl(["linear-eval", "--resume", str(several / "cut by two"), "--quiet"]) == 0
    assert_nearly_the_same(several, "cut by two", one)


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began(several, one):
    assert codes(several, "resumed by two") == ["0", "0"]
    assert_nearly_the_same(several, "cut by one", one)


@pytest.mark.slow
def test_refusals_are_the_same_for_all_processes(several):
    for name in REFUSED:
        assert codes(several, name) == ["2", "2"]
    assert not (several / "uneven").exists()
    assert not (several / "uneven finetune").exists()
