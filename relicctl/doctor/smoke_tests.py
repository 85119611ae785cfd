"""Smoke tests: decoding, data loading, overfitting one batch, two processes, and writing a run's folder."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from relicctl.benchmark.data_pipeline import IMAGES_PER_REPEAT, measure_data_loading
from relicctl.benchmark.train_step import Workload, train_one_step
from relicctl.config.pretrain import PretrainConfig
from relicctl.config.resolve import resolve_config
from relicctl.core import checkpoint
from relicctl.core.distributed import destroy_distributed, init_distributed
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.decoding import decode_rgb, is_decodable
from relicctl.doctor.environment import CheckResult, fail, ok, warn
from relicctl.pretraining.data import build_view_plan
from relicctl.pretraining.task import Schedule, resolve_precision
from relicctl.runs.folder import RunFolder

TESTED_FORMATS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}}
MIN_IMAGES_PER_S = 50.0  # per core; below, smaller copies of the images pay
MAX_DISK_WAIT_SECONDS = 0.02  # per image
OVERFIT_BATCH_SIZE = 16
OVERFIT_STEPS = 60
OVERFIT_BOUND = 0.5  # fraction of the loss of chance, log(OVERFIT_BATCH_SIZE)
OVERFIT_SETTINGS = (
    "model.arch=resnet18", "model.width=0.125", "model.stem=stride2",
    "model.projector.hidden=64", "model.projector.out=32", "model.predictor.hidden=64", "model.predictor.out=32",
    "views.large.count=2", "views.large.size=32", "views.small.count=1", "views.small.size=20",
    "loss.negatives=all", "loss.beta=1", "target.ema=0.9",
    f"optim.batch_size={OVERFIT_BATCH_SIZE}", "optim.name=adamw", "optim.base_lr=0.08", "optim.warmup_epochs=0",
    "optim.epochs=1", "data.cache=none",
)  # fmt: skip
PROCESSES_TIMEOUT = 90
CHECKPOINT_ELEMENTS = 4 * 2**20  # float32: 16 MiB


def check_decoders() -> CheckResult:
    """Encode an image in every common format, and decode it."""
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    picture = np.stack([np.tile(ramp, (32, 1)), np.tile(ramp[:, None], (1, 32)), np.full((32, 32), 128, np.uint8)], -1)
    for name, settings in TESTED_FORMATS.items():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, name, **settings)
        if np.abs(decode_rgb(buffer.getvalue()).astype(int) - picture).mean() > 3:
            return fail(f"{name} is decoded wrongly.", "pip install --force-reinstall pillow.")
    return ok(f"{', '.join(TESTED_FORMATS)} are read")


def check_loader(source: ImageDataset, config: PretrainConfig, cores: float) -> CheckResult:
    """Measure how fast one core reads, decodes and crops images to the views of ``config``."""
    count = min(IMAGES_PER_REPEAT, len(source))
    spread_out = np.linspace(0, len(source) - 1, count, dtype=np.int64)  # mostly files that no cache holds yet
    blocked_start, cpu_start = measure_blocked_seconds(), time.thread_time()
    decodable = [index for index in spread_out if is_decodable(source, int(index))]
    cpu_seconds = (time.thread_time() - cpu_start) / count
    blocked_seconds = (measure_blocked_seconds() - blocked_start) / count
    if not decodable:
        return fail(f"none of {count} images of {source.spec} can be decoded.", "Give --data images.")
    speed = measure_data_loading(source.select(decodable), build_view_plan(config), repeats=3)["all"]["median"]
    found = f"{speed:.4g} images/s per core ({source.spec}), so about {speed * cores:.4g} with {cores:g} cores"
    if len(decodable) < count:
        found = f"{count - len(decodable)} of {count} images cannot be decoded; {found}"
        return warn(f"{found}.", "Repair or remove them, or raise data.max_corrupt_fraction.")
    if blocked_seconds > MAX_DISK_WAIT_SECONDS and blocked_seconds > 4 * cpu_seconds:
        return warn(
            f"{found}; but a reader waited {1000 * blocked_seconds:.0f} ms for each image: "
            f"{1 / (blocked_seconds + cpu_seconds):.3g} images/s.",
            "Copy the data to a local disk, pack them as .tar, or use more --workers.",
        )
    if speed < MIN_IMAGES_PER_S:
        return warn(f"{found}.", "If the log's data_wait is high, make smaller copies of the images, or add cores.")
    return ok(found)


def measure_blocked_seconds() -> float:
    """Return a clock that runs while this thread neither works nor waits for a core: while it waits for a disk, say."""
    queued = 0.0
    with suppress(OSError, IndexError, ValueError):  # only Linux has this file
        queued = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return time.perf_counter() - time.thread_time() - queued


def check_overfit(source: ImageDataset, device: torch.device) -> CheckResult:
    """Check that ReLICv2 overfits one batch; if not, no curve of a long run can be trusted."""
    losses = run_overfit(source, device)
    bound = OVERFIT_BOUND * math.log(OVERFIT_BATCH_SIZE)
    found = f"loss of one batch {losses[0]:.3f}, after {len(losses)} steps {losses[-1]:.3f}, bound {bound:.3f}"
    if not losses[-1] < bound:  # a NaN too
        return fail(f"{found}.", "Try --device cpu and --set runtime.precision=fp32; if that helps, update the driver.")
    return ok(found)


def run_overfit(source: ImageDataset, device: torch.device) -> list[float]:
    """Train the real task on one batch of views; return the loss of every step."""
    config = resolve_config(sets=OVERFIT_SETTINGS, schema=PretrainConfig).config
    schedule, precision = Schedule(config, OVERFIT_STEPS, 10 * OVERFIT_STEPS), resolve_precision(config, device)
    task, loader = Workload(config, source, schedule, device, precision).build(workers=0)
    batch = next(iter(loader.iter_from_step(0, 1)))
    losses = []
    for step in range(OVERFIT_STEPS):
        for group in task.optimizer.param_groups:
            group["lr"] = task.get_learning_rate(step)
        losses.append(train_one_step(task, batch, step).item())
    return losses


def check_processes(device: torch.device) -> CheckResult:
    """Check an all-reduce of two processes under torchrun: one per GPU, or two on the CPU."""
    on_gpus = device.type == "cuda" and torch.cuda.device_count() > 1
    backend = "nccl" if on_gpus else "gloo"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "relicctl.doctor.smoke_tests", "cuda" if on_gpus else "cpu"]
    start = time.perf_counter()
    fix = "Check that the host's own name resolves, and set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to its network."
    try:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROCESSES_TIMEOUT, env=env)
    except subprocess.TimeoutExpired:
        return fail(f"two processes under torchrun ({backend}) did not connect within {PROCESSES_TIMEOUT} s.", fix)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return fail(f"two processes under torchrun ({backend}) failed: {last}.", fix)
    return ok(f"all-reduce of two processes over {backend} works ({time.perf_counter() - start:.0f} s with start-up)")


def check_run_folder(parent: Path) -> CheckResult:
    """Lock, write, flush, rename and read back a checkpoint in a run's folder, and remove it."""
    if not os.access(parent, os.W_OK):
        return fail(f"{parent} cannot be written.", "Choose another --out.")
    tensors = {"numbers": torch.arange(CHECKPOINT_ELEMENTS, dtype=torch.float32)}
    with (
        tempfile.TemporaryDirectory(prefix=".relicctl-doctor-", dir=parent) as folder,
        closing(RunFolder.create(Path(folder) / "run", overwrite=False, keep=1)) as run,
    ):
        start = time.perf_counter()
        run.save(1, tensors, {})
        seconds = time.perf_counter() - start
        read, _ = checkpoint.load_checkpoint(checkpoint.list_checkpoints(run.checkpoints_dir)[-1])
    if not torch.equal(read["numbers"], tensors["numbers"]):
        return fail(f"a checkpoint in {parent} does not read back as it was written.", "Choose --out on another disk.")
    speed = tensors["numbers"].nbytes / 1e6 / seconds
    if speed < 20:
        return warn(f"{parent} writes only {speed:.0f} MB/s.", "Choose --out on another disk, or save less often.")
    return ok(f"locked, written, flushed, renamed and read in {parent}, {speed:.0f} MB/s")


def main(device: str) -> int:
    """Return the exit code of one of the two processes: 0 when the sum over ranks is right."""
    world = init_distributed(device)
    number = torch.tensor(float(world.rank + 1), device=f"cuda:{world.local_rank}" if device == "cuda" else "cpu")
    dist.all_reduce(number)
    is_right = number.item() == world.size * (world.size + 1) / 2
    destroy_distributed()
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
