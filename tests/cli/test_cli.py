"""The command line: light help, exit codes, and what reaches stdout."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import relicctl
from relicctl import cli
from relicctl.config.base import RuntimeConfig
from relicctl.config.presets import list_presets, read_preset_header
from relicctl.config.resolve import ResolvedConfig, resolve_config
from relicctl.errors import DataError, Terminated
from relicctl.runs.distributed import open_distributed_session
from relicctl.runs.resume import TrainingOptions

Calls = list[tuple[ResolvedConfig, TrainingOptions]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """No command runs; the arguments that it would get are recorded."""
    recorded: Calls = []

    def record(resolved: ResolvedConfig, options: TrainingOptions) -> dict[str, Any]:
        recorded.append((resolved, options))
        return {"run": "runs/x", "knn20": 0.5}

    # The names are looked up in the real modules: one that was renamed is an error here.
    monkeypatch.setattr("relicctl.commands.pretrain.pretrain", record)
    monkeypatch.setattr("relicctl.commands.linear_eval.linear_eval", record)
    monkeypatch.setattr("relicctl.commands.transfer.transfer", record)
    monkeypatch.setattr("relicctl.commands.train_bgmask.train_bgmask", record)
    monkeypatch.setattr("relicctl.bgmask.dry_run.format_bgmask_dry_run", lambda *_: "plan")
    monkeypatch.setattr("relicctl.pretraining.estimate.format_pretrain_dry_run", lambda *_: "plan")
    return recorded


# ---------------------------------------------------------------- help


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["pretrain", "--help"],
        ["train-bgmask", "--help"],
        ["linear-eval", "--help"],
        ["transfer", "--help"],
        ["bench", "--help"],
        ["--version"],
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; from relicctl.cli import run; code = run({arguments}); "
        "heavy = {'torch', 'numpy', 'yaml', 'rich'} & set(sys.modules); "
        "print('HEAVY', sorted(heavy)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def find_examples(help_text: str) -> list[list[str]]:
    lines = re.findall(r"^ +(relicctl .*)$", help_text, re.M)
    found = [shlex.split(stage)[1:] for line in lines for stage in line.split(" | ")]
    assert found
    return found


@pytest.mark.parametrize("command", [[], ["pretrain"], ["train-bgmask"], ["linear-eval"], ["transfer"], ["presets"]])
def test_examples_in_help_parse(
    command: list[str],
    calls: Calls,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run([*command, "--help"]) == 0
    for example in find_examples(capsys.readouterr().out.partition("Examples:")[2]):
        monkeypatch.setattr("sys.stdin", io.StringIO("runs/x\n"))  # what stands before the pipe prints
        assert cli.run(example) == 0, example


@pytest.mark.parametrize("name", list_presets())
def test_the_command_in_a_preset_header_parses(name: str, calls: Calls) -> None:
    text = read_preset_header(name).replace("\\\n", " ")
    (command,) = re.findall(r"relicctl ((?:pretrain|train-bgmask|linear-eval|transfer) .*)", text)
    assert cli.run(shlex.split(command)) == 0
    assert calls[0][0].preset == name


def test_options_named_like_their_metavar_are_written_out() -> None:
    """typer 0.27 takes the metavar DATA of a parameter ``data`` for its name, and knows no ``--data`` then."""
    for module in ("pretrain", "linear_eval", "transfer", "train_bgmask", "bench", "doctor", "export"):
        command = getattr(importlib.import_module(f"relicctl.cli.{module}"), module)
        for name, hint in get_type_hints(command, include_extras=True).items():
            for option in getattr(hint, "__metadata__", ()):
                if getattr(option, "metavar", None) == name.upper():
                    assert option.default == f"--{name}", module


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"{relicctl.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["presets"]])
def test_no_command_prints_the_help_and_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Commands:" in said.err


# ---------------------------------------------------------------- options


def test_options_reach_the_command(calls: Calls) -> None:
    arguments = "--preset demo --set loss.beta=2 --set data.cache=none --data a=b --val c --seed 3 --workers 0"
    arguments += " --device cpu --out d --overwrite --init-from w --download --json --quiet"
    assert cli.run(["pretrain", *arguments.split()]) == 0
    ((resolved, options),) = calls
    config = resolved.config
    assert (config.loss.beta, config.data.cache, config.data.train, config.data.val) == (
        2,
        "none",
        "a=b",
        "c",
    )
    assert (config.seed, config.runtime.workers, config.runtime.device) == (3, 0, "cpu")
    assert options == TrainingOptions(
        out=Path("d"), overwrite=True, init_from="w", download=True, json=True, quiet=True
    )


@pytest.mark.parametrize(
    ("arguments", "resume"),
    [
        ([], None),
        (["--resume"], ""),
        (["--resume", "--quiet"], ""),
        (["--quiet", "--resume"], ""),
        (["--resume", "runs/a"], "runs/a"),
        (["--resume=runs/a"], "runs/a"),
        (["--resume", "runs/a", "--quiet"], "runs/a"),
    ],
)
def test_resume_takes_an_optional_run(arguments: list[str], resume: str | None, calls: Calls) -> None:
    assert cli.run(["pretrain", *arguments]) == 0
    assert calls[0][1].resume == resume


# ---------------------------------------------------------------- stdout


def test_stdout_is_the_path_of_the_run(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["pretrain"]) == 0
    assert capsys.readouterr().out == "runs/x\n"


def test_json_stdout_is_one_object(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["pretrain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": "runs/x", "knn20": 0.5}


def test_only_rank_0_prints(calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.run(["pretrain"]) == 0
    assert capsys.readouterr().out == ""


def test_broken_stdout_pipe_exits_quietly() -> None:
    """As in `relicctl presets ls | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "relicctl", "presets", "ls"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_under_stdout_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "relicctl", "presets", "ls"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 2


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrain", "--nope"], "--nope"),
        (["pretrain", "--workers", "x"], "--workers"),
        (["pretrain", "--preset"], "--preset"),
        (["pretrain", "stray"], "stray"),
        (["nothing"], "nothing"),
        (["presets", "show"], "NAME"),
        (["presets", "show", "dem"], "Did you mean demo"),
        (["pretrain", "--preset", "dem"], "Did you mean demo"),
        (["pretrain", "--set", "loss.bet=1"], "loss.beta"),
        (["pretrain", "--device", "tpu"], "auto, cpu or cuda"),
        (["pretrain", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_usage_is_two_sentences_and_exit_2(
    arguments: list[str], said: str, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    streams = capsys.readouterr()
    assert (streams.out, calls) == ("", [])
    what, fix = streams.err.splitlines()
    assert what.startswith("error: ")
    assert fix.startswith("  fix: ")
    assert said in streams.err


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError("No.", "Yes."), 3), (KeyboardInterrupt(), 130), (ZeroDivisionError("x"), 1)],
)
def test_failures_become_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr("relicctl.commands.pretrain.pretrain", fail)
    assert cli.run(["pretrain"]) == code
    assert "Traceback" not in capsys.readouterr().err
    assert cli.run(["pretrain", "--debug"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


# ---------------------------------------------------------------- dry runs

COMMANDS = [
    ["pretrain"], ["train-bgmask"], ["linear-eval"], ["transfer"], ["transfer", "--task", "segmentation"],
    ["transfer", "--task", "detection"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_keys_of_every_command_can_be_listed_without_data(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is what the message about an unknown key advises."""
    monkeypatch.chdir(tmp_path)
    assert cli.run([*command, "--set", "zzzz=1"]) == 2
    (advised,) = re.findall(r"`relicctl (.*)` lists all keys", capsys.readouterr().err)
    assert shlex.split(advised) == [*command, "--dry-run"]
    assert cli.run(shlex.split(advised)) == 0
    (tmp_path / "listed.yaml").write_text(capsys.readouterr().out)
    resolved = resolve_config(config_file=tmp_path / "listed.yaml")
    assert resolved.config == type(resolved.config)()
    assert len(set(resolved.origin.values())) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "--data", "WRONG"],
        ["pretrain", "--data", "shapes", "--data", "WRONG"],
        ["pretrain", "--preset", "demo", "--val", "WRONG"],
        ["pretrain", "--val", "WRONG"],
        ["pretrain", "--data", "torchvision:CIFAR10", "--val", "WRONG"],
        ["pretrain", "--bgmask", "WRONG"],
        ["pretrain", "--init-from", "WRONG"],
        ["train-bgmask", "--data", "WRONG"],
        ["train-bgmask", "--masks-for", "WRONG"],
        ["train-bgmask", "--eval-data", "WRONG"],
        ["linear-eval", "--data", "WRONG"],
        ["linear-eval", "--data", "shapes", "--val", "WRONG"],
        ["linear-eval", "--test", "x=WRONG"],
        ["linear-eval", "WRONG"],
        ["transfer", "--data", "x=WRONG"],
        ["transfer", "--data", "x={split}/WRONG"],
        ["transfer", "WRONG"],
        ["transfer", "--baseline", "WRONG"],
        ["transfer", "--task", "detection", "--data", "x=WRONG"],
    ],
    ids=" ".join,
)
def test_a_path_that_is_given_must_exist_in_a_dry_run_too(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run([*arguments, "--dry-run"]) in (2, 3)
    said = capsys.readouterr()
    assert said.out == ""
    assert "WRONG" in said.err.splitlines()[-2]
    assert said.err.splitlines()[-2].startswith("error: ")


@pytest.mark.parametrize("arguments", [["pretrain", "--preset", "cifar10-r18"], ["transfer", "--preset", "byol-suite"]])
def test_a_dry_run_needs_no_download(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run([*arguments, "--dry-run"]) == 0


# ---------------------------------------------------------------- several processes


def test_an_error_that_all_have_is_left_to_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others wait to be ended by their launcher; where they are not, nothing is lost."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    for rank, waited in (("0", 0), ("1", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        for arguments in (["pretrain", "--nope"], ["pretrain", "--preset", "dem"]):
            waits.clear()
            assert cli.run(arguments) == 2
            assert len(waits) == waited
            assert capsys.readouterr().err.startswith("error: ")


def test_a_signal_and_an_error_of_one_process_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_in_session(*_: object) -> None:
        with open_distributed_session(RuntimeConfig(device="cpu"), quiet=True):
            raise DataError("One rank sees nothing.", "Mount it.")

    def stop_before(*_: object) -> None:
        raise Terminated

    monkeypatch.setattr("relicctl.commands.pretrain.pretrain", fail_in_session)
    monkeypatch.setattr("relicctl.commands.train_bgmask.train_bgmask", stop_before)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.run(["pretrain"]) == 3
    assert cli.run(["train-bgmask"]) == 143
