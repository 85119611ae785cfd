"""``relicctl bench``: what a preset will take on this machine, before it is started."""

from __future__ import annotations

import math
import os
import resource
from typing import Any

import torch

from relicctl.benchmark.host import host_figures
from relicctl.benchmark.limits import flop_per_image, largest_batch, largest_that_fits, matrix_peak, step_fits
from relicctl.benchmark.photos import GeneratedPhotos
from relicctl.benchmark.step import step_figures, step_parts, together
from relicctl.commands.common import pick_device, worker_count
from relicctl.commands.data import open_data
from relicctl.commands.pretrain import view_plan
from relicctl.config.resolve import Resolved
from relicctl.config.schema import Config
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.data.bad_images import BadImages
from relicctl.data.feed import Feed, choose_cache
from relicctl.data.sampler import Sampler
from relicctl.data.sources import Source
from relicctl.errors import UsageError
from relicctl.memory import check_memory, check_step_memory, in_units
from relicctl.pretraining import Pretraining, build_networks, settle_compile, settle_precision

IMAGENET = 1_281_167  # training images that generated data stand for
STEP_SECONDS = 6.0  # what a step on a CPU may take, so that the whole bench takes minutes
CPU_EFFICIENCY = 0.25  # of the matrix peak, in choosing that step's batch
FITS = 0.8  # of the largest batch by estimate is what a GPU is measured with
WAIT_THAT_MATTERS = 0.05


