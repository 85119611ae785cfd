"""From a soft map to a clean object: a graph cut between the colours inside and outside.

GrabCut (Rother, Kolmogorov and Blake, SIGGRAPH 2004), as OpenCV has it: two mixtures of Gaussians, one of the
object's colours and one of the background's, and the cheapest border between them. The map says where to begin,
and what is beyond doubt. DeepUSPS (arXiv 1909.13055) sharpens its maps by a fully connected CRF at this place.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np


def apply_grabcut(
    images: np.ndarray, maps: np.ndarray, *, background: float, foreground: float, threads: int = 1
) -> np.ndarray:
    """bool ``[B, S, S]``: the objects in ``images``, uint8 ``[B, S, S, 3]``, begun from ``maps``, float ``[B, S, S]``.

    A pixel whose map is below ``background`` or above ``foreground`` keeps its side. The others start on the side
    that Otsu's threshold puts them on. The result depends on the image and its map alone.
    """
    begun = zip(images, maps, strict=True)
    with ThreadPoolExecutor(threads) as pool:  # OpenCV leaves Python's lock
        found = list(pool.map(lambda pair: _apply_grabcut_to_image(pair[0], pair[1], background, foreground), begun))
    return np.stack(found) if found else np.empty(maps.shape, dtype=bool)


GRABCUT_ITERATIONS = 1  # of fitting colours and cutting: a second one brings nothing and costs half as much again


def _apply_grabcut_to_image(
    image: np.ndarray, saliency: np.ndarray, background: float, foreground: float
) -> np.ndarray:
    level, _ = cv2.threshold(np.rint(255 * saliency).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    inside = saliency > level / 255
    state = np.where(inside, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    state[saliency < background] = cv2.GC_BGD
    state[saliency > foreground] = cv2.GC_FGD
    chosen = _is_foreground(state)
    if chosen.all() or not chosen.any():  # no colours to tell apart
        return inside
    cv2.setRNGSeed(0)  # of this thread; the mixtures are seeded by k-means
    mixtures = np.zeros((1, 65)), np.zeros((1, 65))
    nowhere = (0, 0, 0, 0)  # a rectangle is another way to begin
    cv2.grabCut(np.ascontiguousarray(image), state, nowhere, *mixtures, GRABCUT_ITERATIONS, cv2.GC_INIT_WITH_MASK)
    return _is_foreground(state)


def _is_foreground(state: np.ndarray) -> np.ndarray:
    return (state == cv2.GC_FGD) | (state == cv2.GC_PR_FGD)
