"""``relicctl bench``: what a preset will take on this machine, before it is started."""

from __future__ import annotations

import math
import os
import resource
from dataclasses import dataclass
from typing import Any

import torch

from relicctl.benchmark.data_pipeline import GeneratedPhotos, measure_data_loading
from relicctl.benchmark.hardware_limits import (
    count_flop_per_image,
    estimate_largest_batch,
    find_largest_fit,
    measure_matmul_peak,
    try_train_step,
)
from relicctl.benchmark.train_step import measure_step_parts, measure_train_loop, summarize_step
from relicctl.config.pretrain import PretrainConfig
from relicctl.config.resolve import ResolvedConfig
from relicctl.console import Console
from relicctl.core.distributed import SINGLE_PROCESS
from relicctl.core.hardware import format_bytes
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import BadImages
from relicctl.data.loader import LoaderConfig, ViewLoader, resolve_cache
from relicctl.data.sampler import Sampler
from relicctl.errors import UsageError
from relicctl.pretraining.data import build_view_plan, open_pretrain_data
from relicctl.pretraining.estimate import check_step_memory, check_view_memory
from relicctl.pretraining.task import PretrainTask, Schedule, resolve_compile, resolve_precision
from relicctl.runs.distributed import resolve_device, resolve_num_workers

IMAGENET_TRAIN_IMAGES = 1_281_167  # training images that generated data stand for
MAX_STEP_SECONDS = 6.0  # what a step on a CPU may take, so that the whole bench takes minutes
CPU_EFFICIENCY = 0.25  # fraction of the matrix peak assumed when choosing that step's batch
MEMORY_FRACTION = 0.8  # fraction of the largest batch that is measured at most
DATA_WAIT_THRESHOLD = 0.05


@dataclass(frozen=True)
class Workload:
    """What is measured: a config on its images and a device; ``dataset`` is None where images are generated."""

    config: PretrainConfig
    dataset: ImageDataset | None
    images: int
    classes: int
    device: torch.device
    precision: str


@dataclass(frozen=True)
class Limits:
    """What the networks ask and the hardware could give."""

    flop_per_image: int
    matrix_peak: float  # floating-point operations per second
    largest_batch: int


@dataclass(frozen=True)
class Trial:
    """The workload with the batch that is measured (``config``), and how its images are loaded."""

    config: PretrainConfig
    source: ImageDataset
    schedule: Schedule
    cache: str
    workers: int


def bench(
    resolved: ResolvedConfig, *, batch: int | None, repeats: int, quiet: bool, download: bool = False
) -> dict[str, Any]:
    """Measure ``resolved`` on one process of this machine; return medians, and under ``spread`` their ranges."""
    if repeats < 1:
        raise UsageError(f"--repeats is {repeats}.", "Give 1 or more; the median wants 5.")
    if batch is not None and batch < 2:
        raise UsageError(f"--batch is {batch}.", "Give 2 or more: a batch of one has no negatives.")
    console = Console(quiet)
    workload = open_workload(resolved.config, download, console)
    limits = measure_limits(workload, console)
    trial = prepare_trial(workload, batch or choose_batch_size(workload, limits), console)
    spreads, step = measure_speed(workload, trial, repeats, console)
    result = {"preset": resolved.preset, **summarize(workload, limits, trial, spreads, step)}
    print_result(result, console)
    return result


def open_workload(config: PretrainConfig, download: bool, console: Console) -> Workload:
    """Open the images, if any are given, and resolve device and precision."""
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    device = resolve_device(config.runtime.device)
    precision = resolve_precision(config, device)
    if config.data.train is not None:
        dataset = open_pretrain_data(config, download, console).train
        return Workload(config, dataset, len(dataset), len(dataset.classes), device, precision)
    if config.objective == "supervised":
        raise UsageError("Generated images have no labels.", "Give --data with one folder per class.")
    return Workload(config, None, IMAGENET_TRAIN_IMAGES, 1000, device, precision)


def measure_limits(workload: Workload, console: Console) -> Limits:
    """Count operations, measure the matrix peak, and find the largest batch: tried on a GPU, else estimated."""
    config, classes, device, precision = workload.config, workload.classes, workload.device, workload.precision
    console.info("networks: operations and the matrix peak ...")
    flop, peak = count_flop_per_image(config, classes), measure_matmul_peak(device, precision)
    largest = estimate_largest_batch(config, classes, precision, device)
    if device.type == "cuda":
        console.info("memory: the largest batch that fits ...")
        largest = find_largest_fit(
            lambda size: try_train_step(_replace_batch_size(config, size), classes, precision, device),
            largest,
            step=math.lcm(8, config.optim.microbatch or 1),
        )
        torch.cuda.reset_peak_memory_stats(device)
    return Limits(flop, peak, largest)


