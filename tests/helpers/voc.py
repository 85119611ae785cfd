"""A small VOC, laid out as the real one unpacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

Objects = dict[str, list[str]]  # by image; "cat?" is a difficult cat


def write_voc(folder: Path, lists: dict[str, Objects], side: int = 24) -> Path:
    """Images of noise, redder for each cat in them; ``lists``: what is in the images of each list."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for part, images in lists.items():
        (folder / "ImageSets/Main" / f"{part}.txt").write_text("".join(f"{stem}\n" for stem in images))
        for stem, objects in images.items():
            pixels = np.random.default_rng(int(stem)).integers(0, 128, (side, side, 3), np.uint8)
            pixels[..., 0] += 100 * ("cat" in objects)
            Image.fromarray(pixels).save(folder / f"JPEGImages/{stem}.jpg")
            things = "".join(
                f"<object><name>{name.rstrip('?')}</name><difficult>{int(name.endswith('?'))}</difficult><bndbox>"
                "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
                for name in objects
            )
            (folder / f"Annotations/{stem}.xml").write_text(
                f"<annotation><size><width>{side}</width><height>{side}</height></size>{things}</annotation>"
            )
    return folder
