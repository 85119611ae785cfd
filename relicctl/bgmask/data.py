"""The images of ``train-bgmask``: to train on, to make masks for, and with true masks to measure on.

True masks are for measuring alone: nothing that trains imports this module.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from relicctl.config.base import DecodingConfig, list_specs
from relicctl.config.bgmask import BgmaskConfig
from relicctl.config.resolve import ResolvedConfig
from relicctl.console import Console
from relicctl.core.counter_rng import Stream, permutation
from relicctl.core.distributed import SINGLE_PROCESS, World
from relicctl.core.hardware import pick_precision
from relicctl.data.datasets.archives import split_spec
from relicctl.data.datasets.base import ConcatDataset, ImageDataset, find_by_name
from relicctl.data.datasets.joined import open_joined_dataset
from relicctl.data.datasets.open import open_dataset
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.decoding import BadImageError, convert_to_rgb, decode_image, read_values
from relicctl.errors import DataError, UsageError
from relicctl.runs.resume import make_record, read_resumable_record

IMAGES, MASKS = "images", "masks"  # folders of a data set with true masks
SILENT = Console(quiet=True)
VOID = 255  # of class indices: pixels to ignore
MAX_CHROMA = 16  # largest difference between the channels of a grey


@dataclass(frozen=True)
class BgmaskData:
    """Images to train on, images that get masks, and images with true masks to measure on.

    ``masks_for_is_prefix``: those that get masks are the first training images, with the same indices.
    """

    train: ImageDataset
    masks_for: ImageDataset
    truth: GroundTruth | None
    masks_for_is_prefix: bool


def open_bgmask_data(
    config: BgmaskConfig, download: bool, world: World = SINGLE_PROCESS, console: Console = SILENT
) -> BgmaskData:
    """Open all images of a run. Raises DataError for what cannot be used, UsageError where no data are given."""
    if download and world.size > 1:
        world.run_on_main(lambda: _open_datasets(config, download, SILENT))  # one rank downloads
    return _open_datasets(config, download, console)


def _open_datasets(config: BgmaskConfig, download: bool, console: Console) -> BgmaskData:
    specs = config.data.train
    if not specs:
        raise UsageError("Missing --data.", "Give --data a folder, a .zip, a .tar, torchvision:NAME or shapes.")
    decoding = config.data.decoding
    sources = [
        open_dataset(spec, split="train", download=download, decoding=decoding, warn=console.warn) for spec in specs
    ]
    train: ImageDataset = sources[0] if len(sources) == 1 else ConcatDataset(sources)
    if len(train) < 2:
        raise DataError(f"{train.spec} holds only one image, and training takes many.", "Give more images.")
    all_used = len(train) <= config.data.max_train_images
    if not all_used:
        rows = np.sort(permutation(len(train), config.seed, Stream.SUBSET)[: config.data.max_train_images])
        train = train.select(rows)
    masks_for = sources[0]
    if config.data.mask_data is not None:
        masks_for = open_joined_dataset(
            list_specs(config.data.mask_data), split="train", download=download, decoding=decoding, warn=console.warn
        )
    truth = None
    if config.data.eval is not None:
        for spec in (*specs, *list_specs(config.data.mask_data)):
            check_no_leak(config.data.eval, spec)
        truth = open_ground_truth(
            config.data.eval, config.data.max_eval_images, config.seed, console, download=download, decoding=decoding
        )
    return BgmaskData(train, masks_for, truth, all_used and config.data.mask_data is None)


def open_bgmask_record(
    resumed: Path | None, resolved: ResolvedConfig, data: BgmaskData, device: torch.device
) -> dict[str, Any]:
    """Return the facts recorded when the run started, of which only the precision may be chosen anew, or a new run's.

    Raises DataError for other images than those of the run ``resumed``.
    """
    precision = pick_precision(resolved.config.runtime.precision, device)
    if resumed is None:
        return make_record(resolved, data.train, precision=precision)
    fix = "Give --data the same images in the same order, or start a new run with another --out."
    record = read_resumable_record(resumed, data.train, fix)
    return record if resolved.origin["runtime.precision"] == "run" else record | {"precision": precision}


@dataclass(frozen=True)
class GroundTruth:
    """Images and their true masks.

    ``load_mask`` returns where the object of an image is: bool ``[H, W]``, of the image's size. It raises DataError
    when the mask cannot be decoded.
    """

    images: ImageDataset
    load_mask: Callable[[int], np.ndarray]


def open_ground_truth(
    spec: str,
    max_images: int,
    seed: int,
    console: Console = SILENT,
    *,
    download: bool = False,
    decoding: DecodingConfig = DecodingConfig(),  # noqa: B008 (immutable)
) -> GroundTruth:
    """Open ``spec``: ``shapes``, whose test split is taken, or a folder or archive with images/ and masks/.

    At most ``max_images`` are taken, the first of a shuffle by ``seed``, in their original order. Every mask is read
    once. Raises DataError when a folder, an image or a mask is missing, a mask is not of its image's size, or all masks
    are empty.
    """
    if spec.partition(":")[0] == "shapes":
        shapes = open_dataset(spec, split="val", download=download)
        assert isinstance(shapes, ShapesDataset)
        shapes = shapes.select(_sample_rows(len(shapes), max_images, seed))
        return GroundTruth(shapes, shapes.load_mask)
    try:
        parts = (_make_part_spec(spec, part) for part in (IMAGES, MASKS))
        images, masks = (open_dataset(part, decoding=decoding, class_folders=False) for part in parts)
    except DataError as reason:
        fix = f"Give --eval-data a folder or archive that holds {IMAGES}/ and {MASKS}/ with the same names, or shapes."
        raise DataError(reason.what, fix) from None
    sample = _sample_rows(len(images), max_images, seed)
    images, masks = images.select(sample), masks.select(_match_masks(images, masks)[sample])
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the GIL
        counts = np.array(list(pool.map(partial(_check_mask_file, images, masks), range(len(images)))))
    return GroundTruth(images, partial(_load_mask, masks, _choose_threshold(counts, masks, console)))


def check_no_leak(truth: str, images: str) -> None:
    """Raise DataError if the true masks of the data ``truth`` are among the data ``images``."""
    if "shapes" in (truth.partition(":")[0], images.partition(":")[0]) or images.startswith("torchvision:"):
        return
    masks, folder = _resolve_real_path(_make_part_spec(truth, MASKS)), _resolve_real_path(images)
    if f"{masks}/".startswith(f"{folder}/"):
        is_same = _resolve_real_path(truth) == folder
        fix = f"Give {_make_part_spec(images, IMAGES)}." if is_same else "Give the images without the masks."
        raise DataError(f"{images} holds the true masks of {truth}, which are for evaluation only.", fix)


def _resolve_real_path(spec: str) -> str:
    """Return the real path of a folder, or of one in an archive as if the archive were a folder."""
    path, folder = split_spec(spec)
    return os.path.normpath(os.path.join(os.path.realpath(path), folder))


def _sample_rows(size: int, max_images: int, seed: int) -> np.ndarray:
    """Return int64 ``[min(size, max_images)]``, ascending."""
    return np.sort(permutation(size, seed, Stream.EVAL)[:max_images])


def _make_part_spec(spec: str, folder: str) -> str:
    return f"{spec}/{folder}" if "#" in spec and not os.path.lexists(spec) else f"{spec}#{folder}"


def _match_masks(images: ImageDataset, masks: ImageDataset) -> np.ndarray:
    """Return the index of each image's mask, int64 ``[N]``. Raises DataError if an image or a mask stands alone."""
    image_stems, mask_stems = (
        [str(PurePosixPath(dataset.get_name(index)).with_suffix("")) for index in range(len(dataset))]
        for dataset in (images, masks)
    )
    found = find_by_name(mask_stems, image_stems)
    unmatched = [images.get_name(index) for index, mask in enumerate(found) if mask < 0]
    if unmatched:
        of = f"{len(unmatched)} of {len(images)} images in {images.spec}"
        what = f"{of} have no mask in {masks.spec}, for example {unmatched[0]}."
        raise DataError(what, "Give every image a mask of the same name (the suffix may differ).")
    if len(masks) > len(images):
        spare = sorted(set(mask_stems).difference(mask_stems[mask] for mask in found))
        example = f", for example {spare[0]}" if spare else ""
        what = f"{len(masks) - len(images)} masks in {masks.spec} have no image{example}."
        raise DataError(what, "Remove them, or add their images.")
    return np.array(found)


