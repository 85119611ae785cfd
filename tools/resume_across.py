"""Runs begun and files made by one source tree of relicctl, gone on with and read by another.

    python tools/resume_across.py --old TREE_A --new TREE_B --work DIR [--renamed FILE] [--only NAME ...]

Runs of TREE_A are killed by SIGKILL half-way and finished by TREE_B. They must end as a run of TREE_A alone that was
never killed, bit for bit, and what was finished before the kill must be left untouched. Then TREE_B does with the
files of TREE_A what TREE_A does with them, and must come to the same. What the clock decides is left out, as in
``tools/golden.py``. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golden_lib.cases import CPU, LABELLED, MASKS, TINY, sets
from golden_lib.compare import Finding, Verdict, compare_files, map_record
from golden_lib.inputs import SHAPES, make_inputs, write_config
from golden_lib.program import TIMEOUT, Program
from golden_lib.renames import Renames
from golden_lib.snapshot import take_snapshot
from golden_lib.warm import WarmPython

RUNTIME = {"device": "cpu", "workers": 0, "precision": "fp32", "log_every": 1}
OFTEN = {"every_steps": 1, "every_minutes": None}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": (
        "linear-eval",
        {
            "extends": "linear-imagenet",
            "sweep": {"rates": [0.3, 0.1]},
            "optim": {"epochs": 4, "batch_size": 16},
            "data": {"cache": "memory"},
            "checkpoint": OFTEN,
            "runtime": RUNTIME,
        },
    ),
    "transfer": (
        "transfer",
        {
            "protocol": ["knn", "logistic", "finetune"],
            "data": {"sets": {"photos": "data/sets"}, "cache": "memory"},
            "knn": {"ks": [3, 10]},
            "logistic": {"lambdas": [0.01, 1.0]},
            "finetune": {"rates": [0.02, 0.1], "steps": 6, "batch_size": 8},
            "checkpoint": OFTEN,
            "runtime": RUNTIME,
        },
    ),
    "segmentation": (
        "transfer --task segmentation",
        {
            "extends": "segmentation-quick",
            "data": {"sets": {"discs": "data/segmentation"}},
            "crop": {"size": 32},
            "optim": {"steps": 8, "batch_size": 4},
            "checkpoint": OFTEN,
            "runtime": RUNTIME,
        },
    ),
    "detection": (
        "transfer --task detection",
        {
            "extends": "detection-quick",
            "data": {"sets": {"discs": "data/voc"}},
            "images": {"short": [40], "long": 64},
            "head": {"regions": 16},
            "optim": {"steps": 8, "batch_size": 4, "warmup_steps": 1},
            "checkpoint": OFTEN,
            "runtime": RUNTIME,
        },
    ),
}


@dataclass(frozen=True)
class KilledRun:
    """A command that leaves a run, where to kill it, how to go on, and which parts are finished by then.

    ``kill_at``: patterns in the run's folder; the run is killed once each has as many matches as is said.
    """

    name: str
    line: str
    kill_at: dict[str, int]
    resume: str
    finished: tuple[str, ...] = ()
    delay: float = 0.0


@dataclass(frozen=True)
class Reading:
    """A command on files that the old tree made; both trees run it, and leave OUT. ``copied`` is a run it adds to."""

    name: str
    line: str
    copied: str | None = None
    same_as: str | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    fine: bool
    told: str


STEP = "checkpoints/step-{:08d}.safetensors"
MASKED = f"train-bgmask {MASKS} --eval-data shapes:train=48,val=12,size=32 {sets('optim.epochs=2')}"
PRETRAIN = f"pretrain {TINY} {sets('optim.epochs=4', 'checkpoint.every_steps=1')}"
ENCODER = "whole/pretrain"
BANK = sets("bgmask.probability=0.6")

KILLED = [
    KilledRun("pretrain", f"{PRETRAIN} {sets('loss.beta=1')}", {STEP.format(5): 1}, "pretrain --resume {out}"),
    KilledRun(
        "pretrain-host",
        f"{PRETRAIN} --data data/photos --val data/sets/val {sets('data.cache=none', 'optim.microbatch=8')}",
        {STEP.format(3): 1},
        "pretrain --resume {out}",
    ),
    KilledRun(
        "pretrain-byol", f"{PRETRAIN} {sets('objective=byol')} --resume", {STEP.format(4): 1}, "pretrain --resume {out}"
    ),
    KilledRun(
        "bgmask", MASKED, {STEP.format(4): 1}, "train-bgmask --resume {out}", ("priors*", "stages/*1.safetensors")
    ),
    KilledRun("bgmask-priors", MASKED, {"priors": 1}, "train-bgmask --resume {out}", delay=0.3),
    KilledRun("bgmask-masks", MASKED, {"masks.bank": 1}, "train-bgmask --resume {out}", ("priors*", "stages/*")),
    KilledRun(
        "linear-sweep",
        f"linear-eval {ENCODER} --config configs/linear.yaml",
        {f"sweep/{STEP.format(3)}": 1},
        "linear-eval --resume {out}",
    ),
    KilledRun(
        "linear-fit",
        f"linear-eval {ENCODER} --config configs/linear.yaml",
        {STEP.format(3): 1},
        "linear-eval --resume {out}",
        ("sweep/checkpoints/*",),
    ),
    KilledRun(
        "transfer",
        f"transfer {ENCODER} --baseline random --config configs/transfer.yaml",
        {"finetune/*/*/value.json": 4, "finetune/*/0.1-0/checkpoints/*2.safetensors": 1},
        "transfer --resume {out}",
        ("cells/*", "features/*", "finetune/*/*/value.json"),
    ),
    KilledRun(
        "segmentation",
        f"transfer {ENCODER} --baseline random --task segmentation --config configs/segmentation.yaml",
        {"cells/*": 1, f"segmentation/*/{STEP.format(3)}": 1},
        "transfer --task segmentation --resume {out}",
        ("cells/*",),
    ),
    KilledRun(
        "detection",
        f"transfer {ENCODER} --task detection --config configs/detection.yaml",
        {f"detection/*/{STEP.format(4)}": 1},
        "transfer --task detection --resume {out}",
    ),
]

READ = ("pretrain", "bgmask", "linear-fit", "transfer", "segmentation")  # of KILLED: whose files are read below
READINGS = [
    Reading("linear-eval of a run", f"linear-eval {ENCODER} {CPU} {sets('optim.epochs=2')} --out {{out}}"),
    Reading(
        "linear-eval of an encoder",
        f"linear-eval {ENCODER}/encoder.safetensors {CPU} {LABELLED} {sets('optim.epochs=2')} --out {{out}}",
    ),
    Reading(
        "linear-eval of a target",
        f"linear-eval {ENCODER} --network target {CPU} {sets('optim.epochs=2')} --out {{out}}",
    ),
    Reading(
        "export with a classifier",
        f"export {ENCODER} --classifier whole/linear-fit --format onnx --out {{out}}/encoder.onnx",
    ),
    Reading(
        "export of a checkpoint",
        f"export {ENCODER}/{STEP.format(12)} --network target --format relicctl --out {{out}}/encoder.safetensors",
    ),
    Reading("pretrain --bgmask RUN", f"pretrain {TINY} --bgmask whole/bgmask {BANK} --out {{out}}"),
    Reading("pretrain --bgmask BANK", f"pretrain {TINY} --bgmask whole/bgmask/masks.bank {BANK} --out {{out}}"),
    Reading("pretrain --init-from RUN", f"pretrain {TINY} --init-from {ENCODER} --out {{out}}"),
    Reading("pretrain --config", f"pretrain --config {ENCODER}/config.yaml --out {{out}}", same_as=ENCODER),
    Reading(
        "train-bgmask --config", "train-bgmask --config whole/bgmask/config.yaml --out {out}", same_as="whole/bgmask"
    ),
    Reading(
        "linear-eval --config",
        f"linear-eval {ENCODER} --config whole/linear-fit/config.yaml --out {{out}}",
        same_as="whole/linear-fit",
    ),
    Reading(
        "transfer --config",
        f"transfer {ENCODER} --baseline random --config whole/transfer/config.yaml --out {{out}}",
        same_as="whole/transfer",
    ),
    Reading(
        "segmentation --config",
        f"transfer {ENCODER} --baseline random --task segmentation --config whole/segmentation/config.yaml "
        "--out {out}",
        same_as="whole/segmentation",
    ),
    Reading(
        "a finished table again",
        "transfer --resume {out}",
        copied="whole/transfer",
        same_as="whole/transfer",
    ),
    Reading("more masks", "train-bgmask --resume {out} --masks-for data/alpha", copied="whole/bgmask"),
    Reading(
        "linear-eval, a further test",
        f"linear-eval --resume {{out}} --test more={SHAPES},backgrounds=swapped",
        copied="whole/linear-fit",
    ),
]


@dataclass(frozen=True)
class Tree:
    """A source tree's program. ``renames``: how it calls the keys of the lines above; none for the old one."""

    program: Program
    warm: WarmPython
    renames: Renames

    @classmethod
    def open(cls, path: Path, work: Path, renames: Renames) -> Tree:
        """Raises SystemExit where the package is not in ``path``."""
        program = Program(path.resolve(), work)
        program.check()
        return cls(program, WarmPython(work, program.make_environment()), renames)

    def run(self, line: str) -> str:
        """Run a command line to its end; what went wrong, or nothing."""
        ended = self.warm.run(self.translate(line), stdin="")
        return "" if ended.returncode == 0 else f"exit {ended.returncode}: {' '.join(ended.stderr.split())[-300:]}"

    def translate(self, line: str) -> list[str]:
        """The words of a line under this tree's keys."""
        return self.renames.translate_arguments(tuple(shlex.split(line)))


