"""The doctor: each check passes on a sound machine, fails on the trouble it is for, and says what to do."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from relicctl.benchmark.data_pipeline import GeneratedPhotos
from relicctl.cli import run as relicctl
from relicctl.config.pretrain import PretrainConfig
from relicctl.config.resolve import resolve_config
from relicctl.data.datasets.open import open_dataset
from relicctl.doctor import environment, smoke_tests
from relicctl.doctor.environment import CheckResult, fail, ok, run_check, warn
from relicctl.errors import UsageError
from relicctl.pretraining.estimate import compute_checkpoint_bytes, estimate_step_memory, outline_networks
from relicctl.pretraining.task import PretrainTask, resolve_precision

CPU = torch.device("cpu")
SMALL = ("model.arch=resnet18", "model.width=0.125", "views.large.size=32", "views.small.size=16")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def config() -> PretrainConfig:
    return resolve_config(sets=SMALL, schema=PretrainConfig).config


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """No check does anything, and all is well."""
    for module, names in (
        (environment, "python versions cuda nccl bf16 cores disk shared_memory preset_memory open_files"),
        (smoke_tests, "decoders loader overfit processes run_folder"),
    ):
        for name in names.split():
            monkeypatch.setattr(module, f"check_{name}", lambda *args, **more: ok("well"))


# ---------------------------------------------------------------- the command


def test_a_sound_machine(sound: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert relicctl(["doctor"]) == 0
    said = capsys.readouterr()
    assert said.out == "ok\n"
    assert len(said.err.splitlines()) == 1 + 15


def test_a_warning_is_no_failure(
    sound: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "check_open_files", lambda: warn("few files.", "ulimit -n 65536."))
    assert relicctl(["doctor"]) == 0
    said = capsys.readouterr()
    assert said.out == "ok\n"
    assert "files: ulimit -n 65536." in said.err


def test_what_fails_is_named(sound: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> CheckResult:
        raise UsageError("It is broken.", "Mend it.")

    monkeypatch.setattr(smoke_tests, "check_decoders", broken)
    monkeypatch.setattr(environment, "check_disk", lambda *args: fail("full.", "Make room."))
    assert relicctl(["doctor"]) == 1
    said = capsys.readouterr()
    assert said.out == "disk decoders\n"
    assert "decoders: Mend it." in said.err
    assert relicctl(["doctor", "--json", "--quiet"]) == 1
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert (said.err, result["ok"], result["failed"], result["warned"]) == ("", False, ["disk", "decoders"], [])
    assert {"name": "decoders", "state": "fail", "found": "It is broken.", "fix": "Mend it."} in result["checks"]


def test_help_is_light_and_its_examples_run(
    sound: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; from relicctl.cli import run; run(['doctor', '--help']); "
        "sys.exit(bool({'torch', 'numpy', 'yaml', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    examples = [line.split()[1:] for line in done.stdout.splitlines() if line.strip().startswith("relicctl doctor")]
    assert len(examples) == 3
    monkeypatch.setattr("relicctl.commands.doctor.open_dataset", lambda spec, **more: None)
    monkeypatch.setattr("relicctl.commands.doctor.open_joined_dataset", lambda specs, **more: None)
    for example in examples:
        assert relicctl(example) == 0, example


def test_an_error_nobody_expected_is_a_failure() -> None:
    def broken() -> CheckResult:
        return [ok("well")][1]

    assert run_check(broken).state == "fail"
    assert "IndexError" in run_check(broken).message


# ---------------------------------------------------------------- the machine


def test_this_machine_runs_its_own_tests() -> None:
    assert environment.check_versions().state == "ok"
    assert environment.check_bf16(CPU, "auto").state == "ok"
    assert environment.check_python().state == "ok"


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.torch, "__version__", "2.10.1+cpu")
    found = environment.check_versions()
    assert (found.state, "torch>=2.11" in found.fix) == ("fail", True)


@pytest.mark.parametrize(
    ("built", "driver", "wanted", "state"),
    [
        (None, "", "auto", "ok"),
        ("13.0", "", "auto", "ok"),
        (None, "580.1", "auto", "warn"),  # a GPU that this torch leaves idle
        ("13.0", "470.1", "cpu", "warn"),
        ("13.0", "470.1", "cuda", "fail"),
        ("13.0", "", "cuda", "fail"),
    ],
)
def test_unused_gpu_is_reported(
    monkeypatch: pytest.MonkeyPatch, built: str | None, driver: str, wanted: str, state: str
) -> None:
    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(environment.torch.version, "cuda", built)
    monkeypatch.setattr(environment, "_read_driver_version", lambda: driver)
    found = environment.check_cuda(wanted)
    assert found.state == state
    assert bool(found.fix) == (state != "ok")


def test_wrong_bf16_fails_where_it_would_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "measure_bf16_error", lambda device: math.inf)
    assert environment.check_bf16(CPU, "bf16").state == "fail"
    assert environment.check_bf16(CPU, "fp32").state == "warn"


def test_a_nan_in_bf16_is_an_error_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.functional.linear

    def spoilt(x: torch.Tensor, *more: Any) -> torch.Tensor:
        return linear(x, *more) * (torch.nan if torch.is_autocast_enabled("cpu") else 1.0)

    monkeypatch.setattr(torch.nn.functional, "linear", spoilt)
    assert environment.measure_bf16_error(CPU) > 1e30


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8.0),
        ({"cpu.max": "max 100000\n"}, 8.0),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "1600000 100000\n"}, 8.0),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8.0),
    ],
)
def test_cores_are_those_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: float
) -> None:
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert environment.count_usable_cores(tmp_path) == cores


@pytest.mark.parametrize(("threads", "load", "state"), [(2, 0.5, "ok"), (8, 0.5, "warn"), (2, 9.0, "warn")])
def test_more_threads_or_load_than_cores(
    monkeypatch: pytest.MonkeyPatch, threads: int, load: float, state: str
) -> None:
    monkeypatch.setattr(environment, "count_usable_cores", lambda: 2.0)
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(environment.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (load, load, load))
    assert environment.check_cores().state == state


def test_the_disk_must_hold_the_checkpoints(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = compute_checkpoint_bytes(config, outline_networks(config))
    for free, state in ((need - 1, "fail"), (2 * need, "warn"), (3 * need, "ok")):
        monkeypatch.setattr(environment.shutil, "disk_usage", lambda path, free=free: Usage(0, 0, free))
        assert environment.check_disk(tmp_path, config).state == state


def test_checkpoints_are_as_large_as_foreseen(config: PretrainConfig, tmp_path: Path) -> None:
    from relicctl.core.loop import TrainState, snapshot_state
    from relicctl.pretraining.task import PretrainTask, Schedule

    task = PretrainTask(config, Schedule(config, 1, 1), classes=1, device=CPU, precision="fp32")
    tensors, _ = snapshot_state(task, TrainState())
    size = sum(4 * t.numel() for t in tensors.values())  # the norms' counters of steps are int64, the rest float32
    momentum = 4 * sum(p.numel() for p in task.model.online.parameters())  # allocated by the first step
    need = compute_checkpoint_bytes(config, outline_networks(config))
    assert need == (config.checkpoint.keep + 1) * (size + momentum)


def test_shared_memory_must_hold_what_workers_make(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_image = 3 * (4 * 32**2 + 2 * 16**2)
    assert environment.compute_prefetch_bytes(config, 3) == 3 * 4 * 64 * per_image
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: Usage(0, 0, 64 << 20))
    assert environment.check_shared_memory(config, 2, tmp_path).state == "ok"
    found = environment.check_shared_memory(config, 100, tmp_path)
    assert found.state == "fail"
    assert "--shm-size" in found.fix
    assert environment.check_shared_memory(config, 2, tmp_path / "none").state == "warn"


@pytest.mark.parametrize(
    ("limit", "state"), [((256, 4096), "warn"), ((20000, 20000), "ok"), ((resource.RLIM_INFINITY,) * 2, "ok")]
)
def test_few_open_files_are_reported(monkeypatch: pytest.MonkeyPatch, limit: tuple[int, int], state: str) -> None:
    monkeypatch.setattr(environment.resource, "getrlimit", lambda which: limit)
    found = environment.check_open_files()
    assert found.state == state
    assert ("ulimit -n 4096" in found.fix) == (state == "warn")


# ---------------------------------------------------------------- the trials


def test_photos_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert smoke_tests.check_decoders().state == "ok"
    decode = smoke_tests.decode_rgb
    monkeypatch.setattr(smoke_tests, "decode_rgb", lambda data: decode(data)[..., ::-1])  # blue and red swapped
    assert smoke_tests.check_decoders().state == "fail"


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds spent waiting, as this machine is not to be asked how busy it is."""
    seconds = [0.0]
    monkeypatch.setattr(smoke_tests, "measure_blocked_seconds", lambda: seconds[0])
    return seconds