def _load_mask(masks: ImageDataset, threshold: int, index: int) -> np.ndarray:
    """Return bool ``[H, W]``. Raises DataError when the file cannot be decoded."""
    values = _load_mask_values(masks, index)
    if threshold:
        return np.asarray(values > (threshold if values.max() > 1 else 0))  # or class numbers 0 and 1
    return (values > 0) & (values < VOID)


def _load_mask_values(masks: ImageDataset, index: int) -> np.ndarray:
    """Return uint8 ``[H, W]`` as ``_read_mask_values``. Raises DataError when the file cannot be decoded."""
    try:
        data = masks.read(index)
        assert isinstance(data, bytes)
        return decode_image(data, _read_mask_values, max_pixels=masks.decode.max_pixels)
    except DataError:
        raise
    except Exception as bad:  # on damaged files Pillow's plugins raise almost anything
        reason = "no image in a known format" if isinstance(bad, UnidentifiedImageError) else f"{bad}"
        what = f"The true mask {masks.get_name(index)} of {masks.spec} cannot be read: {reason}."
        raise DataError(what, "Repair it, or remove it and its image.") from None


def _read_mask_values(image: Image.Image) -> np.ndarray:
    """Return the brightness; of a palette that colours classes 1 for the object and 0, of wide ranges class indices."""
    if image.mode == "P" and _is_class_palette(image):
        indices = read_values(image)
        return ((indices > 0) & (indices < VOID)).astype(np.uint8)
    if image.mode.startswith("I") or (image.format == "PPM" and image.mode == "L"):
        values = read_values(image)
        if values.max() <= 255 and values.min() >= 0:
            return values.astype(np.uint8)  # few values of a wide range: scaled as an image they would be black
    return np.asarray(convert_to_rgb(image).max(axis=2))


