"""On a CUDA device: the step never makes the host wait, and computes what the CPU computes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from relicctl.config.resolve import resolve_config
from relicctl.core.loop import record_nonfinite
from relicctl.core.optim import LARS
from relicctl.data import augment
from relicctl.data.augment import apply_augmentations
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.decoding import BadImages
from relicctl.data.loader import LoaderConfig, ViewLoader
from relicctl.data.photometric import AugmentConfig, draw_augment_params
from relicctl.data.sampler import Sampler
from relicctl.data.views import Batch, CropSpec, ViewSpec
from relicctl.pretraining.task import PretrainTask, Schedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BATCH = 16
SMALL = [
    "model.arch=resnet18", "model.width=0.25", "model.stem=cifar", "model.projector.hidden=64",
    "model.predictor.hidden=64", "views.large.count=2", "views.large.size=32", "views.small.count=1",
    "views.small.size=24", f"optim.batch_size={BATCH}", "optim.warmup_epochs=0",
]  # fmt: skip


def task(device: str, precision: str = "fp32", *more: str) -> PretrainTask:
    config = resolve_config(None, None, [*SMALL, *more], {}).config
    return PretrainTask(config, Schedule(config, 10, 100), classes=0, device=torch.device(device), precision=precision)


def views(device: str) -> Batch:
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(count, BATCH, 3, size, size, generator=draw) for count, size in ((2, 32), (1, 24))]
    return Batch([view.to(device) for view in made], None)


@pytest.fixture
def exact_float32():
    """Matrix products and convolutions in float32 itself, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("negatives", ["10", "all"])
def test_the_host_never_waits_for_a_step(negatives):
    trained, batch = task("cuda", "bf16", f"loss.negatives={negatives}"), views("cuda")
    parameters = [p for group in trained.optimizer.param_groups for p in group["params"]]
    bad_step = torch.full((), -1, dtype=torch.int64, device="cuda")

    def step(number: int) -> None:
        losses = trained.compute_loss(batch, number)
        losses["loss"].backward()
        record_nonfinite(bad_step, number, [losses["loss"].detach(), *(p.grad for p in parameters)])
        trained.optimizer.step()
        trained.optimizer.zero_grad(set_to_none=True)
        trained.after_step(number)

    step(0)  # libraries load and choose their kernels, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_device_road_of_the_feed_never_waits():
    source = ShapesDataset.from_spec("shapes:train=64", "train")
    plan = ViewSpec((CropSpec(2, 32, (0.3, 1.0)),), (0.75, 1.33), AugmentConfig())
    feed = ViewLoader(
        source, Sampler(0, len(source), BATCH), plan,
        LoaderConfig(0, torch.device("cuda"), cache="device"), BadImages(len(source), 0.0),
    )  # fmt: skip
    batches = feed.iter_from_step(0, 3)
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_road_brings_the_cpus_batches():
    """Copies run on a stream of their own: with the device busy, no batch may be read before it has come."""
    source = ShapesDataset.from_spec("shapes:train=64", "train")
    plan = ViewSpec((CropSpec(2, 32, (0.3, 1.0)), CropSpec(1, 24, (0.05, 0.3))), (0.75, 1.33), AugmentConfig())
    here, there = (
        ViewLoader(
            source, Sampler(0, len(source), BATCH), plan,
            LoaderConfig(0, torch.device(device), workers=1), BadImages(len(source), 0.0),
        ).iter_from_step(0, 8)
        for device in ("cpu", "cuda")
    )  # fmt: skip
    load = torch.randn(4096, 4096, device="cuda")
    for ours, theirs in zip(here, there, strict=True):
        for _ in range(20):
            load = (load @ load).clamp_(-1, 1)
        for mine, yours in zip(ours.views, theirs.views, strict=True):
            torch.testing.assert_close(yours.cpu(), mine, atol=1e-4, rtol=1e-4)


def test_loss_and_gradient_are_those_of_the_cpu():
    """In float64: through BatchNorm float32 loses so many digits that a CPU's own gradients are 1 % off.

    All negatives, since the two devices draw from generators of their own.
    """
    here, there = task("cpu", "fp32", "loss.negatives=all"), task("cuda", "fp32", "loss.negatives=all")
    there.model.load_state_dict(here.model.state_dict())
    losses = []
    for made, device in ((here, "cpu"), (there, "cuda")):
        made.model.double()
        losses.append(made.compute_loss(Batch([view.double() for view in views(device).views], None), 0)["loss"])
        losses[-1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-12)
    for (name, ours), theirs in zip(here.model.online.named_parameters(), there.model.online.parameters(), strict=True):
        # a bias before a BatchNorm has no gradient but rounding
        assert (theirs.grad.cpu() - ours.grad).norm() <= 1e-9 * ours.grad.norm() + 1e-12, name


@pytest.mark.usefixtures("exact_float32")
def test_the_loss_in_float32_is_that_of_the_cpu():
    here, there = task("cpu", "fp32", "loss.negatives=all"), task("cuda", "fp32", "loss.negatives=all")
    there.model.load_state_dict(here.model.state_dict())
    losses = [made.compute_loss(views(device), 0)["loss"].item() for made, device in ((here, "cpu"), (there, "cuda"))]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_lars_is_that_of_the_cpu():
    draw = np.random.default_rng(0)
    weights = [torch.from_numpy(draw.normal(size=shape).astype(np.float32)) for shape in ((8, 4), (8,), (3, 3))]
    gradients = [torch.from_numpy(draw.normal(size=w.shape).astype(np.float32)) for w in weights]
    ends = []
    for device in ("cpu", "cuda"):
        parameters = [torch.nn.Parameter(w.to(device, copy=True)) for w in weights]
        optimizer = LARS([{"params": parameters, "weight_decay": 1e-2, "adapt": True}], lr=0.3, momentum=0.9)
        for _ in range(3):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.to(device)
            optimizer.step()
        ends.append([p.detach().cpu() for p in parameters])
    torch.testing.assert_close(ends[1], ends[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_bf16_and_compilation_keep_the_loss(compiled):
    """bf16 keeps 8 bits: the loss, a mean over many pairs, within 2 %."""
    plain = task("cuda", "fp32", "loss.negatives=all")
    other = task("cuda", "bf16", "loss.negatives=all", f"runtime.compile={compiled}")
    other.model.load_state_dict(copy.deepcopy(plain.model.state_dict()))
    expected, made = (t.compute_loss(views("cuda"), 0)["loss"].item() for t in (plain, other))
    assert made == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("size", [32, 97, 224])
@pytest.mark.parametrize("resident", [False, True])
def test_the_photometry_is_that_of_the_cpu(size, resident):
    """Float32: 1e-4 of a normalised grey level, a fortieth of a step of eight bits."""
    draw = draw_augment_params(AugmentConfig(color_jitter_prob=0.9, solarize_prob=(0.2, 0.5)), 0, 3, np.arange(40), 2)
    images = torch.randint(0, 256, (2, 40, size, size, 3), dtype=torch.uint8).movedim(-1, 2)
    if resident:
        images = images.float().div(255).contiguous()
    there = apply_augmentations(images.cuda(), draw).cpu()
    torch.testing.assert_close(there, apply_augmentations(images, draw), atol=1e-4, rtol=0)


def test_the_photometry_runs_as_kernels():
    pytest.importorskip("triton")
    images = torch.zeros(2, 4, 3, 8, 8, dtype=torch.uint8, device="cuda")
    assert augment.load_triton_kernels(images.device).is_supported(images)
