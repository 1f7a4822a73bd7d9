"""Shapes of the parts line: bolts, nuts, washers and look-alikes as shaded, anti-aliased sprites.

What it is: signed-distance shapes with a height map each, lit by one directional light and a fake environment.
What it is not: a ray tracer, or a source of randomness (every random choice comes from the caller's generator).
Invariants: colours are float32 BGR in linear light, 0..1; alpha is float32 0..1; a sprite is square, its centre is the
part's centre, and the outline never touches the sprite's border.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
"""Float32 image or plane."""

LABELS = ("bolt", "nut", "washer")
"""Classes of the detector, in the order of its heat map's channels."""


@dataclass(frozen=True, slots=True)
class Sprite:
    """A drawn part, before scene light.

    `color` is [n, n, 3], `alpha` and `shadow` are [n, n]; `extent` is (left, top, right, bottom) of the outline in
    pixels relative to the sprite's centre.
    """

    color: Array
    alpha: Array
    shadow: Array
    extent: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Finish:
    """Surface of a part: linear BGR reflectance, mirror share 0..1, strength of the brushed grain."""

    bgr: tuple[float, float, float]
    gloss: float
    grain: float


FINISHES = {
    "zinc": Finish((0.46, 0.44, 0.41), 0.55, 0.10),
    "stainless": Finish((0.55, 0.55, 0.55), 0.75, 0.07),
    "brass": Finish((0.16, 0.40, 0.55), 0.60, 0.08),
    "black": Finish((0.075, 0.07, 0.07), 0.35, 0.05),
    "rust": Finish((0.10, 0.17, 0.30), 0.15, 0.22),
    "rubber": Finish((0.03, 0.03, 0.03), 0.08, 0.03),
    "card": Finish((0.32, 0.45, 0.55), 0.00, 0.05),
    "plastic": Finish((0.20, 0.22, 0.50), 0.30, 0.02),
}
"""Named surfaces; a configuration chooses among them."""


def _box(u: Array, v: Array, half_u: float, half_v: float, radius: float) -> Array:
    du = np.abs(u) - (half_u - radius)
    dv = np.abs(v) - (half_v - radius)
    outside = np.hypot(np.maximum(du, 0.0), np.maximum(dv, 0.0))
    return np.asarray(outside + np.minimum(np.maximum(du, dv), 0.0) - radius, np.float32)


def _hexagon(u: Array, v: Array, apothem: float) -> Array:
    distance = np.abs(v)
    for angle in (math.pi / 6, -math.pi / 6):
        distance = np.maximum(distance, np.abs(u * math.cos(angle) + v * math.sin(angle)))
    return np.asarray(distance - apothem, np.float32)


def _bevel(sdf: Array, width: float) -> Array:
    """Height 0..1 that rises as a quarter circle over `width` pixels inside the outline."""
    t = np.clip(-sdf / width, 0.0, 1.0)
    return np.asarray(np.sqrt(1.0 - (1.0 - t) ** 2), np.float32)


def _bolt(u: Array, v: Array, size: float, rng: np.random.Generator) -> tuple[Array, Array]:
    head_length = size * rng.uniform(0.17, 0.24)
    shank_radius = size * rng.uniform(0.10, 0.14)
    head_half = shank_radius * rng.uniform(1.7, 2.0)
    head = _box(u + size / 2 - head_length / 2, v, head_length / 2, head_half, 0.12 * head_length)
    shank = _box(u - head_length / 2, v, size / 2 - head_length / 2, shank_radius, 0.35 * shank_radius)
    # A hexagonal head seen from its side shows three facets; the shank is a cylinder with a thread cut into it.
    facet = np.clip(1.55 - np.abs(v) / head_half * 1.3, 0.25, 1.0) * head_half
    head_height = np.where(head < 0, facet * _bevel(head, 0.16 * head_length), 0.0)
    pitch = max(3.2, shank_radius * 0.42)
    smooth_until = -size / 2 + head_length + rng.uniform(0.0, 0.25) * size
    depth = np.where(u > smooth_until, 0.16 * shank_radius, 0.0)
    ridges = depth * (0.5 + 0.5 * np.cos(2 * math.pi * (u + 0.18 * v) / pitch))
    cylinder = np.sqrt(np.maximum(shank_radius**2 - v**2, 0.0))
    shank_height = np.where(shank < 0, np.maximum(cylinder - ridges, 0.0), 0.0)
    return np.minimum(head, shank), np.asarray(np.maximum(head_height, shank_height), np.float32)


