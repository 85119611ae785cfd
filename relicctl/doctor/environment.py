"""Checks of what the machine has: versions, devices, cores, memory, disk and limits. Nothing is changed."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from relicctl.config.pretrain import PretrainConfig
from relicctl.core.hardware import format_bytes, get_free_memory, pick_precision
from relicctl.data.loader import ROWS_PER_CHUNK
from relicctl.errors import describe_error
from relicctl.pretraining.estimate import compute_checkpoint_bytes, estimate_step_memory, outline_networks
from relicctl.pretraining.task import resolve_precision
from relicctl.runs.estimate import REFUSED_RATIO

NUM_PREFETCHED = 4  # units that each data worker holds ready: prefetch_factor of torch's DataLoader
MAX_BF16_ERROR = 0.05  # largest error of bf16 relative to the result's size: eight bits, summed over hundreds
MIN_OPEN_FILES = 1024
MIN_VERSIONS = {"torch": (2, 11), "torchvision": (0, 26)}


@dataclass(frozen=True)
class CheckResult:
    """``message`` is one sentence; ``fix`` is what to do about a ``warn`` or a ``fail``, else empty."""

    state: Literal["ok", "warn", "fail"]
    message: str
    fix: str = ""


ok, warn, fail = partial(CheckResult, "ok"), partial(CheckResult, "warn"), partial(CheckResult, "fail")


def run_check(check: Callable[[], CheckResult]) -> CheckResult:
    """Return the result of ``check``; an error in it is a failure with the error's own sentences."""
    try:
        return check()
    except Exception as error:
        what, fix, _ = describe_error(error)
        return fail(what, fix)


def check_python() -> CheckResult:
    return ok(f"{platform.python_version()} on {platform.system()} {platform.release()}")


def check_versions() -> CheckResult:
    import torchvision  # imported here, so that one that does not fit this torch is a finding

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = f"torch {torch.__version__} ({built}), torchvision {torchvision.__version__}"
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    for name, (major, minor) in MIN_VERSIONS.items():
        if tuple(int(number) for number in versions[name].split(".")[:2]) < (major, minor):
            return fail(f"{found}: {name} is too old.", f"pip install '{name}>={major}.{minor}'.")
    return ok(found)


def check_cuda(wanted: str) -> CheckResult:
    """Check devices and driver; ``wanted`` is the config's runtime.device."""
    driver = _read_driver_version()
    if torch.cuda.is_available():
        return _check_gpus(driver)
    if torch.version.cuda is None and driver:
        found = f"there is a GPU (driver {driver}), but this torch is built for CPUs only."
        fix = "Install torch with CUDA (pytorch.org, Get Started) to use it."
    elif driver:
        found = f"there is a GPU, but torch (CUDA {torch.version.cuda}) cannot use driver {driver}."
        fix = "Update the driver, or install a torch that is built for an older CUDA."
    else:
        found, fix = "no GPU: everything is computed on the CPU", ""
    if wanted == "cuda":
        return fail(found, fix or "Use --device cpu, or a machine with a GPU.")
    return warn(found, fix) if fix else ok(found)


def _check_gpus(driver: str) -> CheckResult:
    names, busy = [], []
    for number in range(torch.cuda.device_count()):
        square = torch.ones(64, 64, device=f"cuda:{number}")
        if (square @ square).sum().item() != 64.0**3:
            return fail(f"GPU {number} computes a wrong product.", "Exclude it with CUDA_VISIBLE_DEVICES.")
        free, total = torch.cuda.mem_get_info(number)
        names.append(f"{torch.cuda.get_device_name(number)} ({format_bytes(free)} of {format_bytes(total)} free)")
        if free < 0.8 * total:
            busy.append(number)
    found = f"{', '.join(names)}; driver {driver or 'unknown'}"
    if busy:
        return warn(f"{found}: others use GPU {busy[0]}.", "Choose free ones with CUDA_VISIBLE_DEVICES.")
    return ok(found)


