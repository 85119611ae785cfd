"""The contact sheet: some images beside every prior's map, the priors' mean and the predicted mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from relicctl.runs.plots import new_figure, save_figure

MAX_IMAGES = 16  # on a sheet
MAX_ROWS = 8  # of one column of images; more stand in a second block beside it
TILE, GAP, BLOCK_GAP = 112, 4, 24  # pixels: a tile's side, the gap of two, the gap of two blocks
TITLE_HEIGHT = 26  # pixels above the tiles
DPI = 100
WHITE, MISSING = 255, np.array((255, 214, 214), dtype=np.uint8)  # the latter where a prior is not valid


def sample_evenly(count: int, max_count: int = MAX_IMAGES) -> np.ndarray:
    """Return int64 ``[min(count, max_count)]``: indices below ``count``, evenly spaced, ascending."""
    num_shown = min(count, max_count)
    return (np.arange(num_shown) * count + count // 2) // max(num_shown, 1)


def draw_contact_sheet(
    path: Path, images: np.ndarray, maps: np.ndarray, masks: np.ndarray, names: Sequence[str]
) -> None:
    """Draw a PNG to ``path``, written atomically.

    ``images``: uint8 ``[K, S, S, 3]``. ``maps``: float ``[K, P, S, S]`` from 0 to 1, those of the priors in ``names``;
    all NaN where not valid. ``masks``: bool ``[K, S, S]``.
    """
    titles = ["image", *names, "mean", "mask"]
    mosaic = _build_mosaic(_build_tiles(images, maps, masks))
    height, width = mosaic.shape[:2]
    figure = new_figure(width / DPI, (height + TITLE_HEIGHT) / DPI, dpi=DPI, layout=None)
    axes = figure.add_axes((0, 0, 1, height / (height + TITLE_HEIGHT)))
    axes.imshow(mosaic, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for column, left in enumerate(_compute_left_edges(len(titles), _count_blocks(len(images)))):
        title = titles[column % len(titles)]
        axes.text(left + TILE / 2, -6, title, ha="center", va="bottom", fontsize=11, clip_on=False)
    save_figure(path, figure, DPI)


def _build_tiles(images: np.ndarray, maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return uint8 ``[K, P + 3, TILE, TILE, 3]``: image, maps, their mean, mask."""
    valid = np.isfinite(maps).all(axis=(2, 3))[..., None, None]
    count = valid.sum(axis=1)
    mean = np.where(valid, maps, 0).sum(axis=1) / np.maximum(count, 1)
    mean[count[:, 0, 0] == 0] = np.nan
    grey = np.concatenate([maps, mean[:, None], masks[:, None].astype(maps.dtype)], axis=1)
    shown = np.repeat(np.rint(255 * np.nan_to_num(grey))[..., None], 3, axis=-1).astype(np.uint8)
    shown[np.isnan(grey).any(axis=(2, 3))] = MISSING
    nearest = ((np.arange(TILE) + 0.5) * images.shape[-2] / TILE).astype(np.int64)  # the tiles' pixels in the images
    return np.asarray(np.concatenate([images[:, None], shown], axis=1)[..., nearest, :, :][..., nearest, :])


def _build_mosaic(tiles: np.ndarray) -> np.ndarray:
    """Return uint8 ``[H, W, 3]``: a row per image, in one or two blocks."""
    images, columns = tiles.shape[:2]
    blocks = _count_blocks(images)
    rows = -(-images // blocks)
    lefts = _compute_left_edges(columns, blocks)
    canvas = np.full((rows * (TILE + GAP) - GAP, lefts[-1] + TILE, 3), WHITE, dtype=np.uint8)
    for number, row in enumerate(tiles):
        top = (number % rows) * (TILE + GAP)
        for column, tile in enumerate(row):
            left = lefts[(number // rows) * columns + column]
            canvas[top : top + TILE, left : left + TILE] = tile
    return canvas


def _count_blocks(images: int) -> int:
    return 1 if images <= MAX_ROWS else 2


def _compute_left_edges(columns: int, blocks: int) -> list[int]:
    """Return where the tiles of a row begin, in pixels."""
    block = columns * (TILE + GAP) - GAP + BLOCK_GAP
    return [number * block + column * (TILE + GAP) for number in range(blocks) for column in range(columns)]
