"""The images of the demo data: an object of one of ten kinds, clutter, and a textured background behind.

Everything is drawn with numpy from signed distances, which makes edges smooth at any size, in a fraction of a
millisecond. Lengths are halves of the image's side unless said otherwise.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from functools import lru_cache
from itertools import islice

import numpy as np

Array = np.ndarray
NUM_UNIFORMS = 200  # uniform numbers that one image may use


def render_image(uniforms: Array, kind: int, background: int, size: int) -> tuple[Array, Array]:
    """Draw one image: uint8 ``[size, size, 3]``, and its object's true mask, bool ``[size, size]``.

    ``uniforms``: at least ``NUM_UNIFORMS`` numbers in [0, 1), which determine everything else:
    ``kind`` counts in OBJECTS, ``background`` in TEXTURES. Another background leaves the object as it is.
    """
    uniform = _UniformStream(uniforms)
    x, y = _make_grid(size)

    # A background is two shades of its tint, mixed by its texture, both dull, so that the object stands out.
    noise = (_upsample_lattice(uniform.draw_lattice(7), size) + _upsample_lattice(uniform.draw_lattice(9), size)) / 2
    s, t = _rotate(x, y, uniform(0, 2 * np.pi))
    scale = uniform(4, 6.5)
    texture = TEXTURES[background](s * scale + uniform(0, 9), t * scale + uniform(0, 9), noise)
    tint = background / len(TEXTURES) + uniform(-0.075, 0.075)
    saturation, value, contrast = uniform(0.15, 0.35), uniform(0.4, 0.7), uniform(0.05, 0.13)
    darker, lighter = (_make_rgb(tint, saturation, value + sign * contrast) for sign in (-1, 1))
    canvas = _blend(darker, lighter, texture)
    for _ in range(3):  # small things that lie about
        p, q = _rotate(x + uniform(-1, 1), y + uniform(-1, 1), uniform(0, np.pi))
        blot = _compute_box(p, q, 0, 0, uniform(0.03, 0.08), uniform(0.03, 0.15))
        canvas = _blend(canvas, _make_rgb(uniform(), uniform(0, 0.6), uniform(0.2, 1)), _compute_coverage(blot, size))

    # The object has a dark and a light colour of any hue; either may be the ground of the pattern.
    radius, stretch, mirror = uniform(0.55, 0.95), uniform(0.9, 1.1), -1 if uniform() < 0.5 else 1
    u, v = _rotate(x - uniform(-0.3, 0.3), y - uniform(-0.3, 0.3), uniform(-np.pi / 2, np.pi / 2))
    distance, tone = OBJECTS[CLASSES[kind]](u * (mirror * stretch / radius), v / (radius * stretch), uniform())
    dark = _make_rgb(uniform(), uniform(0.2, 0.9), uniform(0.1, 0.35))
    light = _make_rgb(uniform(), uniform(0, 0.6), uniform(0.8, 1))
    ground, pattern = (dark, light) if uniform() < 0.5 else (light, dark)
    cover = _compute_coverage(distance * radius, size)
    canvas = _blend(canvas, _blend(ground, pattern, tone), cover)

    # Light falls from one side.
    p, _ = _rotate(x, y, uniform(0, 2 * np.pi))
    canvas = canvas * (uniform(0.85, 1) + uniform(0, 0.25) * p)
    pixels = np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)), cover > 0.5


class _UniformStream:
    """Gives prepared uniform numbers one by one, as Python floats: those leave pixels in float32."""

    def __init__(self, uniforms: Array) -> None:
        self._rest = iter(uniforms.tolist())

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        return float(low + (high - low) * next(self._rest))

    def draw_lattice(self, knots: int) -> Array:
        return np.array(list(islice(self._rest, knots * knots)), dtype=np.float32).reshape(knots, knots)


def _rotate(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    c, s = float(np.cos(angle)), float(np.sin(angle))
    return c * x + s * y, c * y - s * x


def _compute_coverage(distance: Array, size: int) -> Array:
    """Compute how much of each pixel lies within an outline, from the signed distance to it."""
    return np.clip(0.5 - distance * (size / 2), 0, 1)


def _blend(a: Array, b: Array, t: Array) -> Array:
    return np.asarray(a + (b - a) * t)


def _make_rgb(hue: float, saturation: float, value: float) -> Array:
    """Convert to RGB: float32 ``[3, 1, 1]``."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32)[:, None, None]