def choose_batch_size(workload: Workload, limits: Limits) -> int:
    """Return a batch that is measured in minutes and fits; the config's where that one does."""
    config = workload.config
    most = min(config.optim.batch_size, workload.images, int(MEMORY_FRACTION * limits.largest_batch))
    if workload.device.type != "cuda":
        most = min(most, int(MAX_STEP_SECONDS * CPU_EFFICIENCY * limits.matrix_peak / limits.flop_per_image))
    return most if most == config.optim.batch_size else 2 ** max(1, int(math.log2(max(most, 2))))


def prepare_trial(workload: Workload, size: int, console: Console) -> Trial:
    """Resolve how batches of ``size`` are loaded, and check that they fit into memory."""
    whole, dataset, device = workload.config, workload.dataset, workload.device
    source = dataset if dataset is not None else GeneratedPhotos(max(2 * size, 64))
    config = _replace_batch_size(whole, size)
    check_view_memory(config, device)
    check_step_memory(config, workload.classes, device, workload.precision, 1, console)
    cache = resolve_cache(config.data.cache, source, device) if dataset is not None else "none"
    workers = resolve_num_workers(config.runtime, device, cache)
    schedule = Schedule(config, max(1, workload.images // whole.optim.batch_size))
    return Trial(config, source, schedule, cache, workers)


def build_task_and_loader(workload: Workload, trial: Trial, workers: int) -> tuple[PretrainTask, ViewLoader]:
    config, source, device = trial.config, trial.source, workload.device
    task = PretrainTask(config, trial.schedule, classes=workload.classes, device=device, precision=workload.precision)
    loader = ViewLoader(
        source,
        Sampler(config.seed, len(source), config.optim.batch_size),
        build_view_plan(config),
        LoaderConfig(config.seed, device, cache=trial.cache, workers=workers),
        BadImages(len(source), config.data.max_corrupt_fraction),
    )
    return task, loader


def measure_speed(
    workload: Workload, trial: Trial, repeats: int, console: Console
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Measure data loading, the step and both together; return all spreads, and the parts of a step."""
    config, size, device = trial.config, trial.config.optim.batch_size, workload.device
    console.info("data pipeline: read, decode, crop, collate ...")
    host = measure_data_loading(trial.source, build_view_plan(config), max(repeats, 5))
    console.info(f"step: {repeats} of {size} images, part by part ...")
    task, loader = build_task_and_loader(workload, trial, 0 if device.type == "cpu" else trial.workers)
    step = summarize_step(measure_step_parts(task, loader, repeats, config.runtime.log_every, device), size)
    del task, loader  # their memory is needed by the next ones
    images_per_s = step.pop("step_images_per_s")
    window = max(1, math.ceil(1.0 / max(size / images_per_s["median"], 1e-3)))
    console.info(f"together: {repeats} times {window} steps of the training loop ...")
    task, loader = build_task_and_loader(workload, trial, trial.workers)
    speed, wait = measure_train_loop(task, loader, size, repeats, window, device)
    spreads = {
        "host_images_per_s_per_core": host.pop("all"),
        **{f"host_{stage}": spread for stage, spread in host.items()},
        "step_images_per_s": images_per_s,
        "images_per_s": speed,
        "data_wait": wait,
    }
    return spreads, step


def summarize(
    workload: Workload, limits: Limits, trial: Trial, spreads: dict[str, dict[str, float]], step: dict[str, Any]
) -> dict[str, Any]:
    """Return medians, what follows from them, and what was assumed."""
    device, median = workload.device, {name: spread["median"] for name, spread in spreads.items()}
    stages = ("read", "decode", "crop", "collate")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "precision": workload.precision,
        "compiled": resolve_compile(trial.config, device, SINGLE_PROCESS, trial.schedule.total_steps),
        "torch": torch.__version__,
        "data": trial.source.spec,
        "cache": trial.cache,
        "workers": trial.workers,
        "batch": trial.config.optim.batch_size,
        "host_images_per_s_per_core": median["host_images_per_s_per_core"],
        "host_stages": {stage: median[f"host_{stage}"] for stage in stages},
        "step_images_per_s": median["step_images_per_s"],
        "images_per_s": median["images_per_s"],
        **step,
        "data_wait": median["data_wait"],
        "peak_memory_bytes": _measure_peak_memory(device),
        "flops_per_image": limits.flop_per_image,
        "peak_flops": float(f"{limits.matrix_peak:.4g}"),
        "mfu": round(limits.flop_per_image * median["step_images_per_s"] / limits.matrix_peak, 4),
        "largest_batch": limits.largest_batch,
        "largest_batch_measured": device.type == "cuda",
        "hours": round(_count_images_seen(workload) / median["images_per_s"] / 3600, 2),
        "bottleneck": _find_bottleneck(median["data_wait"], step["outside_parts"]),
        "assumptions": _list_assumptions(workload, trial),
        "spread": spreads,
    }


def print_result(result: dict[str, Any], console: Console) -> None:
    def format_spread(name: str) -> list[str]:
        spread = result["spread"][name]
        return [f"{spread['median']:.4g}", f"{spread['min']:.4g} to {spread['max']:.4g}"]

    rows = [["data pipeline, images/s per core", *format_spread("host_images_per_s_per_core")]]
    rows += [[f"  {stage}", *format_spread(f"host_{stage}")] for stage in result["host_stages"]]
    rows += [
        ["step alone, images/s", *format_spread("step_images_per_s")],
        ["together, images/s", *format_spread("images_per_s")],
        ["data wait, fraction", *format_spread("data_wait")],
        ["outside the networks", f"{result['outside_networks']:.2%}", ""],
    ]
    rows += [[f"  {part}", f"{fraction:.2%}", ""] for part, fraction in result["outside_parts"].items()]
    how = "measured" if result["largest_batch_measured"] else "estimated"
    rows += [
        ["peak memory", format_bytes(result["peak_memory_bytes"]), ""],
        ["GFLOP per image", f"{result['flops_per_image'] / 1e9:.4g}", ""],
        ["fraction of the matrix peak", f"{result['mfu']:.1%}", ""],
        [f"largest batch, {how}", f"{result['largest_batch']:,}", ""],
        ["hours for the preset", f"{result['hours']:,}", ""],
        ["bottleneck", result["bottleneck"], ""],
    ]
    console.print_table(["", "median", "spread"], rows)
    for assumption in result["assumptions"]:
        console.info(f"assumed: {assumption}")


def _count_images_seen(workload: Workload) -> int:
    """Return how many images the whole training passes."""
    optim = workload.config.optim
    whole = optim.epochs * workload.images
    return whole if optim.max_steps is None else min(whole, optim.max_steps * optim.batch_size)


def _replace_batch_size(config: PretrainConfig, size: int) -> PretrainConfig:
    """Return the config with another batch, and fewer negatives where that batch has too few for the config's."""
    negatives = config.loss.negatives
    num_negatives = negatives if negatives == "all" or negatives < size else size - 1
    microbatch = config.optim.microbatch
    fits = microbatch if microbatch and size % microbatch == 0 else None
    return config.model_copy(
        update={
            "optim": config.optim.model_copy(update={"batch_size": size, "microbatch": fits}),
            "loss": config.loss.model_copy(update={"negatives": num_negatives}),
        }
    )


def _measure_peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _find_bottleneck(wait: float, outside: dict[str, float]) -> str:
    """Return ``data``, ``networks``, or the part outside the networks that takes more than they do."""
    if wait > DATA_WAIT_THRESHOLD:
        return "data"
    part = max(outside, key=lambda name: outside[name])
    return part if outside[part] > 1 - sum(outside.values()) else "networks"


def _list_assumptions(workload: Workload, trial: Trial) -> list[str]:
    optim, size, generated = workload.config.optim, trial.config.optim.batch_size, workload.dataset is None
    bgmask = workload.config.bgmask
    imagenet = " (ImageNet)" if generated else ""
    on_cpu = workload.device.type == "cpu"
    possible: dict[str, object] = {  # each with the condition under which it holds
        f"hours: {workload.images:,} images{imagenet}, {optim.epochs} epochs, this device alone": True,
        f"measured at batch {size}, not {optim.batch_size}, assuming the same speed per image": size
        != optim.batch_size,
        f"hours end at optim.max_steps, {optim.max_steps or 0:,}": optim.max_steps is not None,
        f"measured without optim.microbatch, since {optim.microbatch} does not divide the batch": optim.microbatch
        and size % optim.microbatch,
        "views keep their backgrounds: bgmask is not measured": bgmask.probability
        and workload.config.objective != "supervised",
        "images are generated JPEGs of 500 x 375 pixels, read from memory": generated,
        "peak memory is the process's largest resident set, the bench itself included": on_cpu,
        "largest batch is an estimate": on_cpu,
        "checkpoints and evaluation are not in the hours": True,
    }
    return [assumption for assumption, holds in possible.items() if holds]
