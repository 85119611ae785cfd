"""Compare settings of `relicctl pretrain` over several seeds: many runs, one table with means and spreads.

    python benchmarks/study.py benchmarks/studies/demo.yaml --out runs/study-demo --jobs 2 --threads 1

A study is a YAML file:

    preset: demo
    arguments: [--data, photos.zip]        # of every run, as on the command line
    set: {optim.epochs: 10}                # keys of every run
    seeds: [0, 1, 2]
    linear_eval: true                      # evaluate every finished run by `relicctl linear-eval`; default false
    variants:                              # name of a row -> its keys; every row is compared with the first
      preset: {}
      beta 1: {loss.beta: 1}
    grid: {loss.temperature: [0.1, 0.2]}   # every combination is a further row

Interrupted runs are resumed and finished ones are left alone when the same command is given again. `table.md` and
`study.json` in the output folder are written anew after every run. A difference is the mean over seeds of (row -
first row at the same seed). It counts as one only from three common seeds on, and where it is larger than its own
spread (largest - smallest over the seeds); otherwise the table says "none".
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MIN_SEEDS = 3  # fewer say nothing about a difference
METRICS = ("knn20", "knn200", "probe_top1", "top1", "top5")
STUDY_KEYS = {"preset", "arguments", "set", "seeds", "linear_eval", "variants", "grid"}


@dataclass(frozen=True)
class Study:
    """What is compared; ``variants`` maps a row's name to its keys, the combinations of the grid among them."""

    preset: str
    variants: dict[str, dict[str, Any]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    arguments: list[str] = field(default_factory=list)
    linear_eval: bool = False


@dataclass(frozen=True)
class Run:
    """One training of a row with one seed, in its own folder."""

    variant: str
    seed: int
    folder: Path
    arguments: list[str]

    def train(self, linear_eval: bool) -> str | None:
        """Train, or finish what was begun, and evaluate. Return what failed, or None."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        note = self.folder.with_suffix(".json")
        if note.exists() and json.loads(note.read_text("utf-8"))["arguments"] != self.arguments:
            return f"{self.folder} was trained with other arguments: take another --out, or remove the folder"
        if not (self.folder / "results.json").exists():
            started, before = time.monotonic(), self.read_seconds()
            note.write_text(json.dumps({"arguments": self.arguments, "seconds": before}), "utf-8")
            resume = ["--resume"] if self.folder.exists() else []
            failed = call_relicctl(["pretrain", *self.arguments, "--out", str(self.folder), *resume])
            seconds = before + time.monotonic() - started
            note.write_text(json.dumps({"arguments": self.arguments, "seconds": seconds}), "utf-8")
            if failed:
                return failed
        evaluated = self.folder.with_name(self.folder.name + "-linear")
        if linear_eval and not (evaluated / "results.json").exists():
            resume = ["--resume"] if evaluated.exists() else []
            return call_relicctl(["linear-eval", str(self.folder), "--out", str(evaluated), *resume])
        return None

    def read_seconds(self) -> float:
        """Return the wall-clock time of all attempts at the training, in seconds."""
        note = self.folder.with_suffix(".json")
        return float(json.loads(note.read_text("utf-8"))["seconds"]) if note.exists() else 0.0

    def read_metrics(self) -> dict[str, float] | None:
        """Return the results of training and evaluation, linear-eval's over those of the run; None before the end."""
        found: dict[str, float] = {}
        for folder in (self.folder, self.folder.with_name(self.folder.name + "-linear")):
            if (folder / "results.json").exists():
                results = json.loads((folder / "results.json").read_text("utf-8"))
                found |= {name: float(results[name]) for name in METRICS if results.get(name) is not None}
        return found | {"minutes": self.read_seconds() / 60} if found else None


def call_relicctl(arguments: list[str]) -> str | None:
    """Run the program; return its last words on stderr if it failed, else None."""
    result = subprocess.run([sys.executable, "-m", "relicctl", *arguments, "--quiet"], capture_output=True, text=True)
    words = " ".join(result.stderr.split()[-60:])
    return f"`relicctl {' '.join(arguments)}` ended with {result.returncode}: {words}" if result.returncode else None


def read_study(path: Path) -> Study:
    """Read a study file. Exits with a message for unknown keys or when nothing is to be compared."""
    content = yaml.safe_load(path.read_text("utf-8"))
    if unknown := set(content) - STUDY_KEYS:
        sys.exit(
            f"{path} has the unknown keys {', '.join(sorted(unknown))}; known are {', '.join(sorted(STUDY_KEYS))}."
        )
    variants = dict(content.get("variants", {}))
    if grid := content.get("grid"):
        for values in itertools.product(*grid.values()):
            keys = dict(zip(grid, values, strict=True))
            variants[", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in keys.items())] = keys
    if not variants:
        sys.exit(f"{path} has neither variants nor a grid: there is nothing to compare.")
    common = content.get("set", {})
    return Study(
        preset=content["preset"],
        variants={name: common | (keys or {}) for name, keys in variants.items()},
        seeds=content.get("seeds", [0, 1, 2]),
        arguments=[str(argument) for argument in content.get("arguments", [])],
        linear_eval=content.get("linear_eval", False),
    )


def list_runs(study: Study, out: Path, threads: int | None) -> list[Run]:
    """Return the runs, seed by seed, so that every row has results early."""
    runs = []
    for seed, (variant, keys) in itertools.product(study.seeds, study.variants.items()):
        settings = keys | ({"runtime.threads": threads} if threads else {})
        sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        name = re.sub(r"[^\w.=-]+", "-", variant).strip("-")
        arguments = ["--preset", study.preset, *study.arguments, *sets, "--seed", str(seed)]
        runs.append(Run(variant, seed, out / name / f"seed-{seed}", arguments))
    folders = [run.folder for run in runs]
    if len(set(folders)) < len(folders):
        sys.exit("Two variants have names that are the same as folder names: rename one.")
    return runs


def describe_difference(row: dict[int, float], first: dict[int, float]) -> str:
    """Compare seed by seed: the mean difference and its values, "none" where it is within its own spread."""
    seeds = sorted(row.keys() & first.keys())
    differences = [row[seed] - first[seed] for seed in seeds]
    if len(seeds) < MIN_SEEDS:
        return f"{len(seeds)} seeds"
    mean, spread = statistics.mean(differences), max(differences) - min(differences)
    values = " ".join(f"{difference:+.3f}" for difference in differences)
    return f"{mean:+.3f} ({values})" if abs(mean) > spread else f"none ({values})"


def describe_values(values: dict[int, float]) -> str:
    """Return mean, and the values seed by seed."""
    if not values:
        return ""
    listed = " ".join(f"{values[seed]:.3f}" for seed in sorted(values))
    return f"{statistics.mean(values.values()):.3f} ({listed})"


def make_table(study: Study, runs: list[Run]) -> str:
    """Return the Markdown table: a row per variant, a column per metric, and the differences from the first row."""
    found = {(run.variant, run.seed): metrics for run in runs if (metrics := run.read_metrics())}
    names = [name for name in METRICS if any(name in metrics for metrics in found.values())]

    def collect(variant: str, metric: str) -> dict[int, float]:
        return {seed: m[metric] for (name, seed), m in found.items() if name == variant and metric in m}

    first = next(iter(study.variants))
    differences = [name for name in names if name in ("knn20", "probe_top1", "top1")]
    header = ["", "seeds", *names, *(f"{name}, difference" for name in differences), "minutes"]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for variant in study.variants:
        minutes = collect(variant, "minutes")
        cells = [variant, str(len(minutes)), *(describe_values(collect(variant, name)) for name in names)]
        for name in differences:
            cells.append("" if variant == first else describe_difference(collect(variant, name), collect(first, name)))
        lines.append(f"| {' | '.join([*cells, f'{statistics.mean(minutes.values()):.1f}' if minutes else ''])} |")
    return "\n".join(lines) + "\n"


def write_results(study: Study, runs: list[Run], out: Path, jobs: int, threads: int | None) -> None:
    """Write table.md, and study.json with every run's metrics, arguments, machine and versions."""
    import torch

    from relicctl.version import __version__

    (out / "table.md").write_text(make_table(study, runs), "utf-8")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    content = {
        "relicctl": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "device": device, "jobs": jobs, "threads": threads, "linear_eval": study.linear_eval,
        "runs": [
            {"variant": run.variant, "seed": run.seed, "arguments": run.arguments, **(run.read_metrics() or {})}
            for run in runs
        ],
    }  # fmt: skip
    (out / "study.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the study's YAML file")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and table")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side on the device")
    parser.add_argument("--threads", type=int, help="CPU threads of each run (runtime.threads)")
    options = parser.parse_args()

    study = read_study(options.study)
    runs = list_runs(study, options.out, options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    lock = threading.Lock()

    def work(run: Run) -> None:
        failed = run.train(study.linear_eval)
        if failed:
            failures.append(failed)
        with lock:
            print(f"{run.variant}, seed {run.seed}: {failed or run.read_metrics()}", file=sys.stderr, flush=True)
            write_results(study, runs, options.out, options.jobs, options.threads)

    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            list(pool.map(work, runs))
        except KeyboardInterrupt:  # the trainings got the signal too, and save what they have
            pool.shutdown(cancel_futures=True)
            sys.exit(130)
    print((options.out / "table.md").read_text("utf-8"), end="")
    sys.exit(f"{len(failures)} of {len(runs)} runs failed." if failures else 0)


if __name__ == "__main__":
    main()