@lru_cache
def _make_grid(size: int) -> tuple[Array, Array]:
    """Return x (to the right) and y (down) of the pixels' centres, in [-1, 1]: float32 ``[size, size]`` each."""
    line = ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)
    return line[None, :].repeat(size, 0), line[:, None].repeat(size, 1)


def _upsample_lattice(knots: Array, size: int) -> Array:
    """Stretch a lattice ``[k, k]`` over the image by linear interpolation."""
    weights = _make_interpolation(size, len(knots))
    return np.asarray(weights @ knots @ weights.T)


@lru_cache
def _make_interpolation(size: int, knots: int) -> Array:
    at = np.linspace(0, knots - 1, size)[:, None] - np.arange(knots)
    return np.asarray(np.maximum(0, 1 - np.abs(at)), dtype=np.float32)


# Objects. Each is a function of its coordinates (u to the right, v down, about 1 from centre to rim) and
# of a proportion a in [0, 1). It gives a signed distance to its outline (negative inside, same unit) and a
# tone in [0, 1], which mixes the object's two colours into its pattern and parts.


def _compute_disc(u: Array, v: Array, x: float, y: float, radius: float) -> Array:
    return np.hypot(u - x, v - y) - radius


def _compute_box(u: Array, v: Array, x: float, y: float, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(u - x) - half_width, np.abs(v - y) - half_height)


def _make_stripes(x: Array) -> Array:
    """Return stripes with soft edges, one per unit of x."""
    return np.clip(0.5 + 1.5 * np.sin(2 * np.pi * x), 0, 1)


def _make_soft_mask(distance: Array) -> Array:
    """Return 1 within, 0 without, a soft step between (for patterns; outlines get their width from the pixel)."""
    return np.clip(0.5 - distance * 10, 0, 1)


def _make_wheel(u: Array, v: Array, a: float) -> tuple[Array, Array]:
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    spokes = 3 + int(a * 3)
    spoke = np.maximum(radius * np.abs(np.sin(angle * spokes)) / spokes * 1.6 - 0.09, radius - 0.8)
    hub = radius - 0.27
    return np.minimum(np.minimum(np.abs(radius - 0.8) - 0.17, spoke), hub), _make_soft_mask(np.abs(radius - 0.8) - 0.1)


def _make_flower(u: Array, v: Array, a: float) -> tuple[Array, Array]:
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    petals = 5 + int(a * 3)
    tone = np.maximum(_make_soft_mask(radius - 0.3), radius * 0.5 - 0.1)
    return (radius - 0.68 - 0.25 * np.cos(petals * angle)) * 0.7, tone


def _make_fish(u: Array, v: Array, a: float) -> tuple[Array, Array]:
    height = 0.42 + 0.16 * a
    body = (np.hypot((u + 0.2) / 0.75, v / height) - 1) * height
    tail = np.maximum(np.abs(v) - (u - 0.35) * 0.9, u - 0.95)
    eye = _make_soft_mask(_compute_disc(u, v, -0.62, -0.1, 0.1))
    return np.minimum(body, tail), np.where(u < -0.42, eye, _make_stripes(u * 3.2))


def _make_kite(u: Array, v: Array, a: float) -> tuple[Array, Array]:
    width = 0.6 + 0.2 * a
    top = np.maximum(np.abs(u) / width + np.where(v < 0, -v / 0.6, v / 1.0), 0)
    return (top - 1) * 0.5, np.clip(0.5 + 3 * np.sin(u * 7) * np.sin(v * 7), 0, 1)


def _make_mushroom(u: Array, v: Array, a: float) -> tuple[Array, Array]:
    cap = np.maximum(np.hypot(u, v - 0.1) - 0.88, v - 0.1)
    stem = _compute_box(u, v, 0, 0.45, 0.2 + 0.12 * a, 0.5)
    dots = [_compute_disc(u, v, x, y, 0.17) for x, y in ((-0.45, -0.15), (0.0, -0.42), (0.45, -0.15))]
    return np.minimum(cap, stem), np.where(v > 0.1, 0.8, _make_soft_mask(np.minimum.reduce(dots)))


def _make_house(u: Array, v: Array, a: float) -> tuple[Array, Array]:
    walls = _compute_box(u, v, 0, 0.35, 0.6, 0.5)
    roof = np.maximum((np.abs(u) * (0.8 + 0.3 * a) - v - 0.85) * 0.7, v + 0.05)
    openings = np.minimum(_compute_box(u, v, -0.25, 0.3, 0.15, 0.15), _compute_box(u, v, 0.25, 0.52, 0.14, 0.33))
    return np.minimum(walls, roof), np.where(v < -0.05, 1, _make_soft_mask(openings))


