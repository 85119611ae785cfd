"""The keys of the dense tasks of a transfer evaluation: segmentation and detection."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from relicctl.config.schema import (
    CheckpointConfig,
    EncoderConfig,
    Fraction,
    PositiveFloat,
    PositiveInt,
    RuntimeConfig,
    Section,
    key,
)
from relicctl.errors import UsageError

Milestones = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Strict(False)]
SideLengths = Annotated[tuple[PositiveInt, ...], Strict(False), Field(min_length=1)]
AnchorSizes = Annotated[tuple[PositiveInt, ...], Strict(False), Field(min_length=5, max_length=5)]
ScaleRange = Annotated[tuple[PositiveFloat, PositiveFloat], Strict(False)]


class DenseEncoderConfig(EncoderConfig):
    """``arch`` to ``padding`` describe the network of ``random`` where no encoder has a run."""

    frozen: bool = key(False, "train the new layers alone; the encoder stays as it is")
    norm: Literal["batch", "frozen"] = key(
        "batch",
        "the encoder's BatchNorm while it is fine-tuned: over the batch, or with statistics and factors as they are",
    )


class DenseDataConfig(Section):
    sets: dict[str, str] = key({}, "data by name, each with train and val (also --data NAME=DATA)")
    cache: Literal["auto", "none", "memory"] = key("auto", "keep decoded images in memory; auto = where they fit")
    max_bad: Fraction = key(0.01, "share of undecodable images or unusable boxes above which the run stops")


class SegmentationDataConfig(DenseDataConfig):
    classes: dict[str, PositiveInt] = key(
        {}, "number of classes by name of data, background among them; else 21 for VOC, or the largest index + 1"
    )
    voc_train: str = key("train", "list in ImageSets/Segmentation of VOC-style data to train on")
    voc_val: str = key("val", "list in ImageSets/Segmentation of VOC-style data to test on")
    voc_masks: str = key("SegmentationClass", "folder of the masks of VOC-style data")


class DetectionDataConfig(DenseDataConfig):
    voc_train: str = key("train", "list in ImageSets/Main of VOC-style data to train on")
    voc_val: str = key("val", "list in ImageSets/Main of VOC-style data to test on")


class DenseOptimConfig(Section):
    """SGD with momentum; the rate falls to a tenth at each of ``drops``."""

    steps: PositiveInt = key(30000, "steps of the training")
    batch_size: PositiveInt = key(16, "images per step; all where there are fewer")
    base_lr: PositiveFloat = key(0.003, "learning rate, not scaled by the batch")
    warmup_steps: int = key(0, "steps over which the rate rises linearly", ge=0)
    drops: Milestones = key((0.7, 0.9), "shares of the steps after which the rate falls to a tenth")
    momentum: float = key(0.9, "SGD's momentum", ge=0, lt=1)
    weight_decay: float = key(1e-4, "weight decay, of all parameters", ge=0)


class DetectionOptimConfig(DenseOptimConfig):
    steps: PositiveInt = key(190000, "steps of the training")
    base_lr: PositiveFloat = key(0.02, "learning rate, not scaled by the batch")
    warmup_steps: int = key(1000, "steps over which the rate rises linearly", ge=0)
    drops: Milestones = key((0.615, 0.846), "shares of the steps after which the rate falls to a tenth")


class SegmentationCropConfig(Section):
    size: int = key(513, "side in pixels of the square images that are trained on", ge=16)
    scale: ScaleRange = key((0.5, 2.0), "range of the factor by which an image is resized before it is cropped")
    flip: Fraction = key(0.5, "probability of a horizontal flip")


class SegmentationHeadConfig(Section):
    """Two 3x3 convolutions, each with BatchNorm and ReLU, and a 1x1 convolution to the classes."""

    channels: PositiveInt = key(256, "channels of the two convolutions")
    dilation: PositiveInt = key(6, "their dilation")


class DetectionImageConfig(Section):
    short: SideLengths = key(
        (800,), "sides in pixels that the shorter side is resized to, drawn in training; tests: last"
    )
    long: PositiveInt = key(1333, "most pixels of the longer side")
    flip: Fraction = key(0.5, "probability of a horizontal flip")


class DetectorConfig(Section):
    """torchvision's Faster R-CNN on a feature pyramid."""

    channels: PositiveInt = key(256, "channels of the pyramid")
    hidden: PositiveInt = key(1024, "units of the box head's two layers")
    anchors: AnchorSizes = key(
        (32, 64, 128, 256, 512), "sides in pixels of the anchors, one for each of the pyramid's five levels"
    )
    proposals_train: PositiveInt = key(
        2000, "proposals kept per level before and per image after suppression, in training"
    )
    proposals_test: PositiveInt = key(1000, "the same in testing")
    regions: PositiveInt = key(512, "regions per image that the box head is trained on")


class SegmentationConfig(Section):
    """A whole evaluation by semantic segmentation."""

    model: DenseEncoderConfig = key(DenseEncoderConfig(), "the encoder")
    data: SegmentationDataConfig = key(SegmentationDataConfig(), "the data sets")
    crop: SegmentationCropConfig = key(SegmentationCropConfig(), "training images")
    head: SegmentationHeadConfig = key(
        SegmentationHeadConfig(), "new layers on the encoder, whose last stage is dilated"
    )
    optim: DenseOptimConfig = key(DenseOptimConfig(), "optimiser and schedule")
    checkpoint: CheckpointConfig = key(CheckpointConfig(), "saving")
    runtime: RuntimeConfig = key(RuntimeConfig(), "how it is computed; the method is the same")
    seed: int = key(0, "of every random draw", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check_keys_agree(self) -> SegmentationConfig:
        low, high = self.crop.scale
        if low > high:
            raise UsageError(
                f"crop.scale is [{low:g}, {high:g}], which is no range.", "Give crop.scale as [smallest, largest]."
            )
        return self


class DetectionConfig(Section):
    """A whole evaluation by object detection."""

    model: DenseEncoderConfig = key(DenseEncoderConfig(norm="frozen"), "the encoder")
    data: DetectionDataConfig = key(DetectionDataConfig(), "the data sets")
    images: DetectionImageConfig = key(DetectionImageConfig(), "how images are shown")
    head: DetectorConfig = key(DetectorConfig(), "new layers on the encoder")
    optim: DetectionOptimConfig = key(DetectionOptimConfig(), "optimiser and schedule")
    checkpoint: CheckpointConfig = key(CheckpointConfig(), "saving")
    runtime: RuntimeConfig = key(RuntimeConfig(), "how it is computed; the method is the same")
    seed: int = key(0, "of every random draw", ge=0, lt=2**63)
