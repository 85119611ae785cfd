"""Kill a run at random moments, go on by the same command line each time, and compare with a run never killed.

    python benchmarks/kills.py --kills 50 --out kills.json [-- more arguments of `relicctl pretrain`]

The run is the demo's, shortened, on the CPU. A life lasts as long as chance has it, so that SIGKILL falls into the
start-up, into steps, evaluations and checkpoints alike; on average a life gets through its share of the run.
Compared are all tensors of the last checkpoint and of the encoder, metrics.jsonl but for its timings, and
results.json byte by byte. A kill costs the steps since the last checkpoint, done again, and the start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from relicctl.core import checkpoint

FEW = "shapes:train=640,val=160"
SHORT = [
    f"data.train={FEW}", f"data.val={FEW}", "optim.epochs=20", "eval.every_epochs=5",
    "checkpoint.every_steps=10", "runtime.log_every=1", "runtime.device=cpu", "runtime.threads=1",
]  # fmt: skip
TIMINGS = {"images_per_s", "data_wait", "eta_s"}


@dataclass
class Run:
    """A run in ``folder``, started and gone on with by one command line."""

    folder: Path
    more: list[str]

    def start(self) -> subprocess.Popen:
        sets = [part for setting in SHORT for part in ("--set", setting)]
        command = [sys.executable, "-m", "relicctl", "pretrain", "--preset", "demo", *sets, "--quiet", *self.more]
        return subprocess.Popen([*command, "--out", str(self.folder), "--resume"], stdout=subprocess.DEVNULL)

    def finish(self) -> float:
        """Seconds to the end."""
        began = time.monotonic()
        if self.start().wait() != 0:
            sys.exit(f"the run in {self.folder} failed")
        return time.monotonic() - began

    def metrics(self) -> list[dict[str, Any]]:
        """All whole records, without timings."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
        return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]

    def step(self) -> int:
        """The last step that was logged."""
        return max((record["step"] for record in self.metrics()), default=0)

    def saved(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        found = checkpoint.list_checkpoints(self.folder / "checkpoints")
        return int(found[-1].stem.removeprefix("step-")) if found else 0

    def final(self) -> dict[str, torch.Tensor]:
        newest = checkpoint.list_checkpoints(self.folder / "checkpoints")[-1]
        encoder = load_file(self.folder / "encoder.safetensors")
        return checkpoint.load_checkpoint(newest)[0] | {f"encoder {name}": t for name, t in encoder.items()}


def first_new_step(run: Run, process: subprocess.Popen, saved: int) -> float | None:
    """Seconds until the run logs a step after ``saved``; None when it ends before."""
    began = time.monotonic()
    while process.poll() is None:
        if run.step() > saved:
            return time.monotonic() - began
        time.sleep(0.02)
    return None


def kill_often(run: Run, kills: int, total: int, step_s: float, startup_s: float) -> list[dict[str, float]]:
    """What every kill met: how long the process had lived, the steps done and lost."""
    chance, met = random.Random(0), []
    while len(met) < kills:
        share = 0.8 * (total - run.saved()) * step_s / (kills - len(met))
        lifetime = chance.uniform(0, 2 * (startup_s + share))
        began, process = time.monotonic(), run.start()
        try:
            process.wait(lifetime)
            break  # it was faster than thought
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        left = len(list((run.folder / "checkpoints").glob(".step-*.tmp")))
        met.append(
            {"lived_s": time.monotonic() - began, "step": run.step(), "saved": run.saved(), "half_written": left}
        )
        print(f"kill {len(met)}: {met[-1]}", file=sys.stderr, flush=True)
    return met


def same(one: Run, other: Run) -> dict[str, bool]:
    a, b = one.final(), other.final()
    results = [(run.folder / "results.json").read_bytes() for run in (one, other)]
    return {
        "tensors": a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a),
        "metrics": one.metrics() == other.metrics(),
        "results": results[0] == results[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("more", nargs="*", help="further arguments of relicctl pretrain")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Run(Path(place) / "whole", args.more), Run(Path(place) / "killed", args.more)
        began, process = time.monotonic(), whole.start()
        startup = first_new_step(whole, process, 0) or 0.0
        if process.wait() != 0:
            sys.exit("the run that is never killed failed")
        whole_s = time.monotonic() - began
        total = whole.step()
        step_s = (whole_s - startup) / total
        met = kill_often(killed, args.kills, total, step_s, startup)
        killed.finish()
        again = [kill["step"] - kill["saved"] for kill in met]
        summary = {
            "kills": len(met),
            "steps": total,
            "same": same(whole, killed),
            "before_the_first_step_of_a_life": sum(a["step"] == b["step"] for a, b in zip(met[1:], met, strict=False)),
            "during_a_checkpoint": sum(kill["half_written"] for kill in met),
            "steps_lost_mean_max": [round(statistics.mean(again), 2), max(again)],
            "step_s": round(step_s, 3),
            "startup_s": round(startup, 2),
            "lost_per_kill_s": round(statistics.mean(again) * step_s + startup, 2),
            "never_killed_s": round(whole_s, 1),
            "load": os.getloadavg()[0],
        }
        args.out.write_text(json.dumps({"summary": summary, "kills": met}, indent=1))
        print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
