"""Free memory, cores and the fastest precision of the machine; sizes as text."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
PROCESS_CGROUPS = Path("/proc/self/cgroup")


def get_free_memory(device: torch.device) -> int:
    """Return the free bytes on ``device``."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else get_free_host_memory()


def get_free_host_memory() -> int:
    """Return the free bytes of this machine, or of the container or job that this process is in."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all memory, in use or not
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_list_free_bytes_of_control_groups()])


def _list_free_bytes_of_control_groups() -> Iterator[int]:
    """Yield what is left of each memory limit on this process: docker's, or that of a SLURM job, which is nested."""
    try:
        groups = [line.split(":", 2)[1:] for line in PROCESS_CGROUPS.read_text().splitlines()]
    except OSError:  # not Linux
        return
    for controllers, path in groups:
        if controllers == "":  # version 2
            root, names, prefix = CGROUP, ("max", "current"), ""
        elif "memory" in controllers.split(","):
            root, names, prefix = CGROUP / "memory", ("limit_in_bytes", "usage_in_bytes"), "total_"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in [parent for parent in (group, *group.parents) if parent.is_relative_to(root)]:
            with suppress(OSError, ValueError):  # no limit here, or outside of what the container sees
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in names)
                stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cached = sum(int(stats.get(f"{prefix}{name}", 0)) for name in ("active_file", "inactive_file"))
                yield limit - used + cached  # files in the page cache make room when needed


def count_process_cores() -> int:
    """Return the number of cores per rank: those this process may run on, divided by the ranks of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def release_freed_memory() -> None:
    """Return memory that this process has freed to the system.

    glibc keeps it for later: after an evaluation of large tensors as much as training itself takes, more or less of
    it by chance, so a long run would seem to grow. Does nothing with another C library.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def pick_precision(precision: str, device: torch.device) -> str:
    """Return ``precision``; for ``auto`` bf16 where the hardware is faster in it, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    # torch has no public function for a CPU; where the private ones are missing, fp32 is always right
    tiles, vectors = (
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    # Intel's vector instructions gain nothing, only AMX does: without it a step takes 1.2 times as long in bf16
    return "bf16" if tiles or (vectors and _is_amd_cpu()) else "fp32"


def _is_amd_cpu() -> bool:
    with suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return False


def count_elements(tensors: Iterable[Tensor]) -> int:
    """Return the number of elements of all tensors together."""
    return sum(tensor.numel() for tensor in tensors)


def format_bytes(size: float) -> str:
    """Return a size in bytes as text, such as 3.2 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} GiB" if size < 1000 else f"{size:,.0f} GiB"