def _nut(u: Array, v: Array, size: float, rng: np.random.Generator) -> tuple[Array, Array]:
    apothem = size / 2 * math.cos(math.pi / 6)
    hole = apothem * rng.uniform(0.50, 0.60)
    radius = np.hypot(u, v)
    outline = _hexagon(u, v, apothem)
    sdf = np.maximum(outline, hole - radius)
    thickness = 0.30 * size
    chamfer = np.clip((apothem * 1.13 - radius) / (0.16 * apothem), 0.0, 1.0)
    collar = np.clip((radius - hole) / (0.16 * apothem), 0.0, 1.0)
    height = thickness * (0.62 + 0.38 * chamfer) * (0.55 + 0.45 * collar) * _bevel(outline, 0.05 * size)
    return np.asarray(sdf, np.float32), np.asarray(np.where(sdf < 0, height, 0.0), np.float32)


def _washer(u: Array, v: Array, size: float, rng: np.random.Generator) -> tuple[Array, Array]:
    hole = size / 2 * rng.uniform(0.46, 0.60)
    radius = np.hypot(u, v)
    sdf = np.asarray(np.maximum(radius - size / 2, hole - radius), np.float32)
    return sdf, np.asarray(0.055 * size * _bevel(sdf, 0.05 * size), np.float32)


def _disc(u: Array, v: Array, size: float, rng: np.random.Generator) -> tuple[Array, Array]:
    sdf = np.asarray(np.hypot(u, v) - size / 2, np.float32)
    return sdf, np.asarray(0.06 * size * _bevel(sdf, 0.06 * size), np.float32)


def _o_ring(u: Array, v: Array, size: float, rng: np.random.Generator) -> tuple[Array, Array]:
    tube = size * rng.uniform(0.055, 0.085)
    sdf = np.asarray(np.abs(np.hypot(u, v) - (size / 2 - tube)) - tube, np.float32)
    return sdf, np.asarray(tube * _bevel(sdf, tube), np.float32)


def _pin(u: Array, v: Array, size: float, rng: np.random.Generator) -> tuple[Array, Array]:
    half = size * rng.uniform(0.05, 0.08)
    sdf = _box(u, v, size / 2, half, half * 0.6)
    height = np.where(sdf < 0, np.sqrt(np.maximum(half**2 - v**2, 0.0)), 0.0)
    return sdf, np.asarray(height, np.float32)


def _scrap(u: Array, v: Array, size: float, rng: np.random.Generator) -> tuple[Array, Array]:
    aspect = rng.uniform(0.4, 0.9)
    skew = rng.uniform(-0.4, 0.4)
    sdf = _box(np.asarray(u + skew * v, np.float32), v, size / 2.6, size / 2.6 * aspect, 1.0)
    return sdf, np.asarray(0.02 * size * _bevel(sdf, 2.0), np.float32)


Shape = Callable[[Array, Array, float, np.random.Generator], tuple[Array, Array]]

SHAPES: dict[str, Shape] = {
    "bolt": _bolt,
    "nut": _nut,
    "washer": _washer,
    "disc": _disc,
    "o_ring": _o_ring,
    "pin": _pin,
    "scrap": _scrap,
}
"""Every drawable shape; names outside LABELS are distractors."""


