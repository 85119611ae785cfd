"""The keys of ``train-bgmask``: from unlabelled photos to a background mask for every one of them.

The pipeline follows DeepUSPS (arXiv 1909.13055) without any supervised weight. The defaults are our choices.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, PositiveFloat, Strict, model_validator

from relicctl.config import base
from relicctl.config.base import Fraction, Pair, PositiveFloats, PositiveInt, Section, key
from relicctl.errors import UsageError

# One DATA may stand alone, as in the other commands' configs.
DataSpecs = Annotated[
    tuple[str, ...], Strict(False), BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]


class MaskNetworkConfig(Section):
    arch: Literal["u2netp", "u2net", "resnet"] = key(
        "u2netp", "U2-Net, its small form, or a self-supervised encoder with a light decoder"
    )
    size: int = key(96, "side in pixels of the network's input; best a multiple of 32", ge=32)
    prior_channels: bool = key(False, "handcrafted priors' maps as additional input channels")
    init_encoder: str | None = key(None, "run or weights that resnet starts from; null = random (also --init-from)")


class PseudoLabelConfig(Section):
    """Soft labels, first from the priors' maps and later from a network's."""

    size: int = key(128, "side in pixels of resized images, priors and labels", ge=32, multiple_of=8)
    drop_fraction: float = key(0.2, "fraction of images, those with least certain labels, not trained on", ge=0, lt=1)
    uncertainty_weight: Fraction = key(0.5, "how far a pixel's weight falls where its label is undecided")


class RefineConfig(Section):
    """The edge-aware step, a guided filter and a graph cut, and the labels' moving average."""

    radius: PositiveInt = key(8, "radius of the filter's window in pixels of labels.size")
    eps: PositiveFloat = key(1e-3, "regulariser of the filter: higher smooths across weaker edges")
    grabcut_weight: Fraction = key(1.0, "weight in a label of the graph cut; the rest is the filtered map")
    bg_threshold: Fraction = key(0.2, "where a map is below this, the cut takes the background for certain")
    fg_threshold: Fraction = key(0.9, "where a map is above this, the cut takes the object for certain")
    label_momentum: Fraction = key(0.7, "weight of the old label in the moving average after a round")


class SelfTrainingConfig(Section):
    rounds: int = key(0, "rounds of training on labels that a network refined, before the final one", ge=0)
    epochs: PositiveInt = key(10, "passes over the images in each round")


class MaskOptimConfig(Section):
    """AdamW, linear warm-up, cosine to 0; the learning rate is not scaled by the batch."""

    batch_size: int = key(16, "images per step", ge=2)
    base_lr: PositiveFloat = key(1e-3, "peak learning rate")
    weight_decay: float = key(1e-4, "decay of weights; biases and norms are excluded", ge=0)
    warmup_epochs: float = key(1.0, "epochs of linear warm-up", ge=0)
    epochs: PositiveInt = key(20, "passes over the images for the final network")


class MaskLossConfig(Section):
    bce: float = key(1.0, "weight of the binary cross-entropy", ge=0)
    iou: float = key(1.0, "weight of the soft intersection over union", ge=0)
    fbeta: float = key(0.0, "weight of the image-level F loss", ge=0)
    fbeta_beta2: PositiveFloat = key(1.0, "beta squared of the F loss")


class MaskAugmentConfig(base.ColorConfig, base.CropConfig):  # in dumps the keys of CropConfig come first
    scale: Pair = key((0.4, 1.0), "scale of RandomResizedCrop: the crop's fraction of the image's area")
    saturation: Fraction = key(0.4, "factor on HSV's saturation, within 1 -+ this")
    grayscale_prob: Fraction = key(0.1, "probability of dropping colour")
    blur_prob: Fraction = key(0.1, "probability of Gaussian blur")


class PredictConfig(Section):
    """How a trained network's masks are generated."""

    flip: bool = key(True, "average with the mirrored image")
    scales: PositiveFloats = key((1.0,), "factors on model.size whose predictions are averaged")
    refine: Literal["none", "guided", "cut"] = key(
        "cut", "how a map is drawn to the image's edges: not, by the guided filter, by filter and cut"
    )
    threshold: Fraction = key(0.5, "probability above which a pixel is foreground")
    batch_size: PositiveInt = key(32, "images at a time")


class MaskDataConfig(Section):
    train: DataSpecs = key(
        (), "unlabelled images: folder, .zip, .tar, torchvision:NAME or shapes; several are joined (also --data)"
    )
    eval: str | None = key(
        None, "images with ground-truth masks for evaluation only: images/ and masks/, or shapes (also --eval-data)"
    )
    mask_data: base.JoinedData = key(
        None, "images that get masks, several are joined; null = those of the first train (also --masks-for)"
    )
    max_train_images: PositiveInt = key(2500, "most images that are trained on, the first of a seeded shuffle")
    max_eval_images: PositiveInt = key(1000, "most images that are measured on, the first of a seeded shuffle")
    max_corrupt_fraction: Fraction = key(
        0.01, "fraction of undecodable images above which the run stops; three are allowed in any case, unless it is 0"
    )
    decoding: base.DecodingConfig = key(base.DecodingConfig(), "how image files are read")


class BgmaskConfig(base.CommandConfig):
    """A whole training of masks. Raises UsageError where keys contradict each other."""

    option_keys: ClassVar[dict[str, str]] = {
        **base.CommandConfig.option_keys,
        "data": "data.train",
        "eval-data": "data.eval",
        "masks-for": "data.mask_data",
        "init-from": "model.init_encoder",
    }
    ranges: ClassVar[tuple[str, ...]] = ("augment.scale", "augment.ratio")

    model: MaskNetworkConfig = key(MaskNetworkConfig(), "the network")
    labels: PseudoLabelConfig = key(PseudoLabelConfig(), "labels from handcrafted priors")
    refine: RefineConfig = key(RefineConfig(), "refinement of labels and masks")
    self_training: SelfTrainingConfig = key(SelfTrainingConfig(), "self-training")
    optim: MaskOptimConfig = key(MaskOptimConfig(), "optimiser and schedule")
    loss: MaskLossConfig = key(MaskLossConfig(), "what is minimised")
    augment: MaskAugmentConfig = key(MaskAugmentConfig(), "crops and colours in training")
    predict: PredictConfig = key(PredictConfig(), "masks generated by the trained network")
    data: MaskDataConfig = key(MaskDataConfig(), "the images")
    checkpoint: base.CheckpointConfig = key(base.CheckpointConfig(), "saving")
    runtime: base.RuntimeConfig = key(base.RuntimeConfig(), "how it is computed; the method is the same")
    seed: int = key(0, "random seed", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check_keys_agree(self) -> BgmaskConfig:
        if self.model.init_encoder is not None and self.model.arch != "resnet":
            what = f"model.arch is {self.model.arch}, which has no encoder to start from weights."
            raise UsageError(what, "Set model.arch to resnet, or leave out --init-from.")
        if not (self.loss.bce or self.loss.iou or self.loss.fbeta):
            raise UsageError("loss.bce, loss.iou and loss.fbeta are all 0: nothing is left to minimise.", "Raise one.")
        if self.optim.warmup_epochs > self.optim.epochs:
            what = f"optim.warmup_epochs {self.optim.warmup_epochs:g} is longer than optim.epochs {self.optim.epochs}."
            raise UsageError(what, "Lower optim.warmup_epochs.")
        return self
