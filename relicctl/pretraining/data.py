"""The images and background masks of a pretraining: opened, checked, and what results.json says of the masks."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relicctl.config.base import list_specs
from relicctl.config.pretrain import PretrainConfig
from relicctl.config.resolve import ResolvedConfig
from relicctl.console import Console
from relicctl.core.counter_rng import Stream, permutation
from relicctl.core.distributed import World
from relicctl.data.background_removal import AlphaMasks, BackgroundRemoval, BankMasks, MaskSource
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.datasets.joined import list_unlabelled_specs, open_joined_dataset
from relicctl.data.decoding import BadImageError, BadImages
from relicctl.data.mask_bank import MaskBank
from relicctl.data.photometric import AugmentConfig
from relicctl.data.value_range import warn_unused_range
from relicctl.data.views import CropSpec, ViewSpec
from relicctl.encoders.resolve import read_path_from_stdin
from relicctl.errors import DataError, UsageError
from relicctl.evaluation.labelled_data import split_holdout
from relicctl.evaluation.online import OnlineEvaluator

NUM_PROBED_IMAGES = 64  # images whose alpha channels are examined


def resolve_bank_path(resolved: ResolvedConfig) -> ResolvedConfig:
    """Return ``resolved``, for ``--bgmask -`` with the bank whose path is read from stdin.

    That may take as long as a training of masks: call it after all checks that need no masks. Raises UsageError where
    several processes would read it.
    """
    old_bgmask = resolved.config.bgmask
    if old_bgmask.bank != "-":
        return resolved
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("Several processes cannot all read a path from stdin.", "Give --bgmask the path itself.")
    bgmask = old_bgmask.model_copy(update={"bank": read_path_from_stdin("-")})
    return replace(resolved, config=resolved.config.model_copy(update={"bgmask": bgmask}))


def open_masking(
    config: PretrainConfig, images: ImageDataset, console: Console
) -> tuple[BackgroundRemoval | None, dict[str, Any]]:
    """Return how views lose their backgrounds (None: none does), and what results.json says of the masks.

    ``usable``: fraction of the images with a mask within the limits (alpha: of the first NUM_PROBED_IMAGES);
    ``masked_views``: expected fraction of large views without their background.
    Raises DataError for a bank that cannot be used or lacks masks.
    """
    bgmask = config.bgmask
    info: dict[str, Any] = {"source": bgmask.source, "bank": bgmask.bank, "probability": bgmask.probability}
    if bgmask.source == "none":
        return None, {**info, "usable": 0.0, "masked_views": 0.0}
    masks: MaskSource
    if bgmask.source == "bank":
        assert bgmask.bank is not None, "the schema asks for a bank"
        bank, rows = MaskBank.open_for(Path(bgmask.bank), images)
        bank_masks = BankMasks(bank, rows, bgmask.foreground_range)
        masks, usable, of = bank_masks, bank_masks.is_usable(), f"the masks of {bank.path}"
        if bank.fingerprint != images.compute_fingerprint():
            same = "as many images" if bank.count == len(images) else f"{bank.count:,} images"
            console.warn(
                f"{bank.path} was made for {same} of which some differ from these in size, class, name or white point: "
                "masks are matched by file name; if these are different images with the same names, they will be wrong"
            )
        info |= {"sha256": bank.identity, "made_by": bank.made_by}
    else:
        masks = AlphaMasks(bgmask.foreground_range)
        usable = _find_usable_masks(masks, images)
        of = f"the alpha channels of the first {len(usable)} images"
    fraction = float(usable.mean()) if len(usable) else 0.0
    low, high = bgmask.foreground_range
    if bgmask.probability and not fraction:
        console.warn(
            f"none of {of} covers {low:.0%} to {high:.0%} of its image (bgmask.foreground_range): views may all keep "
            "their backgrounds"
        )
    else:
        console.info(
            f"background masks: {fraction:.1%} of {of} can be used, on {bgmask.probability:.0%} of large views"
        )
    masking = BackgroundRemoval(masks, bgmask.probability, bgmask.fill) if bgmask.probability else None
    return masking, {**info, "usable": round(fraction, 6), "masked_views": round(bgmask.probability * fraction, 6)}


def _find_usable_masks(masks: MaskSource, images: ImageDataset) -> np.ndarray:
    """Return, as bool, which of the first images that can be decoded have a usable mask."""
    image_source, usable = masks.get_image_source(images), []
    for index in range(min(NUM_PROBED_IMAGES, len(images))):
        try:
            usable.append(masks.read(index, image_source.load(index)) is not None)
        except BadImageError:
            continue
    return np.array(usable, dtype=bool)


def log_missing_masks(resolved: ResolvedConfig, console: Console) -> None:
    """Log a note where the user's file asks for masks and none are given; a preset asks for them only if there are."""
    bgmask, origin = resolved.config.bgmask, resolved.origin["bgmask.probability"]
    if bgmask.source == "none" and bgmask.probability and origin.startswith("file"):
        console.info("no background masks: every view keeps its background (--bgmask RUN gives masks)")


