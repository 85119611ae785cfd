"""The contact sheet: which images are on it, that each tile is where its title says, and that gaps are told."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from relicctl.bgmask.contact_sheet import BLOCK_GAP, GAP, MISSING, TILE, TITLE_HEIGHT, draw_contact_sheet, sample_evenly

NAMES = ("one", "two")
COLUMNS = 5


@pytest.mark.parametrize(("count", "most"), [(1, 16), (5, 16), (16, 16), (17, 16), (2500, 16), (0, 16)])
def test_images_are_spread_evenly(count, most):
    chosen = sample_evenly(count, most)
    assert len(chosen) == min(count, most) == len(set(chosen.tolist()))
    if count:
        assert chosen[0] >= 0
        assert chosen[-1] < count
        gaps = np.diff(np.concatenate([[chosen[-1] - count], chosen]))  # around the end, too
        assert gaps.max() - gaps.min() <= 1


def drawn(tmp_path, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A sheet as pixels, and the images, maps and masks on it, every tile of one colour of its own."""
    side = 8
    images = np.empty((count, side, side, 3), dtype=np.uint8)
    images[:] = (np.arange(count)[:, None, None, None] * 9 + np.array([40, 80, 10])).astype(np.uint8)
    maps = np.empty((count, len(NAMES), side, side), dtype=np.float32)
    maps[:] = (np.arange(count * len(NAMES)).reshape(count, -1) / (count * len(NAMES)))[..., None, None]
    masks = np.arange(count)[:, None, None] % 2 == np.zeros((side, side))
    if count > 1:
        maps[1, 0] = np.nan
    draw_contact_sheet(tmp_path / "sheet.png", images, maps, masks, NAMES)
    return np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")), images, maps, masks


def tile(pixels: np.ndarray, row: int, column: int, block: int = 0) -> np.ndarray:
    """The middle of a tile."""
    left = block * (COLUMNS * (TILE + GAP) - GAP + BLOCK_GAP) + column * (TILE + GAP)
    return pixels[TITLE_HEIGHT + row * (TILE + GAP) + TILE // 2, left + TILE // 2]


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (3, 3), (8, 8), (9, 5), (16, 8)])
def test_every_tile_is_where_it_belongs(tmp_path, count, rows):
    pixels, images, maps, masks = drawn(tmp_path, count)
    for number in range(count):
        row, block = number % rows, number // rows
        assert abs(tile(pixels, row, 0, block).astype(int) - images[number, 0, 0]).max() <= 1
        known = [m[0, 0] for m in maps[number] if np.isfinite(m).all()]
        for column in range(len(NAMES)):
            value = maps[number, column, 0, 0]
            expected = MISSING if np.isnan(value) else np.full(3, round(255 * value))
            assert abs(tile(pixels, row, 1 + column, block).astype(int) - expected).max() <= 1
        assert abs(int(tile(pixels, row, 3, block)[0]) - 255 * np.mean(known)) <= 1.5
        assert tile(pixels, row, 4, block)[0] == 255 * masks[number, 0, 0]


def test_tiles_cover_most_of_the_sheet(tmp_path):
    pixels, *_ = drawn(tmp_path, 16)
    tiles = 16 * COLUMNS * TILE**2
    assert tiles / (pixels.shape[0] * pixels.shape[1]) > 0.85


def test_titles_stand_above_every_column(tmp_path):
    pixels, *_ = drawn(tmp_path, 16)
    for block in range(2):
        for column in range(COLUMNS):
            left = block * (COLUMNS * (TILE + GAP) - GAP + BLOCK_GAP) + column * (TILE + GAP)
            above = pixels[:TITLE_HEIGHT, left : left + TILE]
            assert (above < 100).any()
            assert (above[:, 0] == 255).all()  # a title does not run into its neighbour's


def test_an_image_without_any_prior_has_no_mean(tmp_path):
    maps = np.full((1, 2, 8, 8), np.nan, dtype=np.float32)
    images, masks = np.zeros((1, 8, 8, 3), dtype=np.uint8), np.zeros((1, 8, 8), dtype=bool)
    draw_contact_sheet(tmp_path / "sheet.png", images, maps, masks, NAMES)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    for column in (1, 2, 3):
        assert (tile(pixels, 0, column) == MISSING).all()


def test_a_sheet_is_written_atomically(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise OSError("no space left on device")

    drawn(tmp_path, 2)
    before = (tmp_path / "sheet.png").read_bytes()
    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="no space"):
        drawn(tmp_path, 3)
    assert (tmp_path / "sheet.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
