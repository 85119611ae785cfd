"""A small image as a graph of superpixels: what all handcrafted priors share, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from skimage.color import rgb2lab
from skimage.segmentation import slic

MAX_SUPERPIXELS = 200  # as long as each has at least MIN_PIXELS
MIN_PIXELS = 16
COMPACTNESS = 0.25  # SLIC: weight of a pixel's position against its colour, whose range in the image is scaled to 1
ITERATIONS = 5
BLUR_SIGMA = 0.5  # standard deviation in pixels before SLIC, against noise
CONTRAST = 10.0  # affinity falls to e^-10 at the strongest contrast of linked superpixels in the image
VISIBLE_DIFFERENCE = 1.0  # the just noticeable difference in CIELab


@dataclass(frozen=True)
class Superpixels:
    """n superpixels of an image.

    ``labels``: int32 ``[H, W]``, 0 to n-1. ``lab``, ``rgb``: float64 ``[n, 3]``, mean colours (CIELab; RGB from 0
    to 1). ``centre``: float64 ``[n, 2]``, row and column from 0 to 1. ``area``: float64 ``[n]``, fraction of the
    image. ``sides``: bool ``[4, n]``, which touch the top, bottom, left, right. ``edges``: int64 ``[E, 2]``, the pairs
    that touch, each once, the smaller number first.
    """

    labels: np.ndarray
    lab: np.ndarray
    rgb: np.ndarray
    centre: np.ndarray
    area: np.ndarray
    sides: np.ndarray
    edges: np.ndarray

    def __len__(self) -> int:
        return len(self.lab)

    @cached_property
    def border(self) -> np.ndarray:
        """Which touch any side: bool ``[n]``."""
        return np.asarray(np.any(self.sides, axis=0))

    @cached_property
    def colour_distance(self) -> np.ndarray:
        """Euclidean distance of mean colours in CIELab: float64 ``[n, n]``."""
        return compute_pairwise_distances(self.lab)

    @cached_property
    def adjacency(self) -> np.ndarray:
        """bool ``[n, n]``, symmetric, False on the diagonal."""
        adjacency = np.zeros((len(self), len(self)), dtype=bool)
        adjacency[self.edges[:, 0], self.edges[:, 1]] = adjacency[self.edges[:, 1], self.edges[:, 0]] = True
        return adjacency

    @cached_property
    def linked(self) -> np.ndarray:
        """Which are neighbours, neighbours of neighbours, or both at the border: bool ``[n, n]``, False diagonal."""
        near = self.adjacency.astype(np.float32)
        linked = (near + near @ near > 0) | (self.border[:, None] & self.border)
        np.fill_diagonal(linked, False)
        return np.asarray(linked)

    @cached_property
    def affinity(self) -> np.ndarray:
        """Similarity of linked superpixels, e^-10 at the strongest contrast of any two: float64 ``[n, n]``."""
        strongest = self.colour_distance[self.linked].max()
        return np.where(self.linked, np.exp(-CONTRAST * self.colour_distance / strongest), 0.0)

    @cached_property
    def is_featureless(self) -> bool:
        """Whether no object can be found: all superpixels touch the border, or no two colours differ visibly."""
        return bool(self.border.all() or self.colour_distance.max() < VISIBLE_DIFFERENCE)


def segment_superpixels(image: np.ndarray) -> Superpixels:
    """Segment ``image``, uint8 ``[H, W, 3]``, a few hundred pixels wide, by SLIC (Achanta et al., 2012)."""
    height, width = image.shape[:2]
    lab = rgb2lab(image)
    count = get_num_superpixels(height * width)
    labels = slic(lab, count, COMPACTNESS, ITERATIONS, BLUR_SIGMA, convert2lab=False, start_label=0)
    return build_superpixels(labels.astype(np.int32), image, lab)


def get_num_superpixels(pixels: int) -> int:
    """Return the number of superpixels for an image of ``pixels`` pixels."""
    return max(1, min(MAX_SUPERPIXELS, pixels // MIN_PIXELS))


def build_superpixels(labels: np.ndarray, image: np.ndarray, lab: np.ndarray) -> Superpixels:
    """Measure the superpixels ``labels``, int ``[H, W]`` from 0 on, of ``image``, uint8 ``[H, W, 3]``, and ``lab``."""
    height, width = labels.shape
    flat = labels.ravel()
    count = np.bincount(flat)

    def compute_mean(values: np.ndarray) -> np.ndarray:
        channels = values.reshape(len(flat), -1).T
        return np.stack([np.bincount(flat, weights=channel) for channel in channels], axis=1) / count[:, None]

    rows, columns = np.indices(labels.shape)
    places = np.stack([(rows + 0.5) / height, (columns + 0.5) / width], axis=-1)
    sides = np.zeros((4, len(count)), dtype=bool)
    for side, line in zip(sides, (labels[0], labels[-1], labels[:, 0], labels[:, -1]), strict=True):
        side[line] = True
    return Superpixels(
        labels=labels, lab=compute_mean(lab), rgb=compute_mean(image) / 255.0, centre=compute_mean(places),
        area=count / len(flat), sides=sides, edges=_find_edges(labels, len(count)),
    )  # fmt: skip


def _find_edges(labels: np.ndarray, n: int) -> np.ndarray:
    """Return the pairs of superpixels that share a side of a pixel: int64 ``[E, 2]``."""
    across = np.stack([labels[:, :-1].ravel(), labels[:, 1:].ravel()])
    down = np.stack([labels[:-1].ravel(), labels[1:].ravel()])
    pairs = np.concatenate([across, down], axis=1)
    pairs = pairs[:, pairs[0] != pairs[1]].astype(np.int64)
    codes = np.unique(pairs.min(axis=0) * n + pairs.max(axis=0))
    return np.stack([codes // n, codes % n], axis=1)


def compute_pairwise_distances(points: np.ndarray) -> np.ndarray:
    """Return the Euclidean distances among ``points``, ``[n, d]``: ``[n, n]``."""
    square = np.zeros((len(points), len(points)))
    for coordinate in points.T:  # exact zeros on the diagonal, unlike the expanded square
        square += np.square(coordinate[:, None] - coordinate)
    return np.asarray(np.sqrt(square))


def normalize_min_max(values: np.ndarray) -> np.ndarray:
    """Scale ``values`` linearly to 0 to 1; all NaN where they are constant or not finite."""
    low, high = values.min(), values.max()
    if not np.isfinite(high - low) or high - low <= 1e-9 * max(abs(high), abs(low)):
        return np.full(values.shape, np.nan)
    return np.asarray((values - low) / (high - low))