@dataclass(frozen=True)
class PretrainData:
    train: ImageDataset
    val: ImageDataset | None


def open_pretrain_data(config: PretrainConfig, download: bool, console: Console) -> PretrainData:
    """Return the images to train on and, if there are labelled ones, those to evaluate on."""
    if config.data.train is None:
        raise UsageError("Missing --data.", "Give --data a folder, a .zip, a .tar, torchvision:NAME or shapes.")
    open_split = partial(open_joined_dataset, download=download, decoding=config.data.decoding, warn=console.warn)
    train, val = open_split(list_specs(config.data.train), split="train"), None
    unlabelled = list_unlabelled_specs(train)
    if train.labels is None and unlabelled != [train.spec]:
        console.info(f"{', '.join(unlabelled)} has no labels, so none of the joined images counts as labelled.")
    if config.data.val is not None:
        val = open_split(list_specs(config.data.val), split="val")
    elif config.eval.every_epochs and config.eval.val_fraction and len(train.classes) > 1:
        train, val = split_holdout(train, config.eval.val_fraction, config.seed)
        console.info(f"{len(val)} labelled images are held out for evaluation (eval.val_fraction).")
    if config.data.subset is not None:
        if config.data.subset > len(train):
            what = f"data.subset is {config.data.subset}, but there are only {len(train)} images."
            raise UsageError(what, "Lower data.subset.")
        train = train.select(permutation(len(train), config.seed, Stream.SUBSET)[: config.data.subset])
    if config.objective == "supervised" and train.labels is None:
        what = f"{', '.join(unlabelled)} has no labels, which supervised training needs."
        raise DataError(what, "Give one folder per class.")
    warn_unused_range(train, console.warn)
    return PretrainData(train, val)


def build_evaluator(
    config: PretrainConfig, data: PretrainData, device: torch.device, bad: BadImages, console: Console
) -> OnlineEvaluator | None:
    if not config.eval.every_epochs or data.val is None:
        return None
    if data.train.labels is None:
        console.info("The training images have no labels: no kNN accuracy during this run, whatever --val has.")
        return None
    return OnlineEvaluator(data.train, data.val, config, device, bad)


def check_batch_split(config: PretrainConfig, world: World) -> None:
    """Raise UsageError if the batch cannot be split over the ranks, or a rank's part of it into microbatches."""
    first, last = world.get_local_rows(config.optim.batch_size)
    microbatch = config.optim.microbatch
    if microbatch is not None and (last - first) % microbatch:
        what = f"optim.microbatch {microbatch} does not divide the {last - first} images of a process."
        raise UsageError(what, "Choose one that does, or another number of processes.")


def check_same_images(images: ImageDataset, world: World) -> None:
    """Raise DataError if the ranks see different images."""
    if world.size > 1 and len(set(world.all_gather_object(images.compute_fingerprint()))) > 1:
        fix = "Give all hosts the same data at this path."
        raise DataError(f"The processes see different images at {images.spec}.", fix)


def build_view_plan(config: PretrainConfig) -> ViewSpec:
    views = config.views
    sizes = tuple(CropSpec(view.count, view.size, view.area) for view in (views.large, views.small) if view.count)
    return ViewSpec(sizes, views.ratio, AugmentConfig(**views.augment.model_dump()), views.oversized)
