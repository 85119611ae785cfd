"""The keys of a transfer evaluation: classification on other data, segmentation and detection."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, Strict

from relicctl.config import base
from relicctl.config.base import Fraction, Pair, PositiveFloats, PositiveInt, PositiveInts, PositivePair, Section, key

Metric = Literal["top1", "mean_per_class", "map11"]
Protocols = Annotated[tuple[Literal["logistic", "knn", "finetune"], ...], Strict(False), Field(min_length=1)]
LabelSubsets = Annotated[tuple[str | float, ...], Strict(False), Field(min_length=1)]
WeightDecays = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Strict(False), Field(min_length=1)]
SamplesPerClass = Annotated[tuple[PositiveInt, ...], Strict(False), Field(min_length=1, max_length=2)]
LAMBDAS = tuple(float(f"{10 ** (-6 + 11 * k / 44):.6g}") for k in range(45))  # log-spaced from 1e-6 to 1e5
Milestones = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Strict(False)]
AnchorSizes = Annotated[tuple[PositiveInt, ...], Strict(False), Field(min_length=5, max_length=5)]
MaskValue = Annotated[int, Field(ge=0, le=65535)]
ClassIndex = Annotated[int, Field(ge=0, le=255)]
OPTION_KEYS = {**base.CommandConfig.option_keys, "data": "data.datasets"}


class DenseEncoderConfig(base.EncoderConfig):
    """``arch`` to ``padding`` describe the network of ``random`` where no encoder has a run."""

    freeze_encoder: bool = key(False, "train the new layers alone; the encoder stays as it is")
    freeze_bn: bool = key(
        False, "the encoder's BatchNorm keeps its statistics and factors while it is fine-tuned; false = over the batch"
    )


class DenseDataConfig(Section):
    datasets: dict[str, str] = key({}, "data by name, each with train and val (also --data NAME=DATA)")
    cache: Literal["auto", "none", "memory"] = key("auto", "keep decoded images in memory; auto = where they fit")
    max_corrupt_fraction: Fraction = key(0.01, "fraction of undecodable images or bad boxes above which the run stops")
    decoding: base.DecodingConfig = key(base.DecodingConfig(), "how image files are read")


class SegmentationDataConfig(DenseDataConfig):
    classes: dict[str, PositiveInt] = key(
        {}, "number of classes by name of data, background among them; else 21 for VOC, or the largest index + 1"
    )
    mask_values: dict[str, dict[MaskValue, ClassIndex]] = key(
        {},
        "class of each value in the masks by name of data, such as {0: 0, 255: 1}, other values being ignored; else a "
        "value is its class, and 255 is ignored",
    )
    voc_train: str = key("train", "list in ImageSets/Segmentation of VOC-style data to train on")
    voc_val: str = key("val", "list in ImageSets/Segmentation of VOC-style data to test on")
    voc_masks: str = key("SegmentationClass", "folder of the masks of VOC-style data")


class DetectionDataConfig(DenseDataConfig):
    voc_train: str = key("train", "list in ImageSets/Main of VOC-style data to train on")
    voc_val: str = key("val", "list in ImageSets/Main of VOC-style data to test on")


class DenseOptimConfig(Section):
    """SGD with momentum; the learning rate falls to a tenth at each of ``milestones``."""

    steps: PositiveInt = key(30000, "steps of the training")
    batch_size: PositiveInt = key(16, "images per step; all where there are fewer")
    base_lr: PositiveFloat = key(0.003, "learning rate, not scaled by the batch")
    warmup_steps: int = key(0, "steps over which the learning rate rises linearly", ge=0)
    milestones: Milestones = key((0.7, 0.9), "fractions of the steps after which the learning rate falls tenfold")
    momentum: float = key(0.9, "SGD's momentum", ge=0, lt=1)
    weight_decay: float = key(1e-4, "weight decay, of all parameters", ge=0)


class DetectionOptimConfig(DenseOptimConfig):
    steps: PositiveInt = key(190000, "steps of the training")
    base_lr: PositiveFloat = key(0.02, "learning rate, not scaled by the batch")
    warmup_steps: int = key(1000, "steps over which the learning rate rises linearly", ge=0)
    milestones: Milestones = key((0.615, 0.846), "fractions of the steps after which the learning rate falls tenfold")


class SegmentationCropConfig(Section):
    size: int = key(513, "side in pixels of the square images that are trained on", ge=16)
    scale: PositivePair = key((0.5, 2.0), "range of the factor by which an image is resized before it is cropped")
    hflip_prob: Fraction = key(0.5, "probability of a horizontal flip")


class SegmentationHeadConfig(Section):
    """Two 3x3 convolutions, each with BatchNorm and ReLU, and a 1x1 convolution to the classes."""

    channels: PositiveInt = key(256, "channels of the two convolutions")
    dilation: PositiveInt = key(6, "their dilation")


class DetectionImageConfig(Section):
    min_size: PositiveInts = key((800,), "pixels that the shorter side is resized to, drawn in training; tests: last")
    max_size: PositiveInt = key(1333, "most pixels of the longer side")
    hflip_prob: Fraction = key(0.5, "probability of a horizontal flip")


class DetectorConfig(Section):
    """torchvision's Faster R-CNN on a feature pyramid."""

    channels: PositiveInt = key(256, "channels of the pyramid")
    hidden: PositiveInt = key(1024, "units of the box head's two layers")
    anchors: AnchorSizes = key((32, 64, 128, 256, 512), "sides in pixels of the anchors of the pyramid's five levels")
    rpn_post_nms_top_n_train: PositiveInt = key(
        2000, "proposals kept per level before and per image after suppression, in training"
    )
    rpn_post_nms_top_n_test: PositiveInt = key(1000, "the same in testing")
    box_batch_size_per_image: PositiveInt = key(512, "regions per image that the box head is trained on")


