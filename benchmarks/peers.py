"""relicctl beside its peers: same images, same views, same networks, one process, taking turns.

Needs lightly (pip install lightly). Our colour half is counted twice: left out, since a GPU does it, and done by
this core as well. The step is a BYOL step: lightly's building blocks view by view, as its examples write it; on a CUDA
device, where there is one, with ResNet-50 at 224 px in bf16 for both.
"""

from __future__ import annotations

import copy
import io
import json
import os
import time
from collections.abc import Callable

import lightly
import numpy as np
import torch
import torchvision
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import SwaVTransform
from PIL import Image
from turns import PLAN, device_clock, our_host, photos, pil_pipeline, ratio, take_turns

from relicctl.config.resolve import resolve_config
from relicctl.data.augment import apply_augmentations
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.photometric import draw_augment_params
from relicctl.data.views import Batch
from relicctl.pretraining.task import PretrainTask, Schedule

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ARCH, BATCH, PIXELS = ("resnet50", 128, 224) if CUDA else ("resnet18", 16, 96)


def lightly_pipeline(source: ImageDataset) -> Callable[[], object]:
    large, small = PLAN.crops
    transform = SwaVTransform(
        crop_sizes=(large.size, small.size),
        crop_counts=(large.count, small.count),
        crop_min_scales=(large.area[0], small.area[0]),
        crop_max_scales=(large.area[1], small.area[1]),
        cj_strength=0.5,
        gaussian_blur=0.55,
    )

    def run() -> None:
        for index in range(len(source)):
            transform(Image.open(io.BytesIO(source.read(index))).convert("RGB"))

    return run


def both_halves(source: ImageDataset) -> Callable[[], object]:
    host = our_host(source)

    def run() -> None:
        draw = draw_augment_params(PLAN.augment, 0, 0, np.arange(len(source)), PLAN.count)
        first = 0
        for size, crops in zip(PLAN.crops, host(), strict=True):
            apply_augmentations(torch.from_numpy(crops), draw[first : first + size.count])
            first += size.count

    return run


def our_step(views: torch.Tensor) -> Callable[[], object]:
    sets = [f"optim.batch_size={BATCH}", "optim.name=sgd", f"model.arch={ARCH}", "objective=byol",
            "views.small.count=0", "views.large.count=2", f"views.large.size={PIXELS}"]  # fmt: skip
    config = resolve_config(None, None, sets, {}).config
    task = PretrainTask(
        config, Schedule(config, 10, 1000), classes=0, device=DEVICE, precision="bf16" if CUDA else "fp32"
    )

    def run() -> None:
        task.compute_loss(Batch([views], None), 0)["loss"].backward()
        task.optimizer.step()
        task.optimizer.zero_grad()
        task.after_step(0)

    return run


def lightly_step(views: torch.Tensor) -> Callable[[], object]:
    layers = list(getattr(torchvision.models, ARCH)().children())[:-1]
    encoder = torch.nn.Sequential(*layers, torch.nn.Flatten()).to(DEVICE)
    head = BYOLProjectionHead(2048 if CUDA else 512, 4096, 256).to(DEVICE)
    predictor = BYOLPredictionHead(256, 4096, 256).to(DEVICE)
    slow_encoder, slow_head = copy.deepcopy(encoder), copy.deepcopy(head)
    deactivate_requires_grad(slow_encoder)
    deactivate_requires_grad(slow_head)
    criterion = NegativeCosineSimilarity()
    trained = [p for part in (encoder, head, predictor) for p in part.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.06, momentum=0.9)

    def run() -> None:
        update_momentum(encoder, slow_encoder, m=0.99)
        update_momentum(head, slow_head, m=0.99)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            outputs = [predictor(head(encoder(view))) for view in views]
            slow = [slow_head(slow_encoder(view)).detach() for view in views]
        loss = 0.5 * (criterion(outputs[0], slow[1]) + criterion(outputs[1], slow[0]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    torch.set_num_threads(1)
    source = photos()
    images = len(source)
    data = take_turns(
        {
            "PIL": pil_pipeline(source),
            "lightly": lightly_pipeline(source),
            "host": our_host(source),
            "host and colour": both_halves(source),
        }
    )
    views = torch.randn(2, BATCH, 3, PIXELS, PIXELS, device=DEVICE)
    clock = device_clock if CUDA else time.process_time
    step = take_turns({"lightly": lightly_step(views), "relicctl": our_step(views)}, clock=clock)
    result = {
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "lightly": lightly.__version__,
        },
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "load": os.getloadavg()[0],
        "images_per_core_second": {n: [round(images / s, 1) for s in taken] for n, taken in data.items()},
        "PIL to host": ratio(data["PIL"], data["host"]),
        "PIL to host and colour": ratio(data["PIL"], data["host and colour"]),
        "lightly to host": ratio(data["lightly"], data["host"]),
        "lightly to host and colour": ratio(data["lightly"], data["host and colour"]),
        "BYOL step, seconds": {name: [round(s, 3) for s in taken] for name, taken in step.items()},
        "lightly to relicctl, BYOL step": ratio(step["lightly"], step["relicctl"]),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
