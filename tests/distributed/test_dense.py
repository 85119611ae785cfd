"""Law: two processes train a segmenter as one does, though the pixels that count are shared out unevenly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing

from relicctl.config.resolve import resolve_config
from relicctl.config.transfer import SegmentationConfig
from relicctl.core.distributed import World, destroy_distributed, init_distributed
from relicctl.data.constants import IMAGENET_MEAN, IMAGENET_STD
from relicctl.evaluation.dense.segmentation import SegmentationTask
from tests.helpers.ports import free_ports
from tests.helpers.runs import cpu_context, lively_encoder

TINY = ["head.channels=8", "head.dilation=1", "optim.base_lr=0.1"]


def train(world: World) -> dict[str, np.ndarray]:
    """Everything the network holds after three steps, in float64."""
    encoder = lively_encoder("resnet18", 0.125, "stride2").double()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1
    encoder.metadata = {"mean": json.dumps(IMAGENET_MEAN), "std": json.dumps(IMAGENET_STD)}
    config = resolve_config(sets=TINY, schema=SegmentationConfig).config
    torch.set_default_dtype(torch.float64)
    task = SegmentationTask(encoder, 3, config, cpu_context(world))
    first, last = world.get_local_rows(4)
    for step in range(3):
        generator = np.random.default_rng(step)
        images = torch.from_numpy(generator.integers(0, 256, (4, 16, 16, 3), np.uint8))
        masks = torch.from_numpy(generator.integers(0, 3, (4, 16, 16)).astype(np.uint8))
        masks[0, 2:], masks[1, :7] = 255, 255
        task.compute_loss((images[first:last], masks[first:last]), step)["loss"].backward()
        task.optimizer.step()
        task.optimizer.zero_grad()
    torch.set_default_dtype(torch.float32)
    return {name: t.numpy() for name, t in task.model.state_dict().items()}


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    np.savez(Path(folder) / f"{rank}.npz", **train(init_distributed("cpu")))
    destroy_distributed()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    (port,) = free_ports(1)
    torch.multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=2)
    one = train(World())
    for rank in range(2):
        several = np.load(tmp_path / f"{rank}.npz")
        assert set(several) == set(one)
        for name, array in one.items():
            np.testing.assert_allclose(several[name], array, rtol=1e-6, atol=1e-9, err_msg=name)
