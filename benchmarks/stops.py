"""Send SIGTERM at random moments to every command that trains or evaluates, resume it each time, compare the end.

    python benchmarks/stops.py --stops 50 --out stops.json [--command pretrain --command transfer]

Each command runs once undisturbed, then again in lives that end by SIGTERM, at moments drawn uniformly over start-up,
data, steps, evaluations and writing. Measured is the time from the signal to the end of the process; a life must end
with 143, or with 0 where it was done already, and the last one with the tensors and results of the undisturbed run.
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
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

DATA = "shapes:train=320,val=80"
CPU = ["--set", "runtime.device=cpu", "--set", "runtime.threads=1", "--workers", "1"]
TIMES = {"seconds", "minutes", "images_per_s", "data_wait", "eta_s", "run"}


def list_commands(place: Path) -> dict[str, list[str]]:
    """Return each command's arguments; the evaluations are of a short run in ``place``, trained here."""
    sets = ["optim.epochs=8", "eval.every_epochs=2", "checkpoint.every_steps=10", f"data.val={DATA}"]
    pretrain = ["pretrain", "--preset", "demo", "--data", DATA, *CPU, *(x for key in sets for x in ("--set", key))]
    encoder = place / "encoder"
    call([*pretrain, "--set", "optim.max_steps=20", "--out", str(encoder)]).check_returncode()
    masks = ["optim.epochs=1", "data.max_train_images=64", "data.max_eval_images=16"]
    return {
        "pretrain": pretrain,
        "train-bgmask": [
            "train-bgmask", "--preset", "demo-bgmask", "--data", DATA, "--eval-data", DATA, *CPU,
            *(x for key in masks for x in ("--set", key)),
        ],
        "linear-eval": [
            "linear-eval", str(encoder), "--preset", "linear-imagenet", *CPU, "--set", "optim.epochs=4",
            "--set", "optim.batch_size=64",
        ],
        "transfer": [
            "transfer", str(encoder), "--baseline", "random", "--data", f"shapes={DATA}", "--protocol", "logistic",
            "--protocol", "knn", "--labels", "all", "--labels", "0.1", *CPU,
        ],
    }  # fmt: skip


def call(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "relicctl", *arguments, "--quiet"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def stop_at_random(arguments: list[str], folder: Path, stops: int, whole_s: float) -> list[dict[str, Any]]:
    """Run ``arguments`` in lives ended by SIGTERM, from the start again whenever it is done; describe every life."""
    chance, lives = random.Random(0), []
    command = [sys.executable, "-m", "relicctl", *arguments, "--out", str(folder), "--quiet"]
    while len(lives) < stops:
        started = time.monotonic()
        resume = ["--resume"] if folder.exists() else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            process.wait(chance.uniform(0.2, whole_s * 0.6))
            signalled = None
        except subprocess.TimeoutExpired:
            signalled = time.monotonic()
            process.send_signal(signal.SIGTERM)
        words = process.communicate()[1]
        now = time.monotonic()
        if signalled is None and process.returncode == 0:
            subprocess.run(["rm", "-rf", str(folder)], check=True)  # done: start the next one
            continue
        life = {"lived_s": round(now - started, 2), "code": process.returncode, "words": words.strip()}
        life["seconds_to_end"] = round(now - signalled, 2) if signalled else None
        lives.append(life)
        print(f"{arguments[0]} {len(lives)}: {life}", file=sys.stderr, flush=True)
    return lives


def read_end(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the tensors of a finished folder, of checkpoints only the newest one's, and its results without times."""
    tensors, earlier = {}, sorted(folder.rglob("checkpoints/*.safetensors"))[:-1]
    for path in sorted(set(folder.rglob("*.safetensors")) - set(earlier)):
        tensors |= {f"{path.relative_to(folder)}:{name}": tensor for name, tensor in load_file(path).items()}
    return tensors, remove_times(json.loads((folder / "results.json").read_text("utf-8")), str(folder))


def remove_times(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {key: remove_times(part, folder) for key, part in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [remove_times(part, folder) for part in value]
    return value.replace(folder, "RUN") if isinstance(value, str) else value


def is_same(one: Path, other: Path) -> bool:
    (a, results), (b, other_results) = read_end(one), read_end(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) and results == other_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--command", action="append", help="one of the four; repeatable (default: all)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    report: dict[str, Any] = {"load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in list_commands(Path(folder)).items():
            if options.command and name not in options.command:
                continue
            whole, stopped = Path(folder) / f"{name}-whole", Path(folder) / f"{name}-stopped"
            started = time.monotonic()
            call([*arguments, "--out", str(whole)]).check_returncode()
            whole_s = time.monotonic() - started
            lives = stop_at_random(arguments, stopped, options.stops, whole_s)
            call([*arguments, "--out", str(stopped), *(["--resume"] if stopped.exists() else [])]).check_returncode()
            waits = [life["seconds_to_end"] for life in lives if life["seconds_to_end"] is not None]
            report[name] = {
                "stops": len(lives),
                "codes": {
                    str(code): sum(life["code"] == code for life in lives) for code in {x["code"] for x in lives}
                },
                "seconds_to_end_median_max": [round(statistics.median(waits), 2), max(waits)],
                "same_end": is_same(whole, stopped),
                "whole_s": round(whole_s, 1),
                "lives": lives,
            }
            options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps({name: {k: v for k, v in part.items() if k != "lives"} if isinstance(part, dict) else part
                      for name, part in report.items()}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
