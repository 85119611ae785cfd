"""``relicctl bench``: what a preset will take on this machine, before it is started."""

from __future__ import annotations

import math
import os
import resource
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
from relicctl.core.distributed import World
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
CPU_EFFICIENCY = 0.25  # of the matrix peak, in choosing that step's batch
MEMORY_FRACTION = 0.8  # of the largest batch by estimate is what a GPU is measured with
DATA_WAIT_THRESHOLD = 0.05


def bench(
    resolved: ResolvedConfig, *, batch: int | None, repeats: int, quiet: bool, download: bool = False
) -> dict[str, Any]:
    """The figures of ``resolved`` on one process of this machine: medians, and under ``spread`` what they are of."""
    if repeats < 1:
        raise UsageError(f"--repeats is {repeats}.", "Give 1 or more; the median wants 5.")
    if batch is not None and batch < 2:
        raise UsageError(f"--batch is {batch}.", "Give 2 or more: a batch of one has no negatives.")
    config, console = resolved.config, Console(quiet)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    device = resolve_device(config.runtime.device)
    precision = resolve_precision(config, device)
    dataset = open_pretrain_data(config, download, console).train if config.data.train is not None else None
    images, classes = (len(dataset), len(dataset.classes)) if dataset is not None else (IMAGENET_TRAIN_IMAGES, 1000)
    if config.objective == "supervised" and dataset is None:
        raise UsageError("Generated images have no labels.", "Give --data with one folder per class.")

    console.info("networks: operations and the matrix peak ...")
    flop, peak = count_flop_per_image(config, classes), measure_matmul_peak(device, precision)
    largest = estimate_largest_batch(config, classes, precision, device)
    if device.type == "cuda":
        console.info("memory: the largest batch that fits ...")
        largest = find_largest_fit(
            lambda size: try_train_step(_replace_batch_size(config, size), classes, precision, device), largest,
            step=math.lcm(8, config.optim.microbatch or 1),
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats(device)
    size = batch or _choose_batch_size(config, device, flop, peak, largest, images)
    source = dataset if dataset is not None else GeneratedPhotos(max(2 * size, 64))
    bench_config = _replace_batch_size(config, size)
    check_view_memory(bench_config, device)
    check_step_memory(bench_config, classes, device, precision, 1, console)
    schedule = Schedule(bench_config, max(1, images // config.optim.batch_size))

    console.info("host: read, decode, crop, collate ...")
    host = measure_data_loading(source, build_view_plan(config), max(repeats, 5))
    cache = resolve_cache(config.data.cache, source, device) if dataset is not None else "none"
    workers = resolve_num_workers(config.runtime, device, cache)

    def build_task_and_feed(workers: int) -> tuple[PretrainTask, ViewLoader]:
        task = PretrainTask(
            bench_config, schedule, classes=classes, device=device, precision=precision,
        )  # fmt: skip
        feed = ViewLoader(
            source, Sampler(config.seed, len(source), size), build_view_plan(config),
            LoaderConfig(config.seed, device, cache=cache, workers=workers),
            BadImages(len(source), config.data.max_corrupt_fraction),
        )  # fmt: skip
        return task, feed

    console.info(f"step: {repeats} of {size} images, part by part ...")
    parts = measure_step_parts(
        *build_task_and_feed(0 if device.type == "cpu" else workers), repeats, config.runtime.log_every, device
    )
    step = summarize_step(parts, size)
    window = max(1, math.ceil(1.0 / max(size / step["step_images_per_s"]["median"], 1e-3)))
    console.info(f"together: {repeats} times {window} steps of the training loop ...")
    speed, wait = measure_train_loop(*build_task_and_feed(workers), size, repeats, window, device)

    spreads = {
        "host_images_per_s_per_core": host.pop("all"),
        **{f"host_{stage}": figures for stage, figures in host.items()},
        "step_images_per_s": step.pop("step_images_per_s"),
        "images_per_s": speed,
        "data_wait": wait,
    }
    median = {name: figures["median"] for name, figures in spreads.items()}
    result: dict[str, Any] = {
        "preset": resolved.preset,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "precision": precision,
        "compiled": resolve_compile(bench_config, device, World(), schedule.total_steps),
        "torch": torch.__version__,
        "data": source.spec,
        "cache": cache,
        "workers": workers,
        "batch": size,
        "host_images_per_s_per_core": median["host_images_per_s_per_core"],
        "host_stages": {stage: figures["median"] for stage, figures in host.items()},
        "step_images_per_s": median["step_images_per_s"],
        "images_per_s": median["images_per_s"],
        **step,
        "data_wait": median["data_wait"],
        "peak_memory_bytes": _measure_peak_memory(device),
        "flops_per_image": flop,
        "peak_flops": float(f"{peak:.4g}"),
        "mfu": round(flop * median["step_images_per_s"] / peak, 4),
        "largest_batch": largest,
        "largest_batch_measured": device.type == "cuda",
        "hours": round(_count_images_seen(config, images) / speed["median"] / 3600, 2),
        "bottleneck": _find_bottleneck(wait["median"], step["outside_parts"]),
        "assumptions": _list_assumptions(config, dataset, images, size, device),
        "spread": spreads,
    }
    _print_figures(result, console)
    return result


def _count_images_seen(config: PretrainConfig, images: int) -> int:
    """How many images pass in the whole training."""
    most = config.optim.max_steps
    whole = config.optim.epochs * images
    return whole if most is None else min(whole, most * config.optim.batch_size)


def _choose_batch_size(
    config: PretrainConfig, device: torch.device, flop: int, peak: float, largest: int, images: int
) -> int:
    """A batch that is measured in minutes and fits; the config's own where it does."""
    most = min(config.optim.batch_size, images)
    if device.type == "cuda":
        most = min(most, int(MEMORY_FRACTION * largest))
    else:
        most = min(most, int(MAX_STEP_SECONDS * CPU_EFFICIENCY * peak / flop), int(MEMORY_FRACTION * largest))
    return most if most == config.optim.batch_size else 2 ** max(1, int(math.log2(max(most, 2))))


def _replace_batch_size(config: PretrainConfig, size: int) -> PretrainConfig:
    """The config with another batch; fewer negatives where it has too few others for them."""
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
    """``data``, ``networks``, or the part outside the networks that takes more than they do."""
    if wait > DATA_WAIT_THRESHOLD:
        return "data"
    part = max(outside, key=lambda name: outside[name])
    return part if outside[part] > 1 - sum(outside.values()) else "networks"


def _list_assumptions(
    config: PretrainConfig, dataset: ImageDataset | None, images: int, size: int, device: torch.device
) -> list[str]:
    assumptions = [
        f"hours: {images:,} images{'' if dataset else ' (ImageNet)'}, {config.optim.epochs} epochs, this device alone"
    ]
    if size != config.optim.batch_size:
        assumptions.append(
            f"measured at batch {size}, not {config.optim.batch_size}, as if a larger one were as fast an image"
        )
    if config.optim.max_steps is not None:
        assumptions.append(f"hours end at optim.max_steps, {config.optim.max_steps:,}")
    if config.optim.microbatch and size % config.optim.microbatch:
        assumptions.append(
            f"measured without optim.microbatch, since {config.optim.microbatch} does not divide the batch"
        )
    if config.bgmask.probability and config.objective != "supervised":
        assumptions.append("views keep their backgrounds: bgmask is not measured")
    if dataset is None:
        assumptions.append("images are generated JPEGs of 500 x 375 pixels, read from memory")
    if device.type == "cpu":
        assumptions.append("peak memory is the process's largest resident set, the bench itself included")
        assumptions.append("largest batch is an estimate")
    return [*assumptions, "checkpoints and evaluation are not in the hours"]


def _print_figures(result: dict[str, Any], console: Console) -> None:
    def format_rate(name: str) -> list[str]:
        figures = result["spread"][name]
        return [f"{figures['median']:.4g}", f"{figures['min']:.4g} to {figures['max']:.4g}"]

    rows = [["host, images/s of a core", *format_rate("host_images_per_s_per_core")]]
    rows += [[f"  {stage}", *format_rate(f"host_{stage}")] for stage in result["host_stages"]]
    rows += [
        ["step alone, images/s", *format_rate("step_images_per_s")],
        ["together, images/s", *format_rate("images_per_s")],
        ["data wait, share", *format_rate("data_wait")],
        ["outside the networks", f"{result['outside_networks']:.2%}", ""],
    ]
    rows += [[f"  {part}", f"{share:.2%}", ""] for part, share in result["outside_parts"].items()]
    rows += [
        ["peak memory", format_bytes(result["peak_memory_bytes"]), ""],
        ["GFLOP an image", f"{result['flops_per_image'] / 1e9:.4g}", ""],
        ["share of the matrix peak", f"{result['mfu']:.1%}", ""],
        [
            f"largest batch, {'tried' if result['largest_batch_measured'] else 'estimated'}",
            f"{result['largest_batch']:,}",
            "",
        ],
        ["hours for the preset", f"{result['hours']:,}", ""],
        ["bottleneck", result["bottleneck"], ""],
    ]
    console.print_table(["", "median", "spread"], rows)
    for assumption in result["assumptions"]:
        console.info(f"assumed: {assumption}")
