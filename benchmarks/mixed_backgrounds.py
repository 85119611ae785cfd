"""Build test sets of photos whose backgrounds mislead: foregrounds pasted onto backgrounds of other images.

    relicctl train-bgmask --preset resnet-bgmask --data photos.zip#val --out runs/masks
    python benchmarks/mixed_backgrounds.py photos.zip#val --masks runs/masks --out mixed
    relicctl linear-eval RUN --test original=mixed/original --test same=mixed/same --test random=mixed/random

Three folders with the same foregrounds, one class per sub-folder: `original` (untouched images), `same` (background of
another image of the class) and `random` (background of an image of another class). What is lost between `same` and
`random` is what an encoder reads from backgrounds; both have the same cut edges. The idea is that of "Noise or
Signal" (Xiao et al., arXiv 2006.09994); there the masks come from annotated boxes, here from our mask network, which
never saw a label. Where a background's own object was, it is filled from its surroundings.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageFilter

from relicctl.data.datasets.base import ImageDataset
from relicctl.data.datasets.open import open_dataset
from relicctl.data.mask_bank import MaskBank

FOREGROUND_RANGE = (0.05, 0.7)  # of the image: less is hardly an object, more leaves no background
EDGE_BLUR = 0.006  # of the image's longer side: softens the cut
INPAINT_RADIUS = 5  # px
JPEG_QUALITY = 95


class MaskedPhotos:
    """Images of a labelled data set whose masks can be used, with their masks."""

    def __init__(self, images: ImageDataset, masks: Path) -> None:
        self.images = images
        self._bank, self._rows = MaskBank.open_for(masks, images)
        ratios = self._bank.get_foreground_ratio(self._rows)
        self.usable = np.flatnonzero((ratios >= FOREGROUND_RANGE[0]) & (ratios <= FOREGROUND_RANGE[1]))

    def load(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Return the photo, RGB, and its foreground in grey levels with soft edges, of the same size."""
        photo = Image.fromarray(self.images.load(index))
        mask = Image.fromarray(self._bank.load_mask(int(self._rows[index])).astype(np.uint8) * 255)
        mask = mask.resize(photo.size, Image.Resampling.BICUBIC)
        return photo, mask.filter(ImageFilter.GaussianBlur(EDGE_BLUR * max(photo.size)))


def fill_foreground(photo: Image.Image, mask: Image.Image) -> Image.Image:
    """Return the photo without its object, filled from the surroundings (Telea's inpainting)."""
    hole = (np.asarray(mask) > 32).astype(np.uint8)
    hole = cv2.dilate(hole, np.ones((3, 3), np.uint8), iterations=max(1, round(0.02 * max(photo.size))))
    return Image.fromarray(cv2.inpaint(np.asarray(photo), hole, INPAINT_RADIUS, cv2.INPAINT_TELEA))


def paste(foreground: tuple[Image.Image, Image.Image], background: Image.Image) -> Image.Image:
    """Paste a photo's foreground, at its place, onto a background scaled to cover the photo."""
    photo, mask = foreground
    scale = max(photo.width / background.width, photo.height / background.height)
    covering = background.resize(
        (max(photo.width, round(background.width * scale)), max(photo.height, round(background.height * scale))),
        Image.Resampling.BICUBIC,
    )
    left, top = (covering.width - photo.width) // 2, (covering.height - photo.height) // 2
    canvas = covering.crop((left, top, left + photo.width, top + photo.height))
    canvas.paste(photo, mask=mask)
    return canvas


def draw_backgrounds(labels: np.ndarray, same_class: bool, rng: np.random.Generator) -> np.ndarray:
    """Draw for every image the position of another one, of the same class or of another: int ``[N]``, -1 if none."""
    chosen = np.full(len(labels), -1)
    for position, label in enumerate(labels):
        candidates = np.flatnonzero((labels == label) == same_class)
        candidates = candidates[candidates != position]
        if len(candidates):
            chosen[position] = rng.choice(candidates)
    return chosen


def build(photos: MaskedPhotos, out: Path, seed: int) -> dict[str, int]:
    """Write the three folders; return what was written."""
    labels = photos.images.labels
    if labels is None:
        sys.exit(f"{photos.images.spec} has no classes: give a folder with one sub-folder per class.")
    labels, rng = labels[photos.usable], np.random.default_rng(seed)
    partners = {kind: draw_backgrounds(labels, kind == "same", rng) for kind in ("same", "random")}
    written = 0
    for position, index in enumerate(photos.usable):
        if any(chosen[position] < 0 for chosen in partners.values()):
            continue  # a class of one image
        foreground = photos.load(index)
        results = {"original": foreground[0]}
        for kind, chosen in partners.items():
            results[kind] = paste(foreground, fill_foreground(*photos.load(photos.usable[chosen[position]])))
        for kind, image in results.items():
            path = out / kind / photos.images.classes[labels[position]] / f"{written:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=JPEG_QUALITY, subsampling=0)
        written += 1
    return {"images": len(photos.images), "usable_masks": len(photos.usable), "written": written, "seed": seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labelled images, as for --data")
    parser.add_argument("--masks", type=Path, required=True, help="run of train-bgmask, or its masks.bank")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        sys.exit(f"{options.out} exists: give a new folder.")
    photos = MaskedPhotos(open_dataset(options.data), options.masks)
    summary = build(photos, options.out, options.seed)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
