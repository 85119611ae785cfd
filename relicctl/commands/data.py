"""The images of a pretraining: those to train on, and those to measure on."""

from __future__ import annotations

from dataclasses import dataclass

from relicctl.config.schema import PretrainConfig
from relicctl.console import Console
from relicctl.core.counted import Stream
from relicctl.data.sources import ImageDataset, open_dataset
from relicctl.errors import DataError, UsageError
from relicctl.evaluation.during import permutation, split_holdout


@dataclass(frozen=True)
class PretrainData:
    train: ImageDataset
    val: ImageDataset | None


def open_pretrain_data(config: PretrainConfig, download: bool, console: Console) -> PretrainData:
    """The images to train on, and those to measure on if there are labels."""
    if config.data.train is None:
        raise UsageError("No data is given.", "Give --data a folder, a .zip, a .tar, torchvision:NAME or shapes.")
    train, val = open_dataset(config.data.train, split="train", download=download), None
    if config.data.val is not None:
        val = open_dataset(config.data.val, split="val", download=download)
    elif config.eval.every_epochs and config.eval.holdout and len(train.classes) > 1:
        train, val = split_holdout(train, config.eval.holdout, config.seed)
        console.info(f"{len(val)} labelled images are held out for evaluation (eval.holdout).")
    if config.data.subset is not None:
        if config.data.subset > len(train):
            raise UsageError(
                f"data.subset is {config.data.subset}, but there are only {len(train)} images.",
                "Lower data.subset.",
            )
        train = train.select(permutation(len(train), config.seed, Stream.SUBSET)[: config.data.subset])
    if config.objective == "supervised" and train.labels is None:
        raise DataError(
            f"{config.data.train} has no labels, which supervised training needs.",
            "Give one folder per class.",
        )
    return PretrainData(train, val)