class SegmentationConfig(base.CommandConfig):
    """A whole evaluation by semantic segmentation."""

    option_keys: ClassVar[dict[str, str]] = OPTION_KEYS
    ranges: ClassVar[tuple[str, ...]] = ("crop.scale",)

    model: DenseEncoderConfig = key(DenseEncoderConfig(), "the encoder")
    data: SegmentationDataConfig = key(SegmentationDataConfig(), "the data sets")
    crop: SegmentationCropConfig = key(SegmentationCropConfig(), "training images")
    head: SegmentationHeadConfig = key(SegmentationHeadConfig(), "new layers on the encoder, its last stage dilated")
    optim: DenseOptimConfig = key(DenseOptimConfig(), "optimiser and schedule")
    checkpoint: base.CheckpointConfig = key(base.CheckpointConfig(), "saving")
    runtime: base.RuntimeConfig = key(base.RuntimeConfig(), "how it is computed; the method is the same")
    seed: int = key(0, "random seed", ge=0, lt=2**63)


class DetectionConfig(base.CommandConfig):
    """A whole evaluation by object detection."""

    option_keys: ClassVar[dict[str, str]] = OPTION_KEYS

    model: DenseEncoderConfig = key(DenseEncoderConfig(freeze_bn=True), "the encoder")
    data: DetectionDataConfig = key(DetectionDataConfig(), "the data sets")
    images: DetectionImageConfig = key(DetectionImageConfig(), "how images are shown")
    head: DetectorConfig = key(DetectorConfig(), "new layers on the encoder")
    optim: DetectionOptimConfig = key(DetectionOptimConfig(), "optimiser and schedule")
    checkpoint: base.CheckpointConfig = key(base.CheckpointConfig(), "saving")
    runtime: base.RuntimeConfig = key(base.RuntimeConfig(), "how it is computed; the method is the same")
    seed: int = key(0, "random seed", ge=0, lt=2**63)


