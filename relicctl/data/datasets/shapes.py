"""The embedded demo data: ten kinds of labelled objects on misleading backgrounds, with their true masks.

Objects of one kind share outline, surface pattern and parts; they vary in place, size, angle, proportion,
colour and light, and lie before clutter. A background is a texture with a tint. In the training split most
backgrounds are the one that goes with the label, in the other split they are independent of it: a network that
learns backgrounds instead of objects fails there. Every image is a pure function of (seed, split, index), drawn
when it is read.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from relicctl.core.counter_rng import Stream, draw_uniform
from relicctl.data.datasets.base import ImageDataset
from relicctl.data.datasets.shapes_drawing import CLASSES, NUM_UNIFORMS, render_image
from relicctl.errors import DataError

VERSION = 1  # raise it when any image changes: the fingerprint holds it
IMAGE_DRAWS, BACKGROUND_DRAWS = 0, 1  # what the numbers of a draw are for
BACKGROUNDS = ("random", "matched", "swapped")
# What a setting may be: in words, and as a test.
ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": ("a whole number of pixels from 16 to 512", lambda value: 16 <= value <= 512),
    "train": ("a number of images from 1 to 10,000,000", lambda value: 1 <= value <= 10_000_000),
    "val": ("a number of images from 1 to 10,000,000", lambda value: 1 <= value <= 10_000_000),
    "seed": ("a whole number from 0 on", lambda value: value >= 0),
    "correlation": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "backgrounds": (" or ".join(BACKGROUNDS), lambda value: value in BACKGROUNDS),
}


@dataclass(frozen=True)
class ShapesSpec:
    """What may follow ``shapes:``, as ``key=value`` separated by commas."""

    size: int = 48  # pixels of a side
    train: int = 4000  # images of the training split
    val: int = 1000  # images of the test split
    seed: int = 0
    correlation: float = 0.8  # fraction of training images before the background that goes with their label
    backgrounds: str = "random"  # of the test split: any, always the label's, or never that

    @classmethod
    def parse(cls, spec: str) -> ShapesSpec:
        """Read ``shapes`` or ``shapes:key=value,...``. Raises DataError for anything else."""
        _, _, settings = spec.partition(":")
        defaults: dict[str, Any] = {field.name: field.default for field in fields(cls)}
        values: dict[str, Any] = {}
        for setting in filter(None, settings.split(",")):
            key, _, text = setting.partition("=")
            if key not in defaults:
                near = difflib.get_close_matches(key, defaults, n=1) or list(defaults)
                raise DataError(f"The demo data have no setting {key!r}.", f"Use {', '.join(near)}.")
            allowed, is_valid = ALLOWED[key]
            values[key] = text
            with suppress(ValueError):
                values[key] = type(defaults[key])(text)
            if type(values[key]) is not type(defaults[key]) or not is_valid(values[key]):
                raise DataError(f"The demo data cannot have {key}={values[key]}.", f"Give {key} {allowed}.")
        return cls(**values)


class ShapesDataset(ImageDataset):
    """Images ``rows``, int64 ``[N]``, of one split. ``background_ids``, int64 ``[N]``: the texture behind each."""

    classes = CLASSES
    labels: np.ndarray

    def __init__(self, spec: str, settings: ShapesSpec, split: Literal["train", "val"], rows: np.ndarray) -> None:
        self.spec, self.settings, self.split, self.rows = spec, settings, split, rows
        self.namespace = f"shapes {VERSION} {settings.seed}"  # objects depend on no more, beside their names
        self.labels = rows % len(CLASSES)
        self.background_ids = self._draw_backgrounds()

    @classmethod
    def from_spec(
        cls, spec: str, split: Literal["train", "val"], warn: Callable[[str], None] = lambda text: None
    ) -> ShapesDataset:
        """Open ``shapes[:key=value,...]``; see ShapesSpec for the keys. Raises DataError.

        ``warn`` is called if a folder here has the same name.
        """
        if os.path.exists(spec):
            warn(f"{spec} is the embedded demo data, and not what has this name here: that is ./{spec}")
        settings = ShapesSpec.parse(spec)
        return cls(spec, settings, split, np.arange(settings.train if split == "train" else settings.val))

    def __len__(self) -> int:
        return len(self.rows)

    def get_name(self, index: int) -> str:
        return f"{self.split}/{CLASSES[self.labels[index]]}/{self.rows[index]:05d}"

    def read(self, index: int) -> np.ndarray:
        return self._render(index)[0]

    def load_mask(self, index: int) -> np.ndarray:
        """Return where the object is: bool ``[H, W]``."""
        return self._render(index)[1]

    def select(self, indices: Iterable[int] | np.ndarray) -> ShapesDataset:
        rows = self.rows[np.fromiter(indices, dtype=np.int64)]
        return ShapesDataset(self.spec, self.settings, self.split, rows)

    def compute_fingerprint(self) -> str:
        """Return the SHA-256 (hex) over all that the images depend on."""
        digest = hashlib.sha256(f"{VERSION} {self.settings} {self.split}".encode())
        digest.update(self.rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def _render(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        uniforms = self._draw_uniforms(self.rows[index], IMAGE_DRAWS, n=NUM_UNIFORMS)
        return render_image(uniforms, int(self.labels[index]), int(self.background_ids[index]), self.settings.size)

    def _draw_backgrounds(self) -> np.ndarray:
        which, other = self._draw_uniforms(self.rows, BACKGROUND_DRAWS, n=2).T
        kinds = len(CLASSES)
        wrong = (self.labels + 1 + (other * (kinds - 1)).astype(np.int64)) % kinds
        if self.split == "train":
            return np.where(which < self.settings.correlation, self.labels, wrong)
        choices = {"random": (other * kinds).astype(np.int64), "matched": self.labels, "swapped": wrong}
        return np.asarray(choices[self.settings.backgrounds])

    def _draw_uniforms(self, rows: np.ndarray, purpose: int, n: int) -> np.ndarray:
        split = 0 if self.split == "train" else 1
        return draw_uniform(self.settings.seed, Stream.SHAPES, split, rows, purpose, n=n)
