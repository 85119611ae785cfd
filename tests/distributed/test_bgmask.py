"""Laws of a training of masks over processes: k are one; any of them may be stopped; another number goes on.

Exactly where every process makes what one would: priors, labels made of them, and all figures of these. Where a batch
is split, sums in float32 are taken in another order. At first that costs the seventh digit of a loss. But AdamW makes
as much of a gradient that is nothing but rounding as of any other: after some steps there are three digits, and a mask
differs in pixels at the threshold. Masks are compared without the graph cut, which may move a whole border for that.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor

from relicctl.bgmask import prior_cache
from relicctl.bgmask.network import SaliencyNet
from relicctl.bgmask.training import MaskAugmentation, MaskBatch, MaskLoader, MaskTask, MaskTrainingSet, Stage
from relicctl.cli import run as relicctl
from relicctl.config.bgmask import MaskLossConfig, MaskOptimConfig
from relicctl.core.counter_rng import fork_seeded_rng
from relicctl.core.distributed import SINGLE_PROCESS, World, destroy_distributed, init_distributed
from relicctl.core.work_sharing import WorkResult, gather_in_order, shard
from relicctl.data.mask_bank import MaskBank
from relicctl.data.memmap_table import PAGE_SIZE
from relicctl.data.photometric import AugmentConfig
from relicctl.encoders.file import save_encoder
from relicctl.errors import DataError, Terminated
from tests.helpers.ports import free_ports
from tests.helpers.runs import lively_encoder

SIZE = 2
IMAGES = 12
CONFIG = """
command: train-bgmask
model: {arch: resnet, size: 32}
labels: {size: 32, drop_fraction: 0.0}
self_training: {rounds: 1, epochs: 1}
optim: {batch_size: 4, epochs: 2, warmup_epochs: 0.5}
data: {train: "shapes:size=32,train=12,val=6", eval: "shapes:size=32,train=12,val=6"}
predict: {batch_size: 2, refine: none}
checkpoint: {every_steps: 1, every_minutes: null}
runtime: {device: cpu, log_every: 1, precision: fp32, threads: 1, workers: 0}
"""
OTHERS = "shapes:size=32,train=7,val=4"
STEPS = 3 * 3
STOPPED_AT = 5  # in the final network's training


def command(name: str, folder: Path, *more: str) -> list[str]:
    out = ["--out", str(folder / name), "--init-from", str(folder / "encoder.safetensors"), "--quiet"]
    return ["train-bgmask", "--config", str(folder / "tiny.yaml"), *out, *more]


def prepare(folder: Path) -> None:
    (folder / "tiny.yaml").write_text(CONFIG)
    metadata = {"size": "32", "crop_ratio": "1.0", "mean": "[0.5, 0.5, 0.5]", "std": "[0.2, 0.2, 0.2]"}
    save_encoder(folder / "encoder.safetensors", lively_encoder("resnet18", 0.125, "stride2"), metadata)


# The training by itself, in float64: there a batch split is a batch whole.


def trained(world: World) -> dict[str, Tensor]:
    """Losses, the first gradients, and all that a network holds after three steps; weights are uneven over the rows."""
    torch.set_default_dtype(torch.float64)
    with fork_seeded_rng(1):
        net = SaliencyNet("resnet", 32, lively_encoder("resnet18", 0.125, "stride2"), hints=4)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1
    loss = MaskLossConfig(bce=1.0, iou=0.7, fbeta=0.5, fbeta_beta2=0.3)
    optim = MaskOptimConfig(base_lr=1e-3, weight_decay=0.01, warmup_epochs=0)
    stage = Stage(0, "final", epochs=5, first=0, last=5)
    task = MaskTask(net, loss, optim, stage, torch.autocast("cpu", torch.bfloat16, enabled=False), world)
    torch.set_default_dtype(torch.float32)
    first, last = world.get_local_rows(4)
    seen: dict[str, Tensor] = {}
    for step in range(3):
        drawn = torch.rand(4, 9, 32, 32, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        drawn[:2, 8] *= 0.1
        mine = drawn[first:last]
        losses = task.compute_loss(MaskBatch(mine[:, :7], mine[:, 7:8], mine[:, 8:]), step)
        losses["loss"].backward()
        seen |= {f"{name} {step}": value.detach().clone() for name, value in losses.items()}
        if step == 0:
            seen |= {f"gradient {n}": p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        task.optimizer.step()
        task.optimizer.zero_grad()
    return seen | {f"state {n}": t.contiguous() for n, t in task.model.state_dict().items()}


# Turns by themselves.


def turned(world: World, stop: dict[str, BaseException] | None = None) -> list[Any]:
    """What is taken of seven pieces; ``stop``: what a process runs into in ``making`` or ``taking`` the fourth."""
    taken: list[Any] = []

    def made(number: int) -> WorkResult:
        if stop and number == 3 and "making" in stop:
            raise stop["making"]
        return WorkResult((torch.arange(number), torch.full((number, 2), number % 2 == 0)), {"number": number})

    def take(piece: WorkResult) -> None:
        if stop and piece.meta["number"] == 3 and "taking" in stop:
            raise stop["taking"]
        taken.append([piece.meta["number"], *(tensor.tolist() for tensor in piece.tensors)])

    gather_in_order(world, 7, map(made, shard(world, range(7))), take)
    return taken


STOPS: dict[str, dict[str, BaseException]] = {
    "failed while making": {"making": DataError("The archive is gone.", "Bring it back.")},
    "failed while taking": {"taking": OSError(28, "No space left on device")},
    "interrupted": {"making": KeyboardInterrupt()},
    "terminated": {"making": Terminated()},
}


def ended(world: World, stop: dict[str, BaseException]) -> list[str]:
    """How the turns ended."""
    try:
        turned(world, stop)
    except BaseException as error:
        return [type(error).__name__, str(getattr(error, "code", None))]
    return ["done"]


# The processes.


def work(rank: int, ports: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ["LOCAL_WORLD_SIZE"] = str(SIZE)
    prior_cache.CHUNK_SIZE = 2

    def call(name: str, arguments: list[str]) -> None:
        os.environ["MASTER_PORT"] = str(ports.pop())
        with (
            open(folder / f"{name}-{rank}.out", "w") as out,
            open(folder / f"{name}-{rank}.err", "w") as err,
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            try:
                code = str(relicctl(arguments))
            except SystemExit as end:
                code = str(end.code)
        (folder / f"{name}-{rank}.code").write_text(code)

    right, calls = prior_cache.compute_prior_maps, [0]

    def stopping(*arguments: Any) -> np.ndarray:
        calls[0] += 1
        if rank == 1 and calls[0] == 3:  # in its second unit
            os.kill(os.getpid(), signal.SIGTERM)
        return right(*arguments)

    prior_cache.compute_prior_maps = stopping  # type: ignore[assignment]
    call("stopped", command("two", folder))
    prior_cache.compute_prior_maps = right
    if rank == 0:
        (folder / "stopped.priors").write_bytes((folder / "two" / "priors").read_bytes())
    call("two", ["train-bgmask", "--resume", str(folder / "two"), "--quiet"])
    call("uneven", command("uneven", folder, "--set", "optim.batch_size=3"))
    call("hinted", command("hinted", folder, "--set", "model.prior_channels=true", "--masks-for", OTHERS))

    loss = MaskTask.compute_loss

    def killing(self: MaskTask, batch: MaskBatch, step: int) -> dict[str, Tensor]:
        if rank == 1 and step == STOPPED_AT:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, batch, step)

    MaskTask.compute_loss = killing  # type: ignore[method-assign]
    call("cut", command("cut", folder))

    os.environ["MASTER_PORT"] = str(ports.pop())
    world = init_distributed("cpu")
    save_file(trained(world), folder / f"trained-{rank}.safetensors")
    turns = {"whole": turned(world)} | {name: ended(world, stop) for name, stop in STOPS.items()}
    (folder / f"turns-{rank}.json").write_text(json.dumps(turns))
    destroy_distributed()


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    """Where two processes have done everything."""
    folder = tmp_path_factory.mktemp("several")
    prepare(folder)
    torch.multiprocessing.spawn(work, (free_ports(6), folder), nprocs=SIZE)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    prepare(folder)
    assert relicctl(command("one", folder)) == 0
    return folder / "one"


def codes(folder: Path, name: str) -> list[str]:
    return [(folder / f"{name}-{rank}.code").read_text() for rank in range(SIZE)]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_nearly_the_same(run: Path, one: Path) -> None:
    """Another batch at any step would change the losses that follow, and the network, by far more."""
    mine, whole = metrics(run), metrics(one)
    assert [line["step"] for line in mine] == [line["step"] for line in whole] == list(range(1, STEPS + 1))
    for name in ("loss", "fused", "lr"):
        here, there = ([line[name] for line in lines] for lines in (mine, whole))
        np.testing.assert_allclose(here[:3], there[:3], rtol=1e-5)  # the round's
        np.testing.assert_allclose(here, there, rtol=1e-3)
    here, there = (load_file(folder / "saliency.safetensors") for folder in (run, one))
    assert here.keys() == there.keys()
    flat, others = (torch.cat([tensors[name].double().flatten() for name in there]) for tensors in (here, there))
    assert (flat - others).norm() < 1e-3 * others.norm()
    bank, expected = MaskBank.open(run), MaskBank.open(one)
    different = sum((bank.load_mask(row) != expected.load_mask(row)).sum() for row in range(IMAGES))
    assert different <= 1e-3 * IMAGES * bank.side**2


@pytest.mark.slow
class TestSeveralAreOne:
    def test_priors_and_first_labels_to_the_bit(self, several, one):
        run = several / "two"
        priors = sorted(path.name for path in one.glob("priors*"))
        assert len(priors) == 2  # of the images trained on, and of those measured on
        for name in priors:
            assert (run / name).read_bytes() == (one / name).read_bytes()
        here, there = (load_file(folder / "stages" / "labels.safetensors") for folder in (run, one))
        assert all(torch.equal(here[name], there[name]) for name in ("maps", "trust"))
        mine, whole = (json.loads((folder / "results.json").read_text()) for folder in (run, one))
        assert mine["stages"][:7] == whole["stages"][:7]  # to the fused labels
        assert [stage["name"] for stage in mine["stages"]] == [stage["name"] for stage in whole["stages"]]
        for name in ("prior_agreement", "invalid_priors", "images", "bad_images"):
            assert mine[name] == whole[name]

    def test_losses_networks_and_masks(self, several, one):
        assert_nearly_the_same(several / "two", one)

    def test_losses_gradients_and_weights_in_float64(self, several):
        whole = trained(World())
        for rank in range(SIZE):
            mine = load_file(several / f"trained-{rank}.safetensors")
            assert set(mine) == set(whole)
            for name, tensor in whole.items():
                torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=1e-9, msg=name)

    def test_work_results_come_in_order(self, several):
        turns = [json.loads((several / f"turns-{rank}.json").read_text()) for rank in range(SIZE)]
        assert turns[0]["whole"] == turned(World())
        assert turns[1]["whole"] == []


@pytest.mark.slow
def test_two_ranks_give_a_network_the_same_priors_as_one(several, tmp_path):
    """One process measures it, and makes its masks of images not trained on, once more."""
    assert codes(several, "hinted") == ["0", "0"]
    run = tmp_path / "again"
    shutil.copytree(several / "hinted", run)
    for name in ("masks.bank", "results.json"):
        (run / name).unlink()
    assert relicctl(["train-bgmask", "--resume", str(run), "--quiet"]) == 0
    for name in ("masks.bank", "results.json"):
        assert (run / name).read_bytes() == (several / "hinted" / name).read_bytes()


@pytest.mark.slow
def test_a_failure_or_a_signal_at_one_rank_ends_all(several):
    main, other = (json.loads((several / f"turns-{rank}.json").read_text()) for rank in range(SIZE))
    assert main["failed while making"] == ["RunFailed", "3"]
    assert other["failed while making"] == ["DataError", "3"]
    assert main["failed while taking"] == ["OSError", "None"]
    assert other["failed while taking"] == ["SystemExit", "1"]
    for turns in (main, other):
        assert turns["interrupted"] == ["KeyboardInterrupt", "None"]
        assert turns["terminated"] == ["Terminated", "143"]


@pytest.mark.slow
def test_only_the_main_rank_prints_and_writes(several):
    assert codes(several, "two") == ["0", "0"]
    said = [(several / f"two-{rank}.out").read_text() for rank in range(SIZE)]
    assert said == [f"{several / 'two'}\n", ""]


@pytest.mark.slow
def test_a_signal_at_one_rank_while_priors_are_computed_loses_nothing(several):
    """The main process had written the first unit of each when the other was stopped in its second."""
    assert codes(several, "stopped") == ["143", "143"]
    said, silence = ((several / f"stopped-{rank}.err").read_text() for rank in range(SIZE))
    assert f"relicctl train-bgmask --resume {several / 'two'}" in said
    assert silence == ""
    kept = (several / "stopped.priors").read_bytes()
    marks = kept[PAGE_SIZE : PAGE_SIZE + IMAGES]
    assert list(marks) == [prior_cache.DONE] * 4 + [prior_cache.TO_DO] * 8


@pytest.mark.slow
def test_a_signal_at_one_rank_stops_all_and_one_process_resumes(several, one):
    assert codes(several, "cut") == ["143", "143"]
    run = several / "cut"
    assert not (run / "results.json").exists()
    assert metrics(run)[-1]["step"] in (STOPPED_AT + 1, STOPPED_AT + 2)  # all agree one step later
    assert relicctl(["train-bgmask", "--resume", str(run), "--quiet"]) == 0
    assert_nearly_the_same(run, one)


@pytest.mark.slow
def test_a_batch_that_cannot_be_split_is_refused(several):
    assert codes(several, "uneven") == ["2", "2"]
    assert "cannot be split evenly over 2 processes" in (several / "uneven-0.err").read_text()
    assert not (several / "uneven").exists()


def test_ranks_take_the_rows_of_one_batch():
    """Crops and colours belong to the row in the global batch."""
    planes = torch.randint(0, 256, (9, 9, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = MaskTrainingSet(planes[:, :3], planes[:, 3:4], planes[:, 4:5], planes[:, 5:])
    views = MaskAugmentation(24, (0.3, 1.0), (0.75, 1.33), AugmentConfig())

    def batches(world: World = SINGLE_PROCESS) -> list[MaskBatch]:
        return list(MaskLoader(data, views, batch_size=4, seed=3, world=world).iter_from_step(0, 5))

    parts = [batches(World(rank, 2)) for rank in range(2)]
    for whole, *halves in zip(batches(), *parts, strict=True):
        for name in ("images", "labels", "weights"):
            joined = torch.cat([getattr(half, name) for half in halves])
            torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-5, atol=1e-5)
