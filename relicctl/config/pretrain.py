"""The keys of a pretraining run: type, allowed range, default, meaning and unit of each.

Defaults are the ImageNet set-up (ResNet-50, 4 x 224 + 2 x 96 px views, batch 4096, LARS). Where no source
could be read for a default, its meaning says "our choice".
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import PositiveFloat, model_validator

from relicctl.config import base
from relicctl.config.base import Fraction, Pair, PositiveInt, PositivePair, Section, key
from relicctl.errors import UsageError


class HeadConfig(Section):
    hidden: PositiveInt = key(4096, "units of the hidden layer")
    out: PositiveInt = key(256, "dimensions of the output")


class ModelConfig(base.EncoderConfig):
    bn_momentum: float = key(0.1, "weight of a batch in BatchNorm's running statistics", gt=0, le=1)
    bn_batch: Literal["size", "view"] = key(
        "size",
        "what BatchNorm normalises over: all views of one size together, heads over all views (our choice), "
        "or each view by itself, as in the authors' pseudo-code",
    )
    projector: HeadConfig = key(HeadConfig(), "linear, batch norm, ReLU, linear; on both networks")
    predictor: HeadConfig = key(HeadConfig(), "built like the projector; on the online network only")


class LargeViewsConfig(Section):
    count: PositiveInt = key(4, "large views per image (our choice)")
    size: int = key(224, "side in pixels", ge=8)
    area: Pair = key((0.14, 1.0), "scale of RandomResizedCrop: the crop's fraction of the image's area (our choice)")


class SmallViewsConfig(Section):
    count: int = key(2, "small views per image (our choice)", ge=0)
    size: int = key(96, "side in pixels", ge=8)
    area: Pair = key((0.05, 0.14), "scale of RandomResizedCrop: the crop's fraction of the image's area (our choice)")


class AugmentationConfig(base.ColorConfig):
    """Probabilities and strengths; a pair is for set T and set T', which views take in turn."""

    blur_prob: Pair = key((1.0, 0.1), "probabilities of Gaussian blur")
    solarize_prob: Pair = key((0.0, 0.2), "probabilities of solarizing")


class ViewsConfig(Section):
    large: LargeViewsConfig = key(LargeViewsConfig(), "views that both networks see")
    small: SmallViewsConfig = key(SmallViewsConfig(), "views that only the online network sees")
    ratio: PositivePair = key((0.75, 1.3333333), "range of a crop's width / height, drawn log-uniformly")
    oversized: Literal["redraw", "clamp"] = key(
        "redraw",
        "a drawn crop larger than the image is drawn again, ten times at most, as torchvision does; "
        "or cut to the image's sides, as in the authors' code",
    )
    augment: AugmentationConfig = key(AugmentationConfig(), "flip, colour and blur")


class LossConfig(Section):
    temperature: PositiveFloat = key(0.2, "divides the cosine similarities (our choice)")
    alpha: float = key(1.0, "weight of the likelihood term (our choice)", ge=0)
    beta: float = key(5.0, "weight of the invariance term (our choice)", ge=0)
    negatives: PositiveInt | Literal["all"] = key(10, "negatives per pair from the global batch, or all (our choice)")
    invariance: Literal["transposed", "swapped"] = key(
        "transposed",
        "a pair's likelihood is held equal to that of the same pair read the other way, "
        "or of the swapped pair (our choice)",
    )


class TargetConfig(Section):
    ema: Fraction | Literal["auto"] = key(
        0.996,
        "decay of the target's moving average at the first step; it rises to 1; auto = steps / (steps + 1000) "
        "of a run of so many steps (our choice)",
    )


class BackgroundRemovalConfig(Section):
    probability: Fraction = key(0.1, "probability that a large view is cut from the masked image")
    fill: Literal["mean", "gray", "noise"] = key("mean", "the background: the data's mean, gray or noise (our choice)")
    source: Literal["none", "bank", "alpha"] = key("none", "masks come from nowhere, a mask bank or the alpha channel")
    bank: str | None = key(None, "run of train-bgmask, or its masks.bank, with a mask for every image (also --bgmask)")
    foreground_range: Pair = key(
        (0.01, 0.99), "fractions of the image between which a mask's foreground must lie for it to be used (our choice)"
    )


class OptimConfig(Section):
    name: Literal["lars", "sgd", "adamw"] = key("lars", "optimiser")
    batch_size: int = key(4096, "images per step over all processes", ge=2)
    base_lr: PositiveFloat = key(0.3, "peak learning rate per 256 images of the batch (our choice)")
    weight_decay: float = key(1.5e-6, "decay of weights; biases and norms are excluded (our choice)", ge=0)
    momentum: float = key(0.9, "momentum of lars and sgd, first beta of adamw", ge=0, lt=1)
    warmup_epochs: float = key(10.0, "epochs of linear warm-up before the cosine to 0", ge=0)
    epochs: PositiveInt = key(1000, "passes over the data; they set the schedules")
    max_steps: PositiveInt | None = key(None, "stop after so many steps, the schedules unchanged; null = at the end")
    microbatch: PositiveInt | None = key(
        None,
        "GradCache, not gradient accumulation: images per process that pass the networks at a time, computed twice to "
        "save memory: the loss is that of the "
        "whole batch, BatchNorm is over the microbatch, or those of all processes; null = all at once",
    )


