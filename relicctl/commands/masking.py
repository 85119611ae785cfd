"""The background masks of a pretraining: opened, checked against its images, and told about."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from relicctl.config.resolve import Resolved
from relicctl.config.schema import Config
from relicctl.console import Console
from relicctl.data.images import BadImage
from relicctl.data.masking import AlphaMasks, BankMasks, Masking, Masks
from relicctl.data.masks import MaskBank
from relicctl.data.sources import Source
from relicctl.errors import DataError, UsageError
from relicctl.reference import named

PROBED = 64  # images looked at for alpha channels


def with_bank_named(resolved: Resolved) -> Resolved:
    """``resolved``, where --bgmask - says so with the bank whose path comes on stdin.

    That may take as long as a training of masks: call it when all that can be refused without them has been.
    UsageError where several processes would read it.
    """
    chosen = resolved.config.bgmask
    if chosen.bank != "-":
        return resolved
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("Several processes cannot all read a path from stdin.", "Give --bgmask the path itself.")
    told = chosen.model_copy(update={"bank": named("-")})
    return replace(resolved, config=resolved.config.model_copy(update={"bgmask": told}))


def open_masking(config: Config, images: Source, console: Console) -> tuple[Masking | None, dict[str, Any]]:
    """How views lose their backgrounds, None where none does, and what results.json says of it.

    ``usable``: share of the images with a mask within the limits (alpha: of the first PROBED images);
    ``masked_views``: share of large views without their background, as it is to be expected from that.
    Raises DataError for a bank that cannot be used or lacks masks.
    """
    chosen = config.bgmask
    facts: dict[str, Any] = {"source": chosen.source, "bank": chosen.bank, "probability": chosen.probability}
    if chosen.source == "none":
        return None, {**facts, "usable": 0.0, "masked_views": 0.0}
    masks: Masks
    if chosen.source == "bank":
        assert chosen.bank is not None, "the schema asks for a bank"
        bank, rows = MaskBank.open_for(Path(chosen.bank), images)
        kept = BankMasks(bank, rows, chosen.limits)
        masks, usable, of = kept, kept.usable(), f"the masks of {bank.path}"
        if bank.fingerprint != images.fingerprint():
            same = "as many images" if bank.count == len(images) else f"{bank.count:,} images"
            console.warn(
                f"{bank.path} was made for {same} of which some differ from these in size, class or name: masks go by "
                "name, and of other pictures with the same names they would be wrong"
            )
        facts |= {"sha256": bank.identity, "made_by": bank.made_by}
    else:
        masks = AlphaMasks(chosen.limits)
        usable = _probe(masks, images)
        of = f"the alpha channels of the first {len(usable)} images"
    share = float(usable.mean()) if len(usable) else 0.0
    low, high = chosen.limits
    if chosen.probability and not share:
        console.warn(
            f"none of {of} covers {low:.0%} to {high:.0%} of its image (bgmask.limits): views may all keep their "
            "backgrounds"
        )
    else:
        console.note(f"background masks: {share:.1%} of {of} can be used, on {chosen.probability:.0%} of large views")
    masking = Masking(masks, chosen.probability, chosen.fill) if chosen.probability else None
    return masking, {**facts, "usable": round(share, 6), "masked_views": round(chosen.probability * share, 6)}


def _probe(masks: Masks, images: Source) -> np.ndarray:
    """bool: which of the first images that can be decoded have a usable mask."""
    pictures, found = masks.pictures(images), []
    for index in range(min(PROBED, len(images))):
        try:
            found.append(masks.read(index, pictures.load(index)) is not None)
        except BadImage:
            continue
    return np.array(found, dtype=bool)


def note_missing_masks(resolved: Resolved, console: Console) -> None:
    """Say so where a preset or a file asks for masks and none are given."""
    chosen, origin = resolved.config.bgmask, resolved.origin["bgmask.probability"]
    if chosen.source == "none" and chosen.probability and origin.startswith(("preset", "file")):
        console.note("no background masks: every view keeps its background (--bgmask RUN gives masks)")


def refuse_other_masks(run: Path, record: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises DataError where a run would go on with another bank than it was started with."""
    if record.get("bgmask_sha256") != facts.get("sha256"):
        raise DataError(
            f"The mask bank {facts['bank']} is not the one that {run} was started with.",
            "Give --bgmask that bank, or start another run with --init-from.",
        )