class TransferDataConfig(Section):
    datasets: dict[str, str] = key({}, "data by name, each with train, perhaps val, and test (also --data NAME=DATA)")
    metrics: dict[str, Metric] = key({}, "metric by name of data; where not given, what papers report on it, else top1")
    val_fraction: float = key(
        0.2, "fraction of each class to validate on without val, and to test on without splits (our choice)", gt=0, lt=1
    )
    test_split: dict[str, str] = key({}, "split to test on by name of data; where not given, test")
    samples_per_class: dict[str, SamplesPerClass] = key(
        {},
        "for data without splits, by name: images of each class to train on, and optionally to test on, else all "
        "others; drawn by the seed (our choice)",
    )
    cache: Literal["auto", "none", "memory", "device"] = key(
        "auto", "keep decoded images while fine-tuning, in host memory or on the device; auto = where they fit"
    )
    max_corrupt_fraction: Fraction = key(
        0.01, "fraction of undecodable images above which the run stops; three are allowed in any case, unless it is 0"
    )
    decoding: base.DecodingConfig = key(base.DecodingConfig(), "how image files are read")


class EvalCropConfig(Section):
    size: int | None = key(None, "side in pixels of the images; null = what each encoder was trained for", ge=8)
    crop_pct: float | None = key(None, "centre crop's side / image's short side; null = the encoder's own", gt=0, le=1)


class LogisticConfig(Section):
    l2: PositiveFloats = key(
        LAMBDAS, "penalties to choose from: lambda / 2 |W|^2 beside the summed cross-entropy, 1 / C of scikit-learn"
    )


class KnnConfig(Section):
    k: PositiveInts = key((20, 200), "numbers of neighbours to choose from")


class FinetuneConfig(Section):
    """SGD with Nesterov's momentum, cosine to 0; a grid of learning rates, decays and lengths, the best retrained."""

    lrs: PositiveFloats = key((0.01, 0.03, 0.1), "learning rates, not scaled by the batch (our choice)")
    weight_decays: WeightDecays = key((0.0,), "weight decays, of all parameters (our choice)")
    steps: PositiveInt = key(1000, "steps of each training (our choice)")
    epochs: PositiveInts | None = key(None, "lengths to choose from in passes over the labelled images; null = steps")
    batch_size: PositiveInt = key(64, "images per step; all where there are fewer (our choice)")
    momentum: float = key(0.9, "Nesterov's momentum", gt=0, lt=1)
    scale: Pair = key((0.08, 1.0), "scale of RandomResizedCrop: the crop's fraction of the image's area (our choice)")
    ratio: PositivePair = key((0.75, 1.3333333), "range of the crop's width / height, drawn log-uniformly")
    hflip_prob: Fraction = key(0.5, "probability of a horizontal flip")


class TransferConfig(base.CommandConfig):
    """A whole transfer evaluation: every protocol with every amount of labels on every data set."""

    option_keys: ClassVar[dict[str, str]] = {**OPTION_KEYS, "protocol": "protocol", "labels": "labels"}
    ranges: ClassVar[tuple[str, ...]] = ("finetune.scale", "finetune.ratio")

    protocol: Protocols = key(("logistic",), "logistic, knn on frozen features; finetune trains all (also --protocol)")
    labels: LabelSubsets = key(("all",), "labels used: all, a fraction, N-per-class or a file of names (also --labels)")
    model: base.EncoderConfig = key(base.EncoderConfig(), "the network of `random` given first; else like the first")
    data: TransferDataConfig = key(TransferDataConfig(), "the data sets")
    eval: EvalCropConfig = key(EvalCropConfig(), "how images are shown")
    logistic: LogisticConfig = key(LogisticConfig(), "logistic regression")
    knn: KnnConfig = key(KnnConfig(), "nearest neighbours")
    finetune: FinetuneConfig = key(FinetuneConfig(), "fine-tuning")
    checkpoint: base.CheckpointConfig = key(base.CheckpointConfig(), "saving while fine-tuning")
    runtime: base.RuntimeConfig = key(base.RuntimeConfig(), "how it is computed; the method is the same")
    seed: int = key(0, "random seed", ge=0, lt=2**63)
