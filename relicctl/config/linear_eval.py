"""The keys of a linear evaluation: a linear classifier on frozen features."""

from __future__ import annotations

from typing import ClassVar, Literal

from relicctl.config import base
from relicctl.config.base import Fraction, PositiveFloats, PositiveInt, Section, key

LEARNING_RATES = tuple(float(f"{10 ** (-4 + 4 * k / 19):.3g}") for k in range(20))  # log-spaced from 1e-4 to 1


class RandomCropConfig(base.CropConfig):
    hflip_prob: Fraction = key(0.5, "probability of a horizontal flip")


class SweepConfig(Section):
    lrs: PositiveFloats = key(
        LEARNING_RATES, "learning rates per 256 images of the batch, all trained at once; one = no choice (our choice)"
    )
    val_fraction: float = key(0.1, "fraction of the training images on which the learning rate is chosen", gt=0, lt=1)


class LinearOptimConfig(Section):
    """SGD with Nesterov's momentum, cosine to 0, no warm-up, no weight decay."""

    batch_size: PositiveInt = key(256, "images per step; protocol fast takes all where there are fewer (our choice)")
    momentum: float = key(0.9, "Nesterov's momentum", gt=0, lt=1)
    epochs: PositiveInt = key(50, "passes over the data; they set the schedule (our choice)")
    max_steps: PositiveInt | None = key(None, "stop after so many steps, the schedule unchanged; null = at the end")


class LinearTestConfig(Section):
    val_fraction: float = key(
        0.0,
        "fraction of training images (5000 at most) to test on without data.val (0.1 of files unless set)",
        ge=0,
        lt=1,
    )
    size: int | None = key(None, "side in pixels of the images; null = what the encoder was trained for", ge=8)
    crop_pct: float | None = key(None, "centre crop's side / image's short side; null = the encoder's own", gt=0, le=1)


class AnalysisConfig(Section):
    images: int = key(2000, "most test images in --analysis, the first of a seeded shuffle", ge=10)


class LinearEvalConfig(base.CommandConfig):
    """A whole linear evaluation. Raises UsageError where keys contradict each other."""

    option_keys: ClassVar[dict[str, str]] = {**base.CommandConfig.option_keys, "data": "data.train", "val": "data.val"}
    unused_keys: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {
        "protocol": {"fast": ("crop.", "data.cache", "runtime.precision")}
    }
    ranges: ClassVar[tuple[str, ...]] = ("crop.scale", "crop.ratio")

    protocol: Literal["fast", "imagenet"] = key(
        "fast", "fast: standardised features, extracted once; imagenet: features of random crops and flips"
    )
    model: base.EncoderConfig = key(base.EncoderConfig(), "the network of `random`; other encoders bring their own")
    crop: RandomCropConfig = key(RandomCropConfig(), "training images of protocol imagenet")
    sweep: SweepConfig = key(SweepConfig(), "the learning rate")
    optim: LinearOptimConfig = key(LinearOptimConfig(), "optimiser and schedule")
    data: base.DataConfig = key(base.DataConfig(), "the images; those of the encoder's run where not given")
    eval: LinearTestConfig = key(LinearTestConfig(), "testing")
    analysis: AnalysisConfig = key(AnalysisConfig(), "cluster analysis")
    checkpoint: base.CheckpointConfig = key(base.CheckpointConfig(), "saving")
    runtime: base.RuntimeConfig = key(base.RuntimeConfig(), "how it is computed; the method is the same")
    seed: int = key(0, "random seed", ge=0, lt=2**63)
