"""Images with true masks. They are for measuring alone: nothing that trains takes one of these."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np

from relicctl.core.counted import Stream, counted_uniform
from relicctl.data.images import BadImage
from relicctl.data.shapes import ShapesSource
from relicctl.data.sources import Source, open_source
from relicctl.errors import DataError

IMAGES, MASKS = "images", "masks"


class TrueMasks(Protocol):
    """The masks that belong to the images of a source, under the same indices."""

    @property
    def images(self) -> Source: ...

    def mask(self, index: int) -> np.ndarray:
        """Where the object is: bool ``[H, W]``, of the image's own size."""


class DrawnTruth:
    """Of the embedded demo data, which know their masks."""

    def __init__(self, images: ShapesSource) -> None:
        self.images = images

    def mask(self, index: int) -> np.ndarray:
        return self.images.mask(index)


class FileTruth:
    """Of files: ``masks`` has at ``index`` the one of image ``index``."""

    def __init__(self, images: Source, masks: Source) -> None:
        self.images, self._masks = images, masks

    def mask(self, index: int) -> np.ndarray:
        """Raises DataError when the file holds no image."""
        try:
            grey = self._masks.load(index).max(axis=2)
        except BadImage as bad:
            raise DataError(
                f"The true mask {self._masks.key(index)} of {self._masks.spec} cannot be read: {bad.reason}.",
                "Repair it, or remove it and its image.",
            ) from None
        return grey > (127 if grey.max() > 1 else 0)  # white is 255, or 1 in masks saved as class numbers


def open_truth(spec: str, most: int, seed: int, *, download: bool = False) -> TrueMasks:
    """Open ``spec``: ``shapes``, whose test split is taken, or a folder or archive with images/ and masks/.

    ``most``: how many at most are taken, the first of a shuffle by ``seed``, in their own order. Every mask is read
    once. Raises DataError when folders or partners are missing, or a mask is not of its image's size.
    """
    if spec.partition(":")[0] == "shapes":
        drawn = open_source(spec, split="val", download=download)
        assert isinstance(drawn, ShapesSource)
        return DrawnTruth(drawn.select(_some(len(drawn), most, seed)))
    images, masks = (_part(spec, folder) for folder in (IMAGES, MASKS))
    rows, partners = _partners(images, masks)
    some = _some(len(rows), most, seed)
    truth = FileTruth(images.select(rows[some]), masks.select(partners[some]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding leaves Python's lock
        for _ in pool.map(lambda index: _check(truth, index), range(len(truth.images))):
            pass
    return truth


def refuse_among(truth: str, images: str) -> None:
    """Raises DataError if the true masks of ``truth`` lie among ``images``: both as a user names them."""
    if "shapes" in (truth.partition(":")[0], images.partition(":")[0]) or images.startswith("torchvision:"):
        return
    masks, place = _place(_part_name(truth, MASKS)), _place(images)
    if f"{masks}/".startswith(f"{place}/"):
        raise DataError(
            f"{images} holds the true masks of {truth}, and these are for measuring alone.",
            f"Give {_part_name(images, IMAGES)}." if _place(truth) == place else "Give the images without the masks.",
        )


def _place(spec: str) -> str:
    """The real path of a folder, or of one in an archive as if that were a folder."""
    path, folder = (spec, "") if os.path.lexists(spec) or "#" not in spec else spec.rsplit("#", 1)
    return os.path.normpath(os.path.join(os.path.realpath(os.path.expanduser(path)), folder.strip("/")))


def _some(size: int, most: int, seed: int) -> np.ndarray:
    """int64 ``[min(size, most)]``, ascending."""
    shuffled = np.argsort(counted_uniform(seed, Stream.EVAL, np.arange(size), n=1)[:, 0], kind="stable")
    return np.sort(shuffled[:most])


def _part(spec: str, folder: str) -> Source:
    try:
        return open_source(_part_name(spec, folder))
    except DataError as reason:
        raise DataError(
            reason.what,
            f"Give --eval-data a folder or archive that holds {IMAGES}/ and {MASKS}/ with the same names, or shapes.",
        ) from None


def _part_name(spec: str, folder: str) -> str:
    return f"{spec}/{folder}" if "#" in spec and not os.path.lexists(spec) else f"{spec}#{folder}"


def _partners(images: Source, masks: Source) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images, and of the mask that each has: int64 ``[N]`` both. Raises DataError if one has none."""
    stems = {_stem(masks.key(index)): index for index in range(len(masks))}
    wanted = [_stem(images.key(index)) for index in range(len(images))]
    lacking = [images.key(index) for index, stem in enumerate(wanted) if stem not in stems]
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(images)} images in {images.spec} have no mask in {masks.spec}, "
            f"{lacking[0]} among them.",
            "Give every image a mask of the same name, but for what follows the last point.",
        )
    if len(masks) > len(images):
        spare = sorted(stems.keys() - set(wanted))
        example = f", {spare[0]} among them" if spare else ""
        raise DataError(
            f"{len(masks) - len(images)} masks in {masks.spec} belong to no image{example}.",
            "Remove them, or add their images.",
        )
    return np.arange(len(images)), np.array([stems[stem] for stem in wanted])


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _check(truth: FileTruth, index: int) -> None:
    name = truth.images.key(index)
    try:
        height, width = truth.images.load(index).shape[:2]
    except BadImage as bad:
        raise DataError(
            f"The image {name} of {truth.images.spec} cannot be read: {bad.reason}.",
            "Repair it, or remove it and its mask.",
        ) from None
    mask = truth.mask(index)
    if mask.shape != (height, width):
        raise DataError(
            f"The true mask of {name} has {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x {height}.",
            "Give masks of the images' own sizes.",
        )
