"""Images with true masks. They are for measuring alone: nothing that trains takes one of these."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np

from relicctl.core.counted import Stream, draw_uniform
from relicctl.data.images import BadImageError
from relicctl.data.shapes import ShapesDataset
from relicctl.data.sources import ImageDataset, open_dataset
from relicctl.errors import DataError

IMAGES, MASKS = "images", "masks"


class GroundTruth(Protocol):
    """The masks that belong to the images of a source, under the same indices."""

    @property
    def images(self) -> ImageDataset: ...

    def load_mask(self, index: int) -> np.ndarray:
        """Where the object is: bool ``[H, W]``, of the image's own size."""


class SyntheticGroundTruth:
    """Of the embedded demo data, which know their masks."""

    def __init__(self, images: ShapesDataset) -> None:
        self.images = images

    def load_mask(self, index: int) -> np.ndarray:
        return self.images.load_mask(index)


class FileGroundTruth:
    """Of files: ``masks`` has at ``index`` the one of image ``index``."""

    def __init__(self, images: ImageDataset, masks: ImageDataset) -> None:
        self.images, self._masks = images, masks

    def load_mask(self, index: int) -> np.ndarray:
        """Raises DataError when the file holds no image."""
        try:
            grey = self._masks.load(index).max(axis=2)
        except BadImageError as bad:
            raise DataError(
                f"The true mask {self._masks.get_name(index)} of {self._masks.spec} cannot be read: {bad.reason}.",
                "Repair it, or remove it and its image.",
            ) from None
        return grey > (127 if grey.max() > 1 else 0)  # white is 255, or 1 in masks saved as class numbers


def open_ground_truth(spec: str, max_images: int, seed: int, *, download: bool = False) -> GroundTruth:
    """Open ``spec``: ``shapes``, whose test split is taken, or a folder or archive with images/ and masks/.

    ``most``: how many at most are taken, the first of a shuffle by ``seed``, in their own order. Every mask is read
    once. Raises DataError when folders or partners are missing, or a mask is not of its image's size.
    """
    if spec.partition(":")[0] == "shapes":
        shapes = open_dataset(spec, split="val", download=download)
        assert isinstance(shapes, ShapesDataset)
        return SyntheticGroundTruth(shapes.select(_sample_rows(len(shapes), max_images, seed)))
    images, masks = (_open_part(spec, folder) for folder in (IMAGES, MASKS))
    rows, partners = _match_masks(images, masks)
    some = _sample_rows(len(rows), max_images, seed)
    truth = FileGroundTruth(images.select(rows[some]), masks.select(partners[some]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding leaves Python's lock
        for _ in pool.map(lambda index: _check_mask_size(truth, index), range(len(truth.images))):
            pass
    return truth


def check_no_leak(truth: str, images: str) -> None:
    """Raises DataError if the true masks of ``truth`` lie among ``images``: both as a user names them."""
    if "shapes" in (truth.partition(":")[0], images.partition(":")[0]) or images.startswith("torchvision:"):
        return
    masks, place = _resolve_real_path(_make_part_spec(truth, MASKS)), _resolve_real_path(images)
    if f"{masks}/".startswith(f"{place}/"):
        raise DataError(
            f"{images} holds the true masks of {truth}, and these are for measuring alone.",
            f"Give {_make_part_spec(images, IMAGES)}."
            if _resolve_real_path(truth) == place
            else "Give the images without the masks.",
        )


def _resolve_real_path(spec: str) -> str:
    """The real path of a folder, or of one in an archive as if that were a folder."""
    path, folder = (spec, "") if os.path.lexists(spec) or "#" not in spec else spec.rsplit("#", 1)
    return os.path.normpath(os.path.join(os.path.realpath(os.path.expanduser(path)), folder.strip("/")))


def _sample_rows(size: int, max_images: int, seed: int) -> np.ndarray:
    """int64 ``[min(size, most)]``, ascending."""
    shuffled = np.argsort(draw_uniform(seed, Stream.EVAL, np.arange(size), n=1)[:, 0], kind="stable")
    return np.sort(shuffled[:max_images])


def _open_part(spec: str, folder: str) -> ImageDataset:
    try:
        return open_dataset(_make_part_spec(spec, folder))
    except DataError as reason:
        raise DataError(
            reason.what,
            f"Give --eval-data a folder or archive that holds {IMAGES}/ and {MASKS}/ with the same names, or shapes.",
        ) from None


def _make_part_spec(spec: str, folder: str) -> str:
    return f"{spec}/{folder}" if "#" in spec and not os.path.lexists(spec) else f"{spec}#{folder}"


def _match_masks(images: ImageDataset, masks: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images, and of the mask that each has: int64 ``[N]`` both. Raises DataError if one has none."""
    stems = {_strip_suffix(masks.get_name(index)): index for index in range(len(masks))}
    image_stems = [_strip_suffix(images.get_name(index)) for index in range(len(images))]
    unmatched = [images.get_name(index) for index, stem in enumerate(image_stems) if stem not in stems]
    if unmatched:
        raise DataError(
            f"{len(unmatched)} of {len(images)} images in {images.spec} have no mask in {masks.spec}, "
            f"{unmatched[0]} among them.",
            "Give every image a mask of the same name, but for what follows the last point.",
        )
    if len(masks) > len(images):
        spare = sorted(stems.keys() - set(image_stems))
        example = f", {spare[0]} among them" if spare else ""
        raise DataError(
            f"{len(masks) - len(images)} masks in {masks.spec} belong to no image{example}.",
            "Remove them, or add their images.",
        )
    return np.arange(len(images)), np.array([stems[stem] for stem in image_stems])


def _strip_suffix(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _check_mask_size(truth: FileGroundTruth, index: int) -> None:
    name = truth.images.get_name(index)
    try:
        height, width = truth.images.load(index).shape[:2]
    except BadImageError as bad:
        raise DataError(
            f"The image {name} of {truth.images.spec} cannot be read: {bad.reason}.",
            "Repair it, or remove it and its mask.",
        ) from None
    mask = truth.load_mask(index)
    if mask.shape != (height, width):
        raise DataError(
            f"The true mask of {name} has {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x {height}.",
            "Give masks of the images' own sizes.",
        )
