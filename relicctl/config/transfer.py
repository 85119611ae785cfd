"""The keys of a transfer evaluation: how well an encoder serves other data sets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from relicctl.config.schema import (
    Aspect,
    CheckpointConfig,
    EncoderConfig,
    Fraction,
    Pair,
    PositiveFloat,
    PositiveInt,
    RuntimeConfig,
    Section,
    check_ranges,
    key,
)

Metric = Literal["top1", "mean_per_class", "map11"]
Protocols = Annotated[tuple[Literal["logistic", "knn", "finetune"], ...], Strict(False), Field(min_length=1)]
LabelSubsets = Annotated[tuple[str | float, ...], Strict(False), Field(min_length=1)]
PositiveFloats = Annotated[tuple[PositiveFloat, ...], Strict(False), Field(min_length=1)]
WeightDecays = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Strict(False), Field(min_length=1)]
SamplesPerClass = Annotated[tuple[PositiveInt, ...], Strict(False), Field(min_length=1, max_length=2)]
PositiveInts = Annotated[tuple[PositiveInt, ...], Strict(False), Field(min_length=1)]

LAMBDAS = tuple(float(f"{10 ** (-6 + 11 * k / 44):.6g}") for k in range(45))  # log-spaced from 1e-6 to 1e5


class TransferDataConfig(Section):
    sets: dict[str, str] = key({}, "data by name, each with train, perhaps val, and test (also --data NAME=DATA)")
    metrics: dict[str, Metric] = key({}, "metric by name of data; where not given, what papers report on it, else top1")
    holdout: float = key(
        0.2, "share of each class of train to choose on where there is no val (our choice)", gt=0, lt=1
    )
    test_split: dict[str, str] = key({}, "split to test on by name of data; where not given, test")
    draw: dict[str, SamplesPerClass] = key(
        {},
        "for data without splits, by name: images of each class to learn from, and, if told, to test on, else all "
        "others; drawn by the seed (our choice)",
    )
    cache: Literal["auto", "none", "memory", "device"] = key(
        "auto", "keep decoded images while fine-tuning, in host memory or on the device; auto = where they fit"
    )
    max_bad: Fraction = key(0.01, "share of undecodable images above which the run stops")


class EvalCropConfig(Section):
    size: int | None = key(None, "side in pixels of the images; null = what each encoder was made for", ge=8)
    crop_ratio: float | None = key(
        None, "side of the centre square / the image's short side; null = the encoder's own", gt=0, le=1
    )


class LogisticConfig(Section):
    lambdas: PositiveFloats = key(
        LAMBDAS, "penalties to choose from: lambda / 2 |W|^2 beside the summed cross-entropy, 1 / C of scikit-learn"
    )


class KnnConfig(Section):
    ks: PositiveInts = key((20, 200), "numbers of neighbours to choose from")


class FinetuneConfig(Section):
    """SGD with Nesterov's momentum, cosine to 0; every rate, decay and length together, the best trained anew."""

    rates: PositiveFloats = key((0.01, 0.03, 0.1), "learning rates, not scaled by the batch (our choice)")
    decays: WeightDecays = key((0.0,), "weight decays, of all parameters (our choice)")
    steps: PositiveInt = key(1000, "steps of each training (our choice)")
    epochs: PositiveInts | None = key(None, "lengths to choose from in passes over the labelled images; null = steps")
    batch_size: PositiveInt = key(64, "images per step; all where there are fewer (our choice)")
    momentum: float = key(0.9, "Nesterov's momentum", gt=0, lt=1)
    area: Pair = key((0.08, 1.0), "range of the random crop's share of the image's area (our choice)")
    aspect: Aspect = key((0.75, 1.3333333), "range of the crop's width / height, drawn log-uniformly")
    flip: Fraction = key(0.5, "probability of a horizontal flip")


class TransferConfig(Section):
    """A whole transfer evaluation: every protocol with every amount of labels on every data set."""

    protocol: Protocols = key(
        ("logistic",), "logistic and knn on frozen features; finetune trains all (also --protocol)"
    )
    labels: LabelSubsets = key(("all",), "labels known: all, a share, N-per-class, or a file of names (also --labels)")
    model: EncoderConfig = key(
        EncoderConfig(), "the network of `random` as the first encoder; else it is like the first"
    )
    data: TransferDataConfig = key(TransferDataConfig(), "the data sets")
    eval: EvalCropConfig = key(EvalCropConfig(), "how images are shown")
    logistic: LogisticConfig = key(LogisticConfig(), "logistic regression")
    knn: KnnConfig = key(KnnConfig(), "nearest neighbours")
    finetune: FinetuneConfig = key(FinetuneConfig(), "fine-tuning")
    checkpoint: CheckpointConfig = key(CheckpointConfig(), "saving while fine-tuning")
    runtime: RuntimeConfig = key(RuntimeConfig(), "how it is computed; the method is the same")
    seed: int = key(0, "of every random draw", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check_keys_agree(self) -> TransferConfig:
        check_ranges({"finetune.area": self.finetune.area, "finetune.aspect": self.finetune.aspect})
        return self