def _read_driver_version() -> str:
    """Return the version of the NVIDIA driver; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def check_preset_memory(config: PretrainConfig, device: torch.device, wanted: bool = True) -> CheckResult:
    """Check that a step fits, by the estimate of ``--dry-run``; fail if it clearly does not and a preset is ``wanted``.

    The batch is split over all GPUs, as under torchrun.
    """
    processes = max(1, torch.cuda.device_count()) if device.type == "cuda" else 1
    memory = estimate_step_memory(config, outline_networks(config), resolve_precision(config, device), processes)
    need, free = sum(memory.values()), get_free_memory(device)
    found = (
        f"a step with {'this preset' if wanted else 'the default settings'} takes about {format_bytes(need)} "
        f"{'in one process' if processes == 1 else f'in each of {processes} processes'}, {format_bytes(free)} are free"
    )
    if need <= free:
        return ok(found)
    if not wanted:
        return warn(f"{found}.", "The default settings are for many GPUs: check your own with --preset NAME.")
    fix = "Use more processes, lower optim.batch_size, set optim.microbatch, or choose a smaller preset."
    return (fail if need > REFUSED_RATIO * free else warn)(f"{found}.", fix)


def _format_count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def check_nccl() -> CheckResult:
    if not torch.cuda.is_available():
        return ok("not needed without GPUs")
    if not dist.is_nccl_available():
        return fail("this torch has no NCCL, which several GPUs need.", "Install torch from pytorch.org for Linux.")
    return ok(".".join(map(str, torch.cuda.nccl.version())))


def check_bf16(device: torch.device, precision: str) -> CheckResult:
    """Compare a convolution and its gradients in bf16 with fp32; ``precision`` is the config's."""
    error, chosen = measure_bf16_error(device), pick_precision(precision, device)
    found = f"largest error {error:.1%}; runtime.precision {precision} is {chosen} here"
    if error <= MAX_BF16_ERROR:
        return ok(found)
    if chosen == "bf16":
        return fail(f"{found}, and bf16 computes wrongly.", "--set runtime.precision=fp32.")
    return warn(f"{found}; bf16 computes wrongly.", "Leave runtime.precision at fp32.")


def measure_bf16_error(device: torch.device) -> float:
    """Return the largest difference of outputs and gradients from fp32's, relative to their RMS; NaN is infinite."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 32, 16, 16, generator=generator).to(device)
    network = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(64 * 64, 32)).to(device)
    results: list[list[torch.Tensor]] = []
    for lower in (False, True):
        network.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=lower):
            outputs = network(images)
        outputs.float().square().mean().backward()
        gradients = [p.grad.detach().clone() for p in network.parameters() if p.grad is not None]
        results.append([outputs.detach().float(), *gradients])
    errors = [(b - a).square().mean().sqrt() / a.square().mean().sqrt() for a, b in zip(*results, strict=True)]
    return float(torch.stack(errors).nan_to_num(nan=torch.inf).max())


def check_cores() -> CheckResult:
    """Compare the cores that this process may use with those there are, torch's threads and the load."""
    there, usable = os.cpu_count() or 1, count_usable_cores()
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    found = f"{usable:g} of {there} cores usable, {_format_count(threads, 'thread')} of torch, load {load:.1f}"
    if threads > max(1, usable):
        return warn(f"{found}: more threads than cores.", f"export OMP_NUM_THREADS={max(1, int(usable))}.")
    if load > 0.5 * there + 1:
        return warn(
            f"{found}: others use these cores.", "Wait for them, or export OMP_NUM_THREADS=1: waiting threads are slow."
        )
    return ok(found)


def count_usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the number of cores by affinity and by the container's quota (``cpu.max``, or version 1's two files)."""
    allowed = float(len(os.sched_getaffinity(0)))
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            if int(quota) > 0:
                allowed = min(allowed, int(quota) / int(period))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return allowed


def check_disk(folder: Path, config: PretrainConfig) -> CheckResult:
    """Check the space for the checkpoints of ``config`` under ``folder``."""
    free, need = shutil.disk_usage(folder).free, compute_checkpoint_bytes(config, outline_networks(config))
    found = f"{format_bytes(free)} free in {folder}; the checkpoints of this preset take {format_bytes(need)}"
    if free < need:
        return fail(f"{found}.", "Free some space, choose another --out, or lower checkpoint.keep.")
    if free < 3 * need:
        return warn(f"{found}.", "Free some space before a long run.")
    return ok(found)


def check_shared_memory(config: PretrainConfig, workers: int, shm: Path = Path("/dev/shm")) -> CheckResult:
    """Check the shared memory through which data workers pass their images."""
    if not shm.is_dir():
        return warn(f"there is no {shm}.", "Use --workers 0 if data workers fail.")
    free, need = shutil.disk_usage(shm).free, compute_prefetch_bytes(config, workers)
    found = f"{format_bytes(free)} free in {shm}; {_format_count(workers, 'worker')} may use {format_bytes(need)}"
    if free < need:
        fix = f"Give the container more (docker run --shm-size={max(1, 2 * need >> 30)}g), or lower --workers."
        return fail(f"{found}.", fix)
    return ok(found)


def compute_prefetch_bytes(config: PretrainConfig, workers: int) -> int:
    """Return the bytes of the uint8 crops that ``workers`` hold ready at most."""
    pixels = sum(view.count * view.size**2 for view in (config.views.large, config.views.small))
    return workers * NUM_PREFETCHED * ROWS_PER_CHUNK * 3 * pixels


def check_open_files() -> CheckResult:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return ok("no limit")
    if soft < MIN_OPEN_FILES:
        return warn(f"{soft:,} open files at most.", f"ulimit -n {hard if 0 < hard < 65536 else 65536}.")
    return ok(f"{soft:,} open files at most")