def _grain(n: int, angle: float, rng: np.random.Generator) -> Array:
    """Streaks of zero mean and unit variance along `angle` (radians)."""
    noise = rng.standard_normal((n, n)).astype(np.float32)
    streaks = cv2.blur(noise, (max(3, n // 5), 1))
    turn = cv2.getRotationMatrix2D((n / 2, n / 2), math.degrees(angle), 1.0)
    streaks = np.asarray(cv2.warpAffine(streaks, turn, (n, n), borderMode=cv2.BORDER_REFLECT), np.float32)
    return np.asarray(streaks / (float(streaks.std()) + 1e-6), np.float32)


def _shade(height: Array, theta: Array, finish: Finish, kind: str, light: tuple[float, float, float],
           grain: Array) -> Array:
    """Linear BGR of a lit metal surface: diffuse, a highlight and a banded environment, darkened in crevices."""
    smooth = cv2.GaussianBlur(height, (0, 0), 0.7)
    gy, gx = np.gradient(smooth)
    norm = 1.0 / np.sqrt(gx**2 + gy**2 + 1.0)
    nx, ny = -gx * norm, -gy * norm
    lx, ly, lz = light
    diffuse = np.clip(nx * lx + ny * ly + norm * lz, 0.0, 1.0)
    hz = lz + 1.0
    scale = 1.0 / math.sqrt(lx * lx + ly * ly + hz * hz)
    highlight = np.clip((nx * lx + ny * ly + norm * hz) * scale, 0.0, 1.0) ** 40
    environment = 0.5 + 0.5 * np.sin(3.1 * (nx * lx + ny * ly) + 0.8)
    if kind in ("washer", "nut", "disc"):
        # Turned faces carry circular grain: two opposite bright sectors that follow the light.
        environment = environment * 0.6 + 0.4 * np.cos(theta - math.atan2(ly, lx)) ** 2
    level = 0.22 + 0.60 * diffuse * (1 - 0.45 * finish.gloss) + finish.gloss * 0.55 * environment
    level = level * (1.0 + finish.grain * grain)
    hollow = np.clip(cv2.GaussianBlur(height, (0, 0), 2.5) - height, 0.0, 2.0) * 0.12
    base = np.asarray(finish.bgr, np.float32)
    color = base[None, None, :] * np.clip(level - hollow, 0.02, None)[..., None]
    return np.asarray(color + (finish.gloss * 0.65 * highlight)[..., None], np.float32)


def draw(kind: str, size: float, angle: float, finish: Finish, light: tuple[float, float, float],
         rng: np.random.Generator) -> Sprite:
    """Draw one shape of `size` pixels (longest measure), turned by `angle` radians, under a unit light vector.

    The light's x and y point from the scene towards the lamp, in image axes; z points to the camera.
    Raises: KeyError for an unknown `kind`.
    """
    half = math.ceil(size * 0.62) + 14
    n = 2 * half + 1
    axis = np.arange(-half, half + 1, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    c, s = math.cos(angle), math.sin(angle)
    u = np.asarray(c * x + s * y, np.float32)
    v = np.asarray(-s * x + c * y, np.float32)
    sdf, height = SHAPES[kind](u, v, size, rng)
    alpha = np.clip(0.5 - sdf, 0.0, 1.0).astype(np.float32)
    theta = np.arctan2(y, x).astype(np.float32)
    color = _shade(height, theta, finish, kind, light, _grain(n, -angle, rng))
    rise = float(height.max())
    shift = np.array([[1, 0, -light[0] * (1.5 + 0.35 * rise)], [0, 1, -light[1] * (1.5 + 0.35 * rise)]], np.float32)
    shadow = cv2.GaussianBlur(cv2.warpAffine(alpha, shift, (n, n)), (0, 0), 1.6 + 0.10 * rise)
    # Contact shadow: darkest right at the outline, whatever the lamp's direction.
    shadow = np.maximum(shadow, 0.7 * cv2.GaussianBlur(alpha, (0, 0), 1.8))
    rows = np.flatnonzero((alpha > 0.5).any(axis=1))
    columns = np.flatnonzero((alpha > 0.5).any(axis=0))
    extent = (float(columns[0] - half), float(rows[0] - half),
              float(columns[-1] - half + 1), float(rows[-1] - half + 1))
    return Sprite(color, alpha, np.asarray(shadow, np.float32), extent)