def bench(
    resolved: Resolved, *, batch: int | None, repeats: int, quiet: bool, download: bool = False
) -> dict[str, Any]:
    """The figures of ``resolved`` on one process of this machine: medians, and under ``spread`` what they are of."""
    if repeats < 1:
        raise UsageError(f"--repeats is {repeats}.", "Give 1 or more; the median wants 5.")
    if batch is not None and batch < 2:
        raise UsageError(f"--batch is {batch}.", "Give 2 or more: a batch of one has no negatives.")
    config, console = resolved.config, Console(quiet)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    device = pick_device(config.runtime.device)
    precision = settle_precision(config, device)
    real = open_data(config, download, console).train if config.data.train is not None else None
    images, classes = (len(real), len(real.classes)) if real is not None else (IMAGENET, 1000)
    if config.objective == "supervised" and real is None:
        raise UsageError("Generated images have no labels.", "Give --data with one folder per class.")

    console.note("networks: operations and the matrix peak ...")
    flop, peak = flop_per_image(config, classes), matrix_peak(device, precision)
    largest = largest_batch(config, classes, precision, device)
    if device.type == "cuda":
        console.note("memory: the largest batch that fits ...")
        largest = largest_that_fits(
            lambda size: step_fits(_with_batch(config, size), classes, precision, device), largest,
            step=math.lcm(8, config.optim.microbatch or 1),
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats(device)
    size = batch or _batch(config, device, flop, peak, largest, images)
    source = real if real is not None else GeneratedPhotos(max(2 * size, 64))
    measured = _with_batch(config, size)
    check_memory(measured, device)
    with torch.device("meta"):
        outline = build_networks(measured, classes)
    check_step_memory(measured, outline, device, precision, 1, console)
    total_steps = max(1, images // config.optim.batch_size) * config.optim.epochs

    console.note("host: read, decode, crop, collate ...")
    host = host_figures(source, view_plan(config), max(repeats, 5))
    cache = choose_cache(config.data.cache, source, device) if real is not None else "none"
    workers = worker_count(config.runtime, device, cache)

    def start(workers: int) -> tuple[Pretraining, Feed]:
        task = Pretraining(
            measured, classes=classes, steps_per_epoch=max(1, images // config.optim.batch_size),
            total_steps=total_steps, device=device, precision=precision,
        )  # fmt: skip
        feed = Feed(
            source, Sampler(config.seed, len(source), size), view_plan(config), seed=config.seed, device=device,
            world=World(), cache=cache, workers=workers, bad=BadImages(len(source), config.data.max_bad),
        )  # fmt: skip
        return task, feed

    console.note(f"step: {repeats} of {size} images, part by part ...")
    parts = step_parts(*start(0 if device.type == "cpu" else workers), repeats, config.runtime.log_every, device)
    step = step_figures(parts, size)
    window = max(1, math.ceil(1.0 / max(size / step["step_images_per_s"]["median"], 1e-3)))
    console.note(f"together: {repeats} times {window} steps of the training loop ...")
    speed, wait = together(*start(workers), size, repeats, window, device)

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
        "compiled": settle_compile(measured, device, World(), total_steps),
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
        "peak_memory_bytes": _peak_memory(device),
        "flop_per_image": flop,
        "matrix_peak_flop_per_s": float(f"{peak:.4g}"),
        "share_of_matrix_peak": round(flop * median["step_images_per_s"] / peak, 4),
        "largest_batch": largest,
        "largest_batch_tried": device.type == "cuda",
        "hours": round(_trained_on(config, images) / speed["median"] / 3600, 2),
        "bottleneck": _bottleneck(wait["median"], step["outside_parts"]),
        "assumptions": _assumptions(config, real, images, size, device),
        "spread": spreads,
    }
    _show(result, console)
    return result


def _trained_on(config: Config, images: int) -> int:
    """How many images pass in the whole training."""
    most = config.optim.max_steps
    whole = config.optim.epochs * images
    return whole if most is None else min(whole, most * config.optim.batch_size)


def _batch(config: Config, device: torch.device, flop: int, peak: float, largest: int, images: int) -> int:
    """A batch that is measured in minutes and fits; the config's own where it does."""
    most = min(config.optim.batch_size, images)
    if device.type == "cuda":
        most = min(most, int(FITS * largest))
    else:
        most = min(most, int(STEP_SECONDS * CPU_EFFICIENCY * peak / flop), int(FITS * largest))
    return most if most == config.optim.batch_size else 2 ** max(1, int(math.log2(max(most, 2))))


def _with_batch(config: Config, size: int) -> Config:
    """The config with another batch; fewer negatives where it has too few others for them."""
    negatives = config.loss.negatives
    fewer = negatives if negatives == "all" or negatives < size else size - 1
    microbatch = config.optim.microbatch
    fits = microbatch if microbatch and size % microbatch == 0 else None
    return config.model_copy(
        update={
            "optim": config.optim.model_copy(update={"batch_size": size, "microbatch": fits}),
            "loss": config.loss.model_copy(update={"negatives": fewer}),
        }
    )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bottleneck(wait: float, outside: dict[str, float]) -> str:
    """``data``, ``networks``, or the part outside the networks that takes more than they do."""
    if wait > WAIT_THAT_MATTERS:
        return "data"
    part = max(outside, key=lambda name: outside[name])
    return part if outside[part] > 1 - sum(outside.values()) else "networks"


def _assumptions(config: Config, real: Source | None, images: int, size: int, device: torch.device) -> list[str]:
    said = [f"hours: {images:,} images{'' if real else ' (ImageNet)'}, {config.optim.epochs} epochs, this device alone"]
    if size != config.optim.batch_size:
        said.append(
            f"measured at batch {size}, not {config.optim.batch_size}, as if a larger one were as fast an image"
        )
    if config.optim.max_steps is not None:
        said.append(f"hours end at optim.max_steps, {config.optim.max_steps:,}")
    if config.optim.microbatch and size % config.optim.microbatch:
        said.append(f"measured without optim.microbatch, since {config.optim.microbatch} does not divide the batch")
    if config.bgmask.probability and config.objective != "supervised":
        said.append("views keep their backgrounds: bgmask is not measured")
    if real is None:
        said.append("images are generated JPEGs of 500 x 375 pixels, read from memory")
    if device.type == "cpu":
        said.append("peak memory is the process's largest resident set, the bench itself included")
        said.append("largest batch is an estimate")
    return [*said, "checkpoints and evaluation are not in the hours"]


def _show(result: dict[str, Any], console: Console) -> None:
    def rate(name: str) -> list[str]:
        figures = result["spread"][name]
        return [f"{figures['median']:.4g}", f"{figures['min']:.4g} to {figures['max']:.4g}"]

    rows = [["host, images/s of a core", *rate("host_images_per_s_per_core")]]
    rows += [[f"  {stage}", *rate(f"host_{stage}")] for stage in result["host_stages"]]
    rows += [
        ["step alone, images/s", *rate("step_images_per_s")],
        ["together, images/s", *rate("images_per_s")],
        ["data wait, share", *rate("data_wait")],
        ["outside the networks", f"{result['outside_networks']:.2%}", ""],
    ]
    rows += [[f"  {part}", f"{share:.2%}", ""] for part, share in result["outside_parts"].items()]
    rows += [
        ["peak memory", in_units(result["peak_memory_bytes"]), ""],
        ["GFLOP an image", f"{result['flop_per_image'] / 1e9:.4g}", ""],
        ["share of the matrix peak", f"{result['share_of_matrix_peak']:.1%}", ""],
        [
            f"largest batch, {'tried' if result['largest_batch_tried'] else 'estimated'}",
            f"{result['largest_batch']:,}",
            "",
        ],
        ["hours for the preset", f"{result['hours']:,}", ""],
        ["bottleneck", result["bottleneck"], ""],
    ]
    console.table(["", "median", "spread"], rows)
    for assumption in result["assumptions"]:
        console.note(f"assumed: {assumption}")
