"""A GPU's step in its ways: photometry by plain operations or kernels, networks as they are or compiled.

Milliseconds, median and spread of five rounds in which the ways take turns, after one that is not counted.
On a CPU, at a small size, it is a rehearsal.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from turns import device_clock, take_turns

from relicctl.config.resolve import resolve_config
from relicctl.core.loop import record_nonfinite
from relicctl.data import augment
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.data.photometric import AugmentConfig, draw_augment_params
from relicctl.data.views import Batch
from relicctl.pretraining.task import PretrainTask, Schedule

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROOMY = CUDA and torch.cuda.mem_get_info()[1] > 100 * 2**30
# preset, batch, views of each size (how many, pixels)
SETUPS: list[tuple[str, int, list[tuple[int, int]]]] = [
    ("r50-1000ep", 256 if ROOMY else 128, [(4, 224), (2, 96)]),
    ("cifar10-r18", 512, [(2, 32)]),
]
if not CUDA:
    SETUPS = [("r50-1000ep", 12, [(4, 48), (2, 32)]), ("cifar10-r18", 16, [(2, 32)])]


def photometry(batch: int, count: int, size: int) -> dict[str, Callable[[], object]]:
    crops = torch.randint(0, 256, (count, batch, size, size, 3), dtype=torch.uint8, device=DEVICE).movedim(-1, 2)
    draw = draw_augment_params(AugmentConfig(), 0, 0, np.arange(batch), count)
    ways = {"plain": lambda: augment._apply_torch(crops, draw, IMAGENET_MEAN, IMAGENET_STD)}
    kernels = augment.load_triton_kernels(crops.device)
    return ways | ({"kernels": lambda: kernels.apply(crops, draw, IMAGENET_MEAN, IMAGENET_STD)} if kernels else {})


def step(preset: str, batch: int, views: list[torch.Tensor], compiled: bool, trials: bool) -> Callable[[], object]:
    """``trials``: cuDNN tries its convolutions and takes the fastest."""
    sets = [f"optim.batch_size={batch}", "bgmask.probability=0", f"runtime.compile={str(compiled).lower()}"]
    sets += ["views.small.count=0"] if len(views) == 1 else []
    config = resolve_config(preset, None, sets, {}).config
    task = PretrainTask(
        config, Schedule(config, 10, 1000), classes=0, device=DEVICE, precision="bf16" if CUDA else "fp32"
    )
    parameters = [p for group in task.optimizer.param_groups for p in group["params"]]
    bad_step = torch.full((), -1, dtype=torch.int64, device=DEVICE)

    def run() -> None:
        torch.backends.cudnn.benchmark = trials
        losses = task.compute_loss(Batch(views, None), 0)
        losses["loss"].backward()
        record_nonfinite(bad_step, 0, [losses["loss"].detach(), *(p.grad for p in parameters)])
        task.optimizer.step()
        task.optimizer.zero_grad(set_to_none=True)
        task.after_step(0)

    return run


def summarize(seconds: dict[str, list[float]]) -> dict[str, Any]:
    in_ms = {way: [1000 * s for s in taken] for way, taken in seconds.items()}
    return {way: [round(f(ms), 3) for f in (statistics.median, min, max)] for way, ms in in_ms.items()}


def main() -> None:
    clock = {"clock": device_clock} if CUDA else {}
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else "cpu", "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }  # fmt: skip
    for preset, batch, sizes in SETUPS:
        views = [torch.randn(count, batch, 3, size, size, device=DEVICE) for count, size in sizes]
        steps = {
            "as it is": step(preset, batch, views, False, False),
            "as it is, cuDNN's trials": step(preset, batch, views, False, True),
            "compiled": step(preset, batch, views, True, False),
            "compiled, cuDNN's trials": step(preset, batch, views, True, True),
        }
        result[preset] = {
            "batch": batch,
            "step": summarize(take_turns(steps, **clock)),
            **{
                f"photometry {count} x {size}": summarize(take_turns(photometry(batch, count, size), **clock))
                for count, size in sizes
            },
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