class EvalConfig(Section):
    """kNN and a linear probe during the run, where there are labels; the networks never feel them."""

    every_epochs: int = key(10, "epochs between two evaluations; 0 = never", ge=0)
    val_fraction: float = key(0.0, "fraction of training images (5000 at most) held out without data.val", ge=0, lt=1)
    size: int | None = key(None, "side in pixels of evaluated images; null = views.large.size", ge=8)
    crop_pct: float = key(0.875, "side of the evaluated centre square / the image's short side", gt=0, le=1)
    knn_train_images: PositiveInt = key(20000, "most training images that kNN compares with")
    val_images: PositiveInt = key(10000, "most images that are classified")
    probe: bool = key(True, "train a linear classifier on detached features along the way")


class PretrainRuntimeConfig(base.RuntimeConfig):
    compile: bool | Literal["auto"] = key(
        "auto", "torch.compile the encoders; auto = on one CUDA device, for runs of 10,000 steps and more"
    )
    activation_checkpointing: bool = key(False, "recompute activations in the backward pass: less memory, more time")
    tensorboard: bool = key(False, "write TensorBoard events too (needs the extra `tensorboard`)")


class PretrainConfig(base.CommandConfig):
    """A whole pretraining run. Raises UsageError where keys contradict each other."""

    option_keys: ClassVar[dict[str, str]] = {
        **base.CommandConfig.option_keys,
        "data": "data.train",
        "val": "data.val",
        "bgmask": "bgmask.bank",
    }
    implied_by_option: ClassVar[dict[str, dict[str, Any]]] = {"bgmask": {"bgmask.source": "bank"}}
    implied_values: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "objective": {"relic": {"views.large.count": 2, "views.small.count": 0, "loss.negatives": "all"}}
    }
    unused_keys: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {
        "objective": {
            "byol": ("loss.",),
            "simclr": ("loss.alpha", "loss.beta", "loss.negatives", "loss.invariance", "target.", "model.predictor."),
            "supervised": ("loss.", "target.", "model.projector.", "model.predictor."),
        },
        "bgmask.source": {"none": ("bgmask.probability", "bgmask.fill", "bgmask.foreground_range")},
    }
    harmless_values: ClassVar[dict[str, Any]] = {"bgmask.probability": 0}  # no masks, of a preset that asks for some
    ranges: ClassVar[tuple[str, ...]] = ("views.large.area", "views.small.area", "views.ratio")

    objective: Literal["relicv2", "relic", "simclr", "byol", "supervised"] = key(
        "relicv2", "what is minimised; relic = two large views, no small ones, all negatives"
    )
    model: ModelConfig = key(ModelConfig(), "the networks")
    views: ViewsConfig = key(ViewsConfig(), "crops of an image and their colours")
    loss: LossConfig = key(LossConfig(), "the objective's constants")
    target: TargetConfig = key(TargetConfig(), "the target network")
    bgmask: BackgroundRemovalConfig = key(BackgroundRemovalConfig(), "background removal on large views")
    optim: OptimConfig = key(OptimConfig(), "optimiser and schedules")
    data: base.DataConfig = key(base.DataConfig(), "the images")
    eval: EvalConfig = key(EvalConfig(), "evaluation during the run")
    checkpoint: base.CheckpointConfig = key(base.CheckpointConfig(), "saving")
    runtime: PretrainRuntimeConfig = key(PretrainRuntimeConfig(), "how it is computed; the method is the same")
    seed: int = key(0, "random seed", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check_keys_agree(self) -> PretrainConfig:
        large, small, negatives = self.views.large.count, self.views.small.count, self.loss.negatives
        optim, batch, masks = self.optim, self.optim.batch_size, self.bgmask
        if self.objective == "relic" and (large != 2 or small or negatives != "all"):
            given = f"not {large} large, {small} small and {negatives} negatives."
            what = f"objective relic is two large views, no small ones and all negatives, {given}"
            raise UsageError(what, "Leave the counts of views and loss.negatives unset, or take objective relicv2.")
        if self.objective in ("simclr", "byol") and large + small < 2:
            what = f"objective {self.objective} compares views of an image, but there is only one."
            raise UsageError(what, "Set views.large.count to 2 or more.")
        if self.objective == "relicv2" and negatives != "all" and negatives >= batch:
            what = f"loss.negatives is {negatives}, but a batch of {batch} images has only {batch - 1} others."
            raise UsageError(what, "Lower loss.negatives, set it to all, or raise optim.batch_size.")
        if optim.warmup_epochs > optim.epochs:
            what = f"optim.warmup_epochs {optim.warmup_epochs:g} is longer than the run, {optim.epochs} epochs."
            fix = "Lower optim.warmup_epochs, or cut the run with optim.max_steps instead of optim.epochs."
            raise UsageError(what, fix)
        if optim.microbatch is not None and batch % optim.microbatch:
            what = f"optim.microbatch {optim.microbatch} does not divide optim.batch_size {batch}."
            raise UsageError(what, "Choose an optim.microbatch that divides the batch.")
        if masks.source == "bank" and masks.bank is None:
            raise UsageError("bgmask.source is bank, but no bank is given.", "Give --bgmask RUN or BANK.")
        if masks.source != "bank" and masks.bank is not None:
            what = f"bgmask.bank is {masks.bank}, but bgmask.source is {masks.source}."
            raise UsageError(what, "Set bgmask.source to bank, or leave bgmask.bank out.")
        low, high = masks.foreground_range
        if low > high:
            what = f"bgmask.foreground_range is [{low:g}, {high:g}], which is no range."
            raise UsageError(what, "Give it as [smallest, largest].")
        return self
