"""What the machine has: free memory, and the arithmetic it is fast in."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

CGROUP = Path("/sys/fs/cgroup")  # of the container that this is, if it is one


def get_free_memory(device: torch.device) -> int:
    """Bytes that can still be had on ``device``."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else get_free_host_memory()


def get_free_host_memory() -> int:
    """Bytes that this machine, or the container it is, can still give."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all there is, in use or not
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stats = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    cached = sum(int(stats.get(name, 0)) for name in ("active_file", "inactive_file"))  # files read, let go of at need
    return min(free, limit - used + cached)


def count_process_cores() -> int:
    """Cores for this process: those it may run on, shared with the other processes of the run on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def release_freed_memory() -> None:
    """Give the system back what this process has freed.

    The C library keeps it for later: after an evaluation of large tensors as much as a training itself takes, more
    or less of it by chance, so that a long run would seem to grow. Does nothing where that library is not glibc.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def pick_precision(precision: str, device: torch.device) -> str:
    """Settle ``auto``: bf16 where the hardware is faster in it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    # torch has no public question for a CPU; where the private ones are gone, fp32 is always right
    tiles, vectors = (
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    # Intel's vector instructions gain nothing, only its tiles do: a step in bf16 takes 1.2 times as long without them
    return "bf16" if tiles or (vectors and _is_amd_cpu()) else "fp32"


def _is_amd_cpu() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def count_elements(tensors: Iterable[Tensor]) -> int:
    """Numbers in all of them together."""
    return sum(tensor.numel() for tensor in tensors)


def format_bytes(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} GiB" if size < 1000 else f"{size:,.0f} GiB"


GIB = 2**30
