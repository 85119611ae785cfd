"""The study tool of benchmarks/: what it runs, what it resumes, and when it calls a difference one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from relicctl.config.resolve import resolve_config
from tests.helpers.scripts import BENCHMARKS, load_benchmark

STUDY = """
preset: demo
arguments: [--data, "shapes:train=64,val=32"]
set: {optim.epochs: 1}
seeds: [0, 1]
variants:
  preset:
  beta 1: {loss.beta: 1}
grid:
  loss.temperature: [0.1, 0.2]
  target.ema: [auto, 0.9]
"""


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_benchmark("study")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def test_a_grid_adds_every_combination_to_the_variants(study: ModuleType, file: Path) -> None:
    read = study.read_study(file)
    assert list(read.variants) == [
        "preset", "beta 1",
        "temperature 0.1, ema auto", "temperature 0.1, ema 0.9",
        "temperature 0.2, ema auto", "temperature 0.2, ema 0.9",
    ]  # fmt: skip
    assert read.variants["beta 1"] == {"optim.epochs": 1, "loss.beta": 1}


def test_runs_come_seed_by_seed_with_typed_settings(study: ModuleType, file: Path, tmp_path: Path) -> None:
    runs = study.list_runs(study.read_study(file), tmp_path / "out", threads=1)
    assert [run.seed for run in runs] == [0] * 6 + [1] * 6
    assert runs[2].arguments == [
        "--preset", "demo", "--data", "shapes:train=64,val=32", "--set", "optim.epochs=1",
        "--set", "loss.temperature=0.1", "--set", 'target.ema="auto"', "--set", "runtime.threads=1", "--seed", "0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((0.07, 0.08, 0.05), "+0.067 (+0.070 +0.080 +0.050)"),
        ((-0.07, -0.08, -0.05), "-0.067 (-0.070 -0.080 -0.050)"),
        ((0.08, -0.01, 0.02), "none (+0.080 -0.010 +0.020)"),
        ((0.07, 0.08), "2 seeds"),
    ],
)
def test_a_difference_takes_three_seeds_and_must_exceed_its_spread(
    study: ModuleType, differences: tuple[float, ...], verdict: str
) -> None:
    first = {seed: 0.5 + seed / 100 for seed in range(5)}  # more seeds than the other row has
    row = {seed: first[seed] + difference for seed, difference in enumerate(differences)}
    assert study.describe_difference(row, first) == verdict


def test_unknown_keys_and_empty_studies_are_refused(study: ModuleType, file: Path) -> None:
    file.write_text("preset: demo\nvariants: {a: {}}\nseed: [0]\n")
    with pytest.raises(SystemExit, match="unknown keys seed"):
        study.read_study(file)
    file.write_text("preset: demo\n")
    with pytest.raises(SystemExit, match="nothing to compare"):
        study.read_study(file)


def test_finished_runs_are_left_alone_and_interrupted_ones_resumed(
    study: ModuleType, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def succeed(arguments: list[str]) -> None:
        calls.append(arguments)
        folder = Path(arguments[arguments.index("--out") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"knn20": 0.6, "top1": None}))

    monkeypatch.setattr(study, "call_relicctl", succeed)
    whole = study.read_study(file)
    first, second, *_ = runs = study.list_runs(whole, tmp_path / "out", threads=None)
    second.folder.mkdir(parents=True)  # a run that was interrupted
    for run in (first, second, first, second):
        assert run.train(linear_eval=False) is None
    assert len(calls) == 2
    assert "--resume" not in calls[0]
    assert calls[1][-1] == "--resume"
    assert first.read_metrics()["knn20"] == 0.6
    assert "| preset | 1 | 0.600 (0.600) |" in study.make_table(whole, runs)

    changed = study.Run("preset", 0, first.folder, [*first.arguments, "--set", "loss.alpha=2"])
    assert "other arguments" in changed.train(linear_eval=False)


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("studies/*.yaml")), ids=lambda path: path.stem)
def test_the_studies_that_come_with_it_have_valid_settings(study: ModuleType, path: Path) -> None:
    read = study.read_study(path)
    for settings in read.variants.values():
        resolve_config(read.preset, sets=[f"{key}={json.dumps(value)}" for key, value in settings.items()])


@pytest.mark.slow
def test_a_study_of_two_small_runs(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = tmp_path / "tiny.yaml", tmp_path / "out"
    path.write_text(
        'preset: demo\narguments: [--data, "shapes:train=64,val=32", --val, "shapes:train=64,val=32", --workers, 0]\n'
        "set: {optim.max_steps: 2, target.ema: auto}\nseeds: [0]\nvariants: {one: {}, two: {loss.beta: 1}}\n"
    )
    monkeypatch.setattr(sys, "argv", ["study.py", str(path), "--out", str(out), "--jobs", "2", "--threads", "1"])
    with pytest.raises(SystemExit) as ended:
        study.main()
    assert ended.value.code == 0
    table = (out / "table.md").read_text()
    assert table.splitlines()[0].startswith("|  | seeds | knn20 | knn200 | probe_top1 |")
    runs = json.loads((out / "study.json").read_text())["runs"]
    assert [run["variant"] for run in runs] == ["one", "two"]
    assert all(0 <= run["knn20"] <= 1 for run in runs)
