"""``relicctl bench``: what a preset will take on this machine, before it is started."""

from __future__ import annotations

import math
import os
import resource
from dataclasses import dataclass
from typing import Any

import torch

from relicctl.benchmark import hardware_limits
from relicctl.benchmark.data_pipeline import GeneratedPhotos, measure_data_loading
from relicctl.benchmark.train_step import Spread, Workload, measure_step_parts, measure_train_loop, summarize_step
from relicctl.config.pretrain import PretrainConfig
from relicctl.config.resolve import ResolvedConfig
from relicctl.console import Console
from relicctl.core.distributed import SINGLE_PROCESS
from relicctl.core.hardware import format_bytes
from relicctl.data.loader import resolve_cache
from relicctl.errors import UsageError
from relicctl.pretraining.data import build_view_plan, open_pretrain_data
from relicctl.pretraining.estimate import check_step_memory, check_view_memory
from relicctl.pretraining.task import Schedule, resolve_compile, resolve_precision
from relicctl.runs.distributed import resolve_device, resolve_num_workers

IMAGENET_TRAIN_IMAGES = 1_281_167  # training images that generated data stand for
MAX_STEP_SECONDS = 6.0  # what a step on a CPU may take, so that the whole bench takes minutes
CPU_EFFICIENCY = 0.25  # fraction of the matrix peak assumed when choosing that step's batch
MEMORY_FRACTION = 0.8  # fraction of the largest batch that is measured at most
DATA_WAIT_THRESHOLD = 0.05


@dataclass(frozen=True)
class Limits:
    """What the networks ask and the hardware could give."""

    flop_per_image: int
    matrix_peak: float  # floating-point operations per second
    largest_batch: int


def bench(
    resolved: ResolvedConfig, *, batch: int | None, repeats: int, quiet: bool, download: bool = False
) -> dict[str, Any]:
    """Measure ``resolved`` on one process of this machine; return medians, and under ``spread`` their ranges."""
    if repeats < 1:
        raise UsageError(f"--repeats is {repeats}.", "Give 1 or more; the median wants 5.")
    if batch is not None and batch < 2:
        raise UsageError(f"--batch is {batch}.", "Give 2 or more: a batch of one has no negatives.")
    console = Console(quiet)
    whole = open_workload(resolved.config, download, console)
    limits = measure_limits(whole, console)
    measured = whole.with_batch_size(batch or choose_batch_size(whole, limits))
    check_view_memory(measured.config, measured.device)
    check_step_memory(measured.config, len(measured.source.classes), measured.device, measured.precision, 1, console)
    spreads, step = measure_speed(measured, repeats, console)
    result = {"preset": resolved.preset, **summarize(whole, measured, limits, spreads, step)}
    print_result(result, console)
    return result


