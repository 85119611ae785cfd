"""How keys are defined (types, limits, meanings), and the sections that the configs of several commands share."""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, Strict, model_validator

from relicctl.errors import UsageError

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]

# YAML has lists only, so a pair itself is not strict; its two numbers are.
Pair = Annotated[tuple[Fraction, Fraction], Strict(False)]
PositivePair = Annotated[tuple[PositiveFloat, PositiveFloat], Strict(False)]
PositiveFloats = Annotated[tuple[PositiveFloat, ...], Strict(False), Field(min_length=1)]
PositiveInts = Annotated[tuple[PositiveInt, ...], Strict(False), Field(min_length=1)]


def _unwrap_single(value: Any) -> Any:
    return (value[0] if value else None) if isinstance(value, (list, tuple)) and len(value) < 2 else value


# One data set, which configs hold as plain text, or several that are joined.
JoinedData = Annotated[str | Annotated[tuple[str, ...], Strict(False)] | None, BeforeValidator(_unwrap_single)]


def list_specs(data: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the data sets that a key of type ``JoinedData`` names."""
    return (data,) if isinstance(data, str) else data or ()


def key(default: Any, meaning: str, **limits: Any) -> Any:
    """Define a field by its default, its meaning with the unit, and limits of its value."""
    return Field(default, description=meaning, **limits)


class Section(BaseModel):
    """A group of keys: unknown keys are refused and nothing is converted silently; immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class CommandConfig(Section):
    """All keys of a command, and its rules beyond types and ranges."""

    # Command-line option -> the key it sets
    option_keys: ClassVar[dict[str, str]] = {"device": "runtime.device", "workers": "runtime.workers", "seed": "seed"}
    implied_by_option: ClassVar[dict[str, dict[str, Any]]] = {}  # option -> values it sets besides its own key
    # Key -> its value -> the values of other keys by definition, where only a default or a preset says otherwise
    implied_values: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {}
    # Key -> its value -> beginnings of keys that are then never read: refused in --set instead of silently ignored
    unused_keys: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {}
    harmless_values: ClassVar[dict[str, Any]] = {}  # values of unused keys that are accepted: they ask for nothing
    ranges: ClassVar[tuple[str, ...]] = ()  # keys whose pairs must be ranges above 0

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        for name in self.ranges:
            low, high = attrgetter(name)(self)
            if not 0 < low <= high:
                what = f"{name} is [{low:g}, {high:g}], which is not a range above 0."
                raise UsageError(what, f"Give {name} as [smallest, largest], both above 0.")
        return self


class EncoderConfig(Section):
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200"] = key(
        "resnet50", "encoder, in torchvision's layout (stride on the 3x3)"
    )
    width: PositiveFloat = key(1.0, "factor on all channels, the stem's too, in steps of 1/8", multiple_of=0.125)
    stem: Literal["imagenet", "cifar", "stride2"] = key(
        "imagenet", "imagenet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1, no pool; stride2: 3x3 stride 2, no pool"
    )
    padding: Literal["symmetric", "same"] = key(
        "symmetric", "symmetric as in torchvision, or TensorFlow's SAME (asymmetric at stride 2)"
    )


class DecodingConfig(Section):
    """From image files to pixels."""

    white_point: PositiveFloat | None = key(
        None,
        "value of white in grey images of more than 8 bits, and PNG and TIFF of 16 per colour, such as 4095 for 12 "
        "bits; null = the largest of 16 bits, of 32 bits and floats the smallest of 1, 255, 65535 and their maximum "
        "that holds them",
    )
    max_pixels: PositiveInt = key(
        178_956_970, "most pixels of an image; one that claims more is not decoded (a decompression bomb)"
    )


class DataConfig(Section):
    train: JoinedData = key(
        None, "training images: folder, .zip, .tar, torchvision:NAME or shapes; several are joined (also --data)"
    )
    val: JoinedData = key(None, "labelled images to evaluate on during the run; several are joined (also --val)")
    cache: Literal["auto", "none", "memory", "device"] = key(
        "auto", "keep decoded images in host memory or on the device; auto = where they fit"
    )
    subset: int | None = key(None, "train on the first so many of a seeded shuffle; null = on all", ge=2)
    max_corrupt_fraction: Fraction = key(
        0.01, "fraction of undecodable images above which the run stops; three are allowed in any case, unless it is 0"
    )
    decoding: DecodingConfig = key(DecodingConfig(), "how image files are read")


class CropConfig(Section):
    """torchvision's RandomResizedCrop."""

    scale: Pair = key((0.08, 1.0), "scale of RandomResizedCrop: the crop's fraction of the image's area")
    ratio: PositivePair = key((0.75, 1.3333333), "range of a crop's width / height, drawn log-uniformly")


class ColorConfig(Section):
    """Flip and colours, the same for all crops of a training."""

    hflip_prob: Fraction = key(0.5, "probability of a horizontal flip")
    color_jitter_prob: Fraction = key(0.8, "probability of colour jitter, its four operations together")
    brightness: Fraction = key(0.4, "largest value added to or taken from pixels in [0, 1]")
    contrast: Fraction = key(0.4, "factor about the channel's mean, within 1 -+ this")
    saturation: Fraction = key(0.2, "factor on HSV's saturation, within 1 -+ this")
    hue: float = key(0.1, "largest shift of hue, in turns", ge=0, le=0.5)
    grayscale_prob: Fraction = key(0.2, "probability of dropping colour")


class CheckpointConfig(Section):
    every_steps: PositiveInt | None = key(None, "steps between two checkpoints; null = by time only")
    every_minutes: PositiveFloat | None = key(15.0, "minutes between two checkpoints; null = by steps only")
    keep: PositiveInt = key(2, "newest checkpoints kept")


class RuntimeConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto = cuda where there is one")
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = key(
        "auto", "processes that decode and crop, beside each training process; 0 = none beside it"
    )
    precision: Literal["auto", "fp32", "bf16"] = key(
        "auto", "of the networks' forward pass; auto = bf16 where the hardware is faster in it, else fp32"
    )
    threads: PositiveInt | None = key(None, "torch's CPU threads; null = torch's own choice")
    log_every: PositiveInt = key(50, "steps between two lines of metrics")