def _make_star(u: Array, v: Array, a: float) -> tuple[Array, Array]:
    radius, angle = np.hypot(u, v), np.arctan2(v, u) + np.pi / 2
    half = np.pi / 5
    folded = (angle + half) % (2 * half) - half  # one of the ten facets, the tip at angle 0
    waist = 0.38 + 0.14 * a
    edge = np.array([waist * np.cos(half) - 1, waist * np.sin(half)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    distance = (radius * np.cos(folded) - 1) * normal[0] + radius * np.abs(np.sin(folded)) * normal[1]
    return distance, _make_soft_mask(folded)


def _make_beetle(u: Array, v: Array, a: float) -> tuple[Array, Array]:
    width = 0.5 + 0.15 * a
    body = (np.hypot(u / width, (v - 0.15) / 0.75) - 1) * width
    head = _compute_disc(u, v, 0, -0.68, 0.26)
    legs = np.maximum(np.abs((v - 0.1) % 0.45 - 0.225) - 0.06, _compute_box(u, v, 0, 0.1, 0.85, 0.6))
    dots = [_compute_disc(np.abs(u), v, 0.27, y, 0.13) for y in (-0.1, 0.3, 0.62)]
    tone = np.minimum.reduce([*dots, np.abs(u) - 0.03, np.where(v < -0.42, -1.0, 1.0)])
    return np.minimum(np.minimum(body, head), legs), _make_soft_mask(tone)


def _make_snail(u: Array, v: Array, a: float) -> tuple[Array, Array]:
    radius, angle = np.hypot(u - 0.1, v + 0.1), np.arctan2(v + 0.1, u - 0.1)
    shell = radius - 0.66
    foot = _compute_box(u, v, -0.1, 0.62, 0.89, 0.2)
    neck = _compute_box(u, v, -0.86, 0.3, 0.13, 0.45)
    spiral = _make_stripes(radius * (2.6 + a) - angle / (2 * np.pi))
    return np.minimum(np.minimum(shell, foot), neck), np.where(shell < 0, spiral, 0.9)


def _make_leaf(u: Array, v: Array, a: float) -> tuple[Array, Array]:
    offset = 0.45 + 0.2 * a
    blade = np.hypot(u, np.abs(v) + offset) - np.hypot(1.0, offset)
    stalk = _compute_box(u, v, 0.95, 0, 0.3, 0.05)
    veins = _make_stripes((u + np.abs(v)) * 2.8)
    return np.minimum(blade, stalk), np.maximum(veins, _make_soft_mask(np.abs(v) - 0.04))


OBJECTS: dict[str, Callable[[Array, Array, float], tuple[Array, Array]]] = {
    "beetle": _make_beetle,
    "fish": _make_fish,
    "flower": _make_flower,
    "house": _make_house,
    "kite": _make_kite,
    "leaf": _make_leaf,
    "mushroom": _make_mushroom,
    "snail": _make_snail,
    "star": _make_star,
    "wheel": _make_wheel,
}
CLASSES = tuple(OBJECTS)

# Textures, functions of turned and shifted coordinates (about ten units across the image) and of smooth noise
# in [0, 1]. The i-th goes with the i-th kind of object, and so does the i-th tint of the colour circle.
TEXTURES: tuple[Callable[[Array, Array, Array], Array], ...] = (
    lambda x, y, noise: noise,  # clouds
    lambda x, y, noise: _make_stripes(x * 0.5),  # stripes
    lambda x, y, noise: np.clip(0.5 + 2 * np.sin(x * 1.7) * np.sin(y * 1.7), 0, 1),  # checks
    lambda x, y, noise: np.clip(3 - 5 * np.hypot(x % 2 - 1, y % 2 - 1), 0, 1),  # dots
    lambda x, y, noise: _make_stripes(x * 0.5 + 0.3 * np.sin(y)),  # waves
    lambda x, y, noise: np.clip(
        6 * np.minimum(np.abs(y % 1.6 - 0.8), np.abs((x + 1.5 * (y % 3.2 > 1.6)) % 3 - 1.5)), 0, 1
    ),  # bricks
    lambda x, y, noise: np.clip(0.5 + 6 * (noise - 0.5), 0, 1),  # blotches
    lambda x, y, noise: _make_stripes(np.hypot(x, y) * 0.4),  # ripples
    lambda x, y, noise: (x * 0.15 + 0.15 * noise) % 1,  # slopes
    lambda x, y, noise: np.maximum(_make_stripes(x * 0.9), _make_stripes(y * 0.9)),  # lattice
)