@dataclass(frozen=True)
class Trees:
    """Both trees, in one folder."""

    old: Tree
    new: Tree
    work: Path

    def snapshot(self, name: str) -> dict[str, Any]:
        """What lies in a folder of ``work``, whose own name is left out, under the new names of keys."""
        folder = self.work / name

        def normalise(text: str) -> str:
            return self.old.program.normalise(text).replace(name, "<OUT>")

        found = take_snapshot([folder], folder, normalise)
        return {path: map_record(record, self.new.renames) for path, record in found.items()}

    def compare(self, before: str, after: str) -> str:
        """How two folders differ, or nothing."""
        findings = compare_files(after, self.snapshot(before), self.snapshot(after), Renames())
        different = [finding for finding in findings if finding.verdict is Verdict.DIFFERENT]
        return "; ".join(summarise(finding) for finding in different[:6])


def summarise(finding: Finding) -> str:
    """A difference on part of a line."""
    return f"{finding.item.partition(': ')[2]} ({', '.join(finding.details[:2])[:150]})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="source tree that begins")
    parser.add_argument("--new", type=Path, required=True, help="source tree that goes on")
    parser.add_argument("--work", type=Path, required=True, help="new folder for what the runs leave")
    parser.add_argument("--renamed", type=Path, help="YAML of renamed keys; see tools/golden_lib/renames.py")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows whose names begin so")
    told = parser.parse_args()
    told.work.mkdir(parents=True)
    work = told.work.resolve()
    old, new = Tree.open(told.old, work, Renames()), Tree.open(told.new, work, Renames.load(told.renamed))
    trees = Trees(old, new, work)
    make_inputs(work, Renames())  # under the old keys, which the new tree must accept in files
    for name, (command, config) in CONFIGS.items():
        write_config(work / f"configs/{name}.yaml", command, config, Renames())
    rows = []
    cases: list[KilledRun | Reading] = [*KILLED, *READINGS]
    for case in cases:
        if told.only and not case.name.startswith(tuple(told.only)) and case.name not in READ:
            continue
        row = check_killed_run(trees, case) if isinstance(case, KilledRun) else check_reading(trees, case)
        rows.append(row)
        print(f"{'ok' if row.fine else 'DIFFERENT':<9}  {row.name:<30}  {row.told}", flush=True)
    for tree in (old, new):
        tree.warm.close()
    failed = sum(not row.fine for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} ok")
    raise SystemExit(bool(failed))


