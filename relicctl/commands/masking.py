"""The background masks of a pretraining: opened, checked against its images, and told about."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from relicctl.config.resolve import ResolvedConfig
from relicctl.config.schema import PretrainConfig
from relicctl.console import Console
from relicctl.data.images import BadImageError
from relicctl.data.masking import AlphaMasks, BackgroundRemoval, BankMasks, MaskSource
from relicctl.data.masks import MaskBank
from relicctl.data.sources import ImageDataset
from relicctl.errors import DataError, UsageError
from relicctl.reference import read_path_from_stdin

NUM_PROBED_IMAGES = 64  # images looked at for alpha channels


def resolve_bank_path(resolved: ResolvedConfig) -> ResolvedConfig:
    """``resolved``, where --bgmask - says so with the bank whose path comes on stdin.

    That may take as long as a training of masks: call it when all that can be refused without them has been.
    UsageError where several processes would read it.
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
    """How views lose their backgrounds, None where none does, and what results.json says of it.

    ``usable``: share of the images with a mask within the limits (alpha: of the first PROBED images);
    ``masked_views``: share of large views without their background, as it is to be expected from that.
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
        bank_masks = BankMasks(bank, rows, bgmask.limits)
        masks, usable, of = bank_masks, bank_masks.is_usable(), f"the masks of {bank.path}"
        if bank.fingerprint != images.compute_fingerprint():
            same = "as many images" if bank.count == len(images) else f"{bank.count:,} images"
            console.warn(
                f"{bank.path} was made for {same} of which some differ from these in size, class or name: masks go by "
                "name, and of other pictures with the same names they would be wrong"
            )
        info |= {"sha256": bank.identity, "made_by": bank.made_by}
    else:
        masks = AlphaMasks(bgmask.limits)
        usable = _find_usable_masks(masks, images)
        of = f"the alpha channels of the first {len(usable)} images"
    share = float(usable.mean()) if len(usable) else 0.0
    low, high = bgmask.limits
    if bgmask.probability and not share:
        console.warn(
            f"none of {of} covers {low:.0%} to {high:.0%} of its image (bgmask.limits): views may all keep their "
            "backgrounds"
        )
    else:
        console.info(f"background masks: {share:.1%} of {of} can be used, on {bgmask.probability:.0%} of large views")
    masking = BackgroundRemoval(masks, bgmask.probability, bgmask.fill) if bgmask.probability else None
    return masking, {**info, "usable": round(share, 6), "masked_views": round(bgmask.probability * share, 6)}


def _find_usable_masks(masks: MaskSource, images: ImageDataset) -> np.ndarray:
    """bool: which of the first images that can be decoded have a usable mask."""
    image_source, usable = masks.get_image_source(images), []
    for index in range(min(NUM_PROBED_IMAGES, len(images))):
        try:
            usable.append(masks.read(index, image_source.load(index)) is not None)
        except BadImageError:
            continue
    return np.array(usable, dtype=bool)


def log_missing_masks(resolved: ResolvedConfig, console: Console) -> None:
    """Say so where a preset or a file asks for masks and none are given."""
    bgmask, origin = resolved.config.bgmask, resolved.origin["bgmask.probability"]
    if bgmask.source == "none" and bgmask.probability and origin.startswith(("preset", "file")):
        console.info("no background masks: every view keeps its background (--bgmask RUN gives masks)")


def check_same_mask_bank(run: Path, record: dict[str, Any], info: dict[str, Any]) -> None:
    """Raises DataError where a run would go on with another bank than it was started with."""
    if record.get("bgmask_sha256") != info.get("sha256"):
        raise DataError(
            f"The mask bank {info['bank']} is not the one that {run} was started with.",
            "Give --bgmask that bank, or start another run with --init-from.",
        )
