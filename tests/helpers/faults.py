"""Runs in processes that may be killed, and what is left of them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from relicctl.cli import run as relicctl
from relicctl.core import checkpoint
from tests.helpers.configs import tiny_pretrain_yaml

# A process that has imported torch and done nothing with it: forks of it start at once and may compute gradients.
NURSERY = multiprocessing.get_context("forkserver")
PRELOADED = ["relicctl.commands.pretrain", "relicctl.commands.export", "relicctl.runs.plots"]
assert all(map(importlib.util.find_spec, PRELOADED))  # the fork server swallows import errors
NURSERY.set_forkserver_preload(PRELOADED)

TINY = tiny_pretrain_yaml(
    views={"small": {"count": 0}},
    optim={"epochs": 1},
    data={"train": "shapes:size=16,train=64,val=8", "val": None},
    eval={"every_epochs": 0},
    runtime={"log_every": 1},
)
STEPS = 8
TIMINGS = {"images_per_s", "data_wait", "eta_s"}


def command(config: Path, out: Path, *more: str) -> list[str]:
    """One command line that starts the run in ``out`` and goes on with it."""
    return ["pretrain", "--config", str(config), "--out", str(out), "--resume", "--quiet", *more]


@dataclass(frozen=True)
class Ended:
    """``code``: exit code, or minus the number of the signal that killed the process; ``err``: what it said."""

    code: int
    err: str


def in_a_process(arguments: list[str], fault: str = "", log: Path = Path(os.devnull), **environ: str) -> Ended:
    """Run a command line in a process of its own, after calling ``fault``, given as ``module.function``."""
    process = NURSERY.Process(target=_work, args=(arguments, fault, str(log), environ))
    process.start()
    process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, log.read_text("utf-8"))


def _work(arguments: list[str], fault: str, log: str, environ: dict[str, str]) -> None:
    os.environ.update(environ)
    err = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(err, 1)
    os.dup2(err, 2)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as for everyone else
    try:
        torch.set_num_threads(1)
        from relicctl.commands import pretrain

        pretrain.plot_curves = lambda *_: None  # the picture takes longer than the run
        if fault:
            module, _, function = fault.rpartition(".")
            getattr(importlib.import_module(module), function)()
        code = relicctl(arguments)
    except BaseException:
        traceback.print_exc()
        code = 99
    os._exit(code)


def left_by(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], bytes]:
    """Everything a finished run ends with: its last checkpoint and encoder, metrics but for timings, results."""
    from safetensors.torch import load_file

    tensors, header = checkpoint.load_checkpoint(run / "checkpoints" / checkpoint.format_checkpoint_name(STEPS))
    assert header["step"] == STEPS
    tensors |= {f"encoder {name}": t for name, t in load_file(run / "encoder.safetensors").items()}
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    metrics = [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]
    return tensors, metrics, (run / "results.json").read_bytes()


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit; and nothing half written lies about."""
    (tensors, metrics, results), (others, other_metrics, other_results) = left_by(one), left_by(other)
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert metrics == other_metrics
    assert results == other_results
    assert [path.name for path in one.rglob("*.tmp")] == []


def two_sentences(text: str) -> bool:
    """Ends as every failure must: what is wrong and what to do, without a traceback."""
    lines = text.splitlines()
    return "Traceback" not in text and lines[-2].startswith("error: ") and lines[-1].startswith("  fix: ")