def check_killed_run(trees: Trees, case: KilledRun) -> Row:
    """Run the old tree to its end, and again until it is killed; the new tree finishes the second."""
    whole, cut = f"whole/{case.name}", f"cut/{case.name}"
    if problem := trees.old.run(f"{case.line} --out {whole}"):
        return Row(case.name, False, f"the old tree alone: {problem}")
    if problem := kill_half_way(trees, case, trees.work / cut):
        return Row(case.name, False, problem)
    before = stamp_files(trees.work / cut, case.finished)
    if problem := trees.new.run(case.resume.format(out=cut)):
        return Row(case.name, False, f"going on: {problem}")
    after = stamp_files(trees.work / cut, case.finished)
    redone = [path for path, stamp in before.items() if after.get(path) != stamp]
    if redone:
        return Row(case.name, False, f"done again: {', '.join(redone[:5])}")
    difference = trees.compare(whole, cut)
    return Row(case.name, not difference, difference or f"as if never killed; {len(before)} finished files untouched")


def kill_half_way(trees: Trees, case: KilledRun, run: Path) -> str:
    """Start the old tree and SIGKILL it at the place of the case; what went wrong, or nothing."""
    process = trees.old.program.start(trees.old.translate(f"{case.line} --out cut/{case.name}"))
    until = time.monotonic() + TIMEOUT
    while process.poll() is None and not has_reached(run, case.kill_at) and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(case.delay)
    process.kill()
    if process.wait() != -9:
        return f"it ended with {process.returncode} before it could be killed"
    return ""


def has_reached(run: Path, kill_at: dict[str, int]) -> bool:
    """Whether each pattern has as many matches in the run's folder as is said."""
    return all(len(list(run.glob(pattern))) >= count for pattern, count in kill_at.items())


def stamp_files(run: Path, patterns: tuple[str, ...]) -> dict[str, tuple[int, int, int]]:
    """Inode, time and size of the files that match, by their names in the run's folder."""
    paths = {path for pattern in patterns for path in run.glob(pattern)}
    stats = {path.relative_to(run).as_posix(): path.stat() for path in sorted(paths)}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def check_reading(trees: Trees, case: Reading) -> Row:
    """Both trees do the same with files of the old one."""
    slug = case.name.replace(" ", "-").replace(",", "")
    for name, tree in (("by-old", trees.old), ("by-new", trees.new)):
        out = f"{name}/{slug}"
        if case.same_as and tree is trees.old:
            continue
        (trees.work / out).parent.mkdir(exist_ok=True)
        if case.copied:
            shutil.copytree(trees.work / case.copied, trees.work / out)
        elif case.line.startswith("export"):
            (trees.work / out).mkdir()
        if problem := tree.run(case.line.format(out=out)):
            return Row(case.name, False, f"{name}: {problem}")
    before = case.same_as or f"by-old/{slug}"
    difference = trees.compare(before, f"by-new/{slug}")
    return Row(case.name, not difference, difference or f"as {before}")


if __name__ == "__main__":
    main()