def _is_class_palette(image: Image.Image) -> bool:
    """Return whether a palette gives classes their colours, and the background black: some of them may be dark."""
    palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
    used = palette[np.flatnonzero(image.histogram()[: len(palette)])]
    return bool(palette[0].max() <= MAX_CHROMA and (used.max(axis=1) - used.min(axis=1)).max() > MAX_CHROMA)


def _check_mask_file(images: ImageDataset, masks: ImageDataset, index: int) -> np.ndarray:
    """Return the mask's number of pixels of each value, int64 ``[256]``. Raises DataError for another size."""
    name = images.get_name(index)
    try:
        height, width = images.load(index).shape[:2]
    except BadImageError as bad:
        what = f"The image {name} of {images.spec} cannot be read: {bad.reason}."
        raise DataError(what, "Repair it, or remove it and its mask.") from None
    values = _load_mask_values(masks, index)
    if values.shape != (height, width):
        what = (
            f"The true mask of {name} has {values.shape[1]} x {values.shape[0]} pixels, its image {width} x {height}."
        )
        raise DataError(what, "Give masks of the same size as their images.")
    return np.bincount(values.ravel(), minlength=256)


def _choose_threshold(counts: np.ndarray, masks: ImageDataset, console: Console) -> int:
    """Return the value above which a pixel belongs to the object; 0 for masks of class indices.

    ``counts``: int64 ``[N, 256]``, the pixels of each value. Such masks have no value from 128 to 254, and more pixels
    from 1 to 127 than of 255, which is ignored in them. Raises DataError when all masks are empty.
    """
    half, beyond_one = 127, counts[:, 2:].any(axis=1)
    total = counts[beyond_one].sum(axis=0)
    is_indexed = total[1 : half + 1].sum() > total[VOID] and not total[half + 1 : VOID].any()
    first = np.where(beyond_one & (not is_indexed), half + 1, 1)
    last = VOID if is_indexed else VOID + 1
    empty = [not row[start:last].any() for row, start in zip(counts, first.tolist(), strict=True)]
    if all(empty):
        raise DataError(f"All true masks of {masks.spec} are empty.", "Give masks in which the object is 255, or 1.")
    if is_indexed:
        console.info(
            f"The true masks of {masks.spec} hold class indices (up to {np.flatnonzero(total[:VOID]).max()}): 1 to 254 "
            "count as the object, 0 and 255 as the background."
        )
    if any(empty):
        name = masks.get_name(empty.index(True))
        console.info(f"{sum(empty)} of {len(empty)} true masks of {masks.spec} are empty, {name} among them.")
    return 0 if is_indexed else half