def open_workload(config: PretrainConfig, download: bool, console: Console) -> Workload:
    """Open the images, or generate some where none are given; resolve device, precision, cache and workers."""
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    device = resolve_device(config.runtime.device)
    precision = resolve_precision(config, device)
    if config.data.train is not None:
        source = open_pretrain_data(config, download, console).train
        cache = resolve_cache(config.data.cache, source, device)
    elif config.objective == "supervised":
        raise UsageError("Generated images have no labels.", "Give --data with one folder per class.")
    else:
        source, cache = GeneratedPhotos(IMAGENET_TRAIN_IMAGES), "none"
    schedule = Schedule(config, max(1, len(source) // config.optim.batch_size))
    workers = resolve_num_workers(config.runtime, device, cache)
    return Workload(config, source, schedule, device, precision, cache, workers)


def measure_limits(workload: Workload, console: Console) -> Limits:
    """Count operations, measure the matrix peak, and find the largest batch: tried on a GPU, else estimated."""
    config, device, precision = workload.config, workload.device, workload.precision
    classes = len(workload.source.classes)
    console.info("networks: operations and the matrix peak ...")
    flop = hardware_limits.count_flop_per_image(config, classes)
    peak = hardware_limits.measure_matmul_peak(device, precision)
    largest = hardware_limits.estimate_largest_batch(config, classes, precision, device)
    if device.type == "cuda":
        console.info("memory: the largest batch that fits ...")

        def fits(size: int) -> bool:
            return hardware_limits.try_train_step(workload.with_batch_size(size).config, classes, precision, device)

        largest = hardware_limits.find_largest_fit(fits, largest, step=math.lcm(8, config.optim.microbatch or 1))
        torch.cuda.reset_peak_memory_stats(device)
    return Limits(flop, peak, largest)


def choose_batch_size(workload: Workload, limits: Limits) -> int:
    """Return a batch that is measured in minutes and fits; the config's where that one does."""
    wanted = workload.config.optim.batch_size
    most = min(wanted, len(workload.source), int(MEMORY_FRACTION * limits.largest_batch))
    if workload.device.type != "cuda":
        most = min(most, int(MAX_STEP_SECONDS * CPU_EFFICIENCY * limits.matrix_peak / limits.flop_per_image))
    return most if most == wanted else 2 ** max(1, int(math.log2(max(most, 2))))


def measure_speed(workload: Workload, repeats: int, console: Console) -> tuple[dict[str, Spread], dict[str, Any]]:
    """Measure data loading, the step and both together; return all spreads, and the parts of a step."""
    config, size, device = workload.config, workload.config.optim.batch_size, workload.device
    console.info("data pipeline: read, decode, crop, collate ...")
    loading = measure_data_loading(workload.source, build_view_plan(config), max(repeats, 5))
    console.info(f"step: {repeats} of {size} images, part by part ...")
    task, loader = workload.build(0 if device.type == "cpu" else workload.workers)
    step = summarize_step(measure_step_parts(task, loader, repeats, config.runtime.log_every, device), size)
    del task, loader  # their memory is needed by the next ones
    images_per_s = step.pop("step_images_per_s")
    window = max(1, math.ceil(1.0 / max(size / images_per_s["median"], 1e-3)))
    console.info(f"training loop: {repeats} times {window} steps ...")
    speed, wait = measure_train_loop(*workload.build(workload.workers), size, repeats, window, device)
    spreads = {
        "host_images_per_s_per_core": loading.pop("all"),
        **{f"host_{stage}": spread for stage, spread in loading.items()},
        "step_images_per_s": images_per_s,
        "images_per_s": speed,
        "data_wait": wait,
    }
    return spreads, step


def summarize(
    whole: Workload, measured: Workload, limits: Limits, spreads: dict[str, Spread], step: dict[str, Any]
) -> dict[str, Any]:
    """Return medians, what follows from them, and what was assumed."""
    device, median = whole.device, {name: spread["median"] for name, spread in spreads.items()}
    on_gpu = device.type == "cuda"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "precision": whole.precision,
        "compiled": resolve_compile(measured.config, device, SINGLE_PROCESS, measured.schedule.total_steps),
        "torch": torch.__version__,
        "data": whole.source.spec,
        "cache": whole.cache,
        "workers": whole.workers,
        "batch": measured.config.optim.batch_size,
        "host_images_per_s_per_core": median["host_images_per_s_per_core"],
        "host_stages": {stage: median[f"host_{stage}"] for stage in ("read", "decode", "crop", "collate")},
        "step_images_per_s": median["step_images_per_s"],
        "images_per_s": median["images_per_s"],
        **step,
        "data_wait": median["data_wait"],
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else resident,
        "flops_per_image": limits.flop_per_image,
        "peak_flops": float(f"{limits.matrix_peak:.4g}"),
        "mfu": round(limits.flop_per_image * median["step_images_per_s"] / limits.matrix_peak, 4),
        "largest_batch": limits.largest_batch,
        "largest_batch_measured": on_gpu,
        "hours": round(_count_images_seen(whole) / median["images_per_s"] / 3600, 2),
        "bottleneck": _find_bottleneck(median["data_wait"], step["outside_parts"]),
        "assumptions": _list_assumptions(whole, measured.config.optim.batch_size),
        "spread": spreads,
    }


def print_result(result: dict[str, Any], console: Console) -> None:
    measured = {
        "data loading, images/s per core": "host_images_per_s_per_core",
        **{f"  {stage}": f"host_{stage}" for stage in result["host_stages"]},
        "training step alone, images/s": "step_images_per_s",
        "training loop, images/s": "images_per_s",
        "fraction of time waiting for data": "data_wait",
    }
    origin = "measured" if result["largest_batch_measured"] else "estimated"
    derived = {
        "step time outside the networks": f"{result['outside_networks']:.2%}",
        **{f"  {part}": f"{fraction:.2%}" for part, fraction in result["outside_parts"].items()},
        "peak memory": format_bytes(result["peak_memory_bytes"]),
        "GFLOP per image": f"{result['flops_per_image'] / 1e9:.4g}",
        "fraction of peak FLOP/s (MFU)": f"{result['mfu']:.1%}",
        f"largest batch, {origin}": f"{result['largest_batch']:,}",
        "hours for the whole training": f"{result['hours']:,}",
        "bottleneck": result["bottleneck"],
    }
    spreads = [(label, result["spread"][name]) for label, name in measured.items()]
    rows = [[label, f"{s['median']:.4g}", f"{s['min']:.4g} to {s['max']:.4g}"] for label, s in spreads]
    console.print_table(["", "median", "range"], rows + [[label, text, ""] for label, text in derived.items()])
    for assumption in result["assumptions"]:
        console.info(f"assumed: {assumption}")


def _count_images_seen(workload: Workload) -> int:
    """Return how many images the whole training passes."""
    optim = workload.config.optim
    whole = optim.epochs * len(workload.source)
    return whole if optim.max_steps is None else min(whole, optim.max_steps * optim.batch_size)


def _find_bottleneck(wait: float, outside: dict[str, float]) -> str:
    """Return ``data``, ``networks``, or the part outside the networks that takes more than they do."""
    if wait > DATA_WAIT_THRESHOLD:
        return "data"
    part = max(outside, key=lambda name: outside[name])
    return part if outside[part] > 1 - sum(outside.values()) else "networks"


def _list_assumptions(workload: Workload, size: int) -> list[str]:
    config, optim, on_cpu = workload.config, workload.config.optim, workload.device.type == "cpu"
    generated = isinstance(workload.source, GeneratedPhotos)
    imagenet = " (ImageNet)" if generated else ""
    possible: dict[str, object] = {  # each with the condition under which it holds
        f"hours: {len(workload.source):,} images{imagenet}, {optim.epochs} epochs, this device alone": True,
        f"measured at batch {size}, not {optim.batch_size}, assuming the same speed per image": size
        != optim.batch_size,
        f"hours end at optim.max_steps, {optim.max_steps or 0:,}": optim.max_steps is not None,
        f"measured without optim.microbatch, since {optim.microbatch} does not divide the batch": optim.microbatch
        and size % optim.microbatch,
        "views keep their backgrounds: bgmask is not measured": config.bgmask.probability
        and config.objective != "supervised",
        "images are generated JPEGs of 500 x 375 pixels, read from memory": generated,
        "peak memory is the process's largest resident set, the bench itself included": on_cpu,
        "largest batch is an estimate": on_cpu,
        "checkpoints and evaluation are not in the hours": True,
    }
    return [assumption for assumption, holds in possible.items() if holds]