@pytest.mark.usefixtures("waited")
def test_the_loader_is_timed(config: PretrainConfig) -> None:
    found = smoke_tests.check_loader(GeneratedPhotos(4, 64, 48), config, 2.0)
    assert found.state == "ok"
    assert "with 2 cores" in found.message


def test_slow_host_is_reported(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke_tests, "measure_data_loading", lambda *args, repeats: {"all": {"median": 10.0}})
    assert smoke_tests.check_loader(GeneratedPhotos(4, 64, 48), config, 2.0).state == "warn"


def test_broken_images_are_reported(config: PretrainConfig, tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(np.full((40, 40, 3), 80 * number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "0.png").write_bytes(b"no image")
    found = smoke_tests.check_loader(open_dataset(str(tmp_path)), config, 1.0)
    assert found.state == "warn"
    assert found.message.startswith("1 of 3 images cannot be decoded")
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    assert smoke_tests.check_loader(open_dataset(str(tmp_path)), config, 1.0).state == "fail"


def test_one_batch_is_overfitted() -> None:
    found = smoke_tests.check_overfit(open_dataset("shapes:train=64"), CPU)
    assert found.state == "ok", found.message


@pytest.mark.parametrize("fault", ["no gradient", "NaN"])
def test_a_machine_that_learns_nothing_fails(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    loss = PretrainTask.compute_loss
    factor = 0.0 if fault == "no gradient" else math.nan

    def spoilt(self: Any, batch: Any, step: int) -> dict[str, torch.Tensor]:
        true = loss(self, batch, step)["loss"]
        return {"loss": true.detach() + factor * true}

    monkeypatch.setattr(PretrainTask, "compute_loss", spoilt)
    monkeypatch.setattr(smoke_tests, "OVERFIT_STEPS", 10)
    assert smoke_tests.check_overfit(open_dataset("shapes:train=64"), CPU).state == "fail"


@pytest.mark.slow
def test_two_processes_all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke_tests, "PROCESSES_TIMEOUT", 600)  # a busy machine is no failure
    assert smoke_tests.check_processes(CPU).state == "ok"


def test_failing_or_hanging_processes_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(code: int, stderr: str) -> Callable[..., Any]:
        return lambda *args, **more: SimpleNamespace(returncode=code, stderr=stderr)

    def hangs(command: list[str], **more: Any) -> Any:
        raise smoke_tests.subprocess.TimeoutExpired(command, more["timeout"])

    monkeypatch.setattr(smoke_tests.subprocess, "run", ended(1, "trace\nno route to host"))
    assert "no route to host" in smoke_tests.check_processes(CPU).message
    monkeypatch.setattr(smoke_tests.subprocess, "run", hangs)
    assert smoke_tests.check_processes(CPU).state == "fail"


def test_a_run_folder_is_tried_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert smoke_tests.check_run_folder(tmp_path).state in ("ok", "warn")  # the disk may be slow
    assert list(tmp_path.iterdir()) == []
    load = smoke_tests.checkpoint.load_checkpoint

    def flipped(path: Path) -> Any:
        tensors, header = load(path)
        return {name: t + 1 for name, t in tensors.items()}, header

    monkeypatch.setattr(smoke_tests.checkpoint, "load_checkpoint", flipped)
    assert smoke_tests.check_run_folder(tmp_path).state == "fail"


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke_tests.os, "access", lambda path, mode: False)
    assert smoke_tests.check_run_folder(tmp_path).state == "fail"


def test_step_that_does_not_fit_is_reported(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "get_free_memory", lambda device: 1 << 40)
    assert environment.check_preset_memory(config, CPU).state == "ok"
    monkeypatch.setattr(environment, "get_free_memory", lambda device: 1 << 20)
    found = environment.check_preset_memory(config, CPU)
    assert found.state == "fail"
    assert "optim.batch_size" in found.fix
    unasked = environment.check_preset_memory(config, CPU, wanted=False)
    assert unasked.state == "warn"
    assert "--preset" in unasked.fix
    need = sum(estimate_step_memory(config, outline_networks(config), resolve_precision(config, CPU)).values())
    monkeypatch.setattr(environment, "get_free_memory", lambda device: int(0.9 * need))  # an estimate is not exact
    assert environment.check_preset_memory(config, CPU).state == "warn"


def test_slow_disk_is_reported(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, waited: list[float]) -> None:
    photos = GeneratedPhotos(8)
    assert smoke_tests.check_loader(photos, config, 1).state == "ok"
    read = photos.read

    def slowly(index: int) -> bytes:
        waited[0] += 1
        return read(index)

    monkeypatch.setattr(photos, "read", slowly)
    found = smoke_tests.check_loader(photos, config, 1)
    assert found.state == "warn"
    assert "waited" in found.message
