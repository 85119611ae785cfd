"""What the machine is: versions, devices, cores, memory, disk and limits. Nothing is changed."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
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

NUM_PREFETCHED = 4  # units that each data worker holds ready, as torch's DataLoader is told
MAX_BF16_ERROR = 0.05  # largest error of bf16, as a share of the result's size: eight bits, summed over hundreds
MIN_OPEN_FILES = 1024
MIN_VERSIONS = {"torch": (2, 11), "torchvision": (0, 26)}


def check_python() -> CheckResult:
    return ok(f"{platform.python_version()} on {platform.system()} {platform.release()}")


def check_versions() -> CheckResult:
    import torchvision  # imported here, so that one that does not fit this torch is a finding

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = f"torch {torch.__version__} ({built}), torchvision {torchvision.__version__}"
    have = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    old = [name for name, least in MIN_VERSIONS.items() if _parse_major_minor(have[name]) < least]
    if old:
        least = ".".join(map(str, MIN_VERSIONS[old[0]]))
        return fail(f"{found}: {old[0]} is too old.", f"pip install '{old[0]}>={least}'.")
    return ok(found)


def _parse_major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def check_cuda(wanted: str) -> CheckResult:
    """The devices and the driver; ``wanted`` is the config's runtime.device."""
    driver = _read_driver_version()
    if torch.cuda.is_available():
        return _check_gpus(driver)
    if torch.version.cuda is None and driver:
        found = f"there is a GPU (driver {driver}), but this torch is built for CPUs only."
        fix = "Install torch with CUDA, as pytorch.org tells, to use it."
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
            return fail(f"GPU {number} computes a wrong product.", "Leave it out by CUDA_VISIBLE_DEVICES.")
        free, total = torch.cuda.mem_get_info(number)
        names.append(f"{torch.cuda.get_device_name(number)} ({format_bytes(free)} of {format_bytes(total)} free)")
        if free < 0.8 * total:
            busy.append(number)
    found = f"{', '.join(names)}; driver {driver or 'unknown'}"
    if busy:
        return warn(f"{found}: others use GPU {busy[0]}.", "Choose free ones by CUDA_VISIBLE_DEVICES.")
    return ok(found)


def _read_driver_version() -> str:
    """The NVIDIA driver's version; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def check_preset_memory(config: PretrainConfig, device: torch.device, wanted: bool = True) -> CheckResult:
    """Does a step of the preset fit, by the estimate of ``--dry-run``? No trouble where no preset was ``wanted``."""
    memory = estimate_step_memory(config, outline_networks(config), resolve_precision(config, device))
    need, free = sum(memory.values()), get_free_memory(device)
    found = f"a step of {'this preset' if wanted else 'the defaults'} takes about {format_bytes(need)} in one process"
    found = f"{found}, {format_bytes(free)} are free"
    if need <= free or not wanted:
        return ok(found)
    return warn(f"{found}.", "Take more processes, lower optim.batch_size, or set optim.microbatch.")


def check_nccl() -> CheckResult:
    if not torch.cuda.is_available():
        return ok("not needed without GPUs")
    if not dist.is_nccl_available():
        return fail("this torch has no NCCL, which several GPUs need.", "Install torch from pytorch.org for Linux.")
    return ok(".".join(map(str, torch.cuda.nccl.version())))


def check_bf16(device: torch.device, precision: str) -> CheckResult:
    """Is a convolution with its gradients in bf16 near the one in fp32? ``precision`` is the config's."""
    error = measure_bf16_error(device)
    chosen = pick_precision(precision, device)
    found = f"largest error {error:.1%}; runtime.precision {precision} is {chosen} here"
    if error <= MAX_BF16_ERROR:
        return ok(found)
    if chosen == "bf16":
        return fail(f"{found}, and bf16 computes wrongly.", "--set runtime.precision=fp32.")
    return warn(f"{found}; bf16 computes wrongly.", "Leave runtime.precision at fp32.")


def measure_bf16_error(device: torch.device) -> float:
    """Largest difference of outputs and gradients from fp32's, as a share of their root mean square.

    A NaN counts as infinite.
    """
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
    """Cores that this process may use, against those that are there, torch's threads and the load."""
    there, usable = os.cpu_count() or 1, count_usable_cores()
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    found = f"{usable:g} of {there} cores usable, {threads} threads of torch, load {load:.1f}"
    if threads > max(1, usable):
        return warn(f"{found}: more threads than cores.", f"export OMP_NUM_THREADS={max(1, int(usable))}.")
    if load > 0.5 * there + 1:
        return warn(
            f"{found}: others use these cores.",
            "Wait for them, or export OMP_NUM_THREADS=1: waiting threads are slow.",
        )
    return ok(found)


def count_usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores by affinity and by the container's quota (``cpu.max``, or version 1's two files)."""
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
    """Room for the checkpoints of ``config`` under ``folder``."""
    free, need = shutil.disk_usage(folder).free, compute_checkpoint_bytes(config, outline_networks(config))
    found = f"{format_bytes(free)} free in {folder}; the checkpoints of this preset take {format_bytes(need)}"
    if free < need:
        return fail(f"{found}.", "Make room, choose another --out, or lower checkpoint.keep.")
    if free < 3 * need:
        return warn(f"{found}.", "Make room before a long run.")
    return ok(found)


def check_shared_memory(config: PretrainConfig, workers: int, shm: Path = Path("/dev/shm")) -> CheckResult:
    """Room for what data workers hand over."""
    if not shm.is_dir():
        return warn(f"there is no {shm}.", "Use --workers 0 if data workers fail.")
    free, need = shutil.disk_usage(shm).free, compute_prefetch_bytes(config, workers)
    found = f"{format_bytes(free)} free in {shm}; {workers} workers hand over {format_bytes(need)} at most"
    if free < need:
        fix = f"Give the container more (docker run --shm-size={max(1, 2 * need >> 30)}g), or lower --workers."
        return fail(f"{found}.", fix)
    return ok(found)


def compute_prefetch_bytes(config: PretrainConfig, workers: int) -> int:
    """Crops in uint8 that ``workers`` hold ready at most."""
    pixels = sum(view.count * view.size**2 for view in (config.views.large, config.views.small))
    return workers * NUM_PREFETCHED * ROWS_PER_CHUNK * 3 * pixels


def check_open_files() -> CheckResult:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        return warn(f"{limit} open files at most.", f"ulimit -n {hard if 0 < hard < 65536 else 65536}.")
    return ok(f"{limit} open files at most" if limit != "no limit" else "no limit")


@dataclass(frozen=True)
class CheckResult:
    """``found`` is one sentence; ``fix`` is what to do about a ``warn`` or a ``fail``, else empty."""

    state: Literal["ok", "warn", "fail"]
    message: str
    fix: str = ""


def ok(message: str) -> CheckResult:
    return CheckResult("ok", message)


def warn(message: str, fix: str) -> CheckResult:
    return CheckResult("warn", message, fix)


def fail(message: str, fix: str) -> CheckResult:
    return CheckResult("fail", message, fix)


def run_check(check: Callable[[], CheckResult]) -> CheckResult:
    """What ``check`` finds; an error in it is a failure with the error's own sentences."""
    try:
        return check()
    except Exception as error:
        what, fix, _ = describe_error(error)
        return fail(what, fix)
