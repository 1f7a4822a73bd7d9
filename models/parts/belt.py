"""What surrounds the parts: belt textures, side rails, and what passes above (a gripper arm, a cable).

Textures are float32 linear BGR images of 480 rows whose columns wrap, so that a belt can run for ever.
Every random choice comes from the caller's generator.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from models.parts.sprites import Array

HEIGHT = 480
"""Rows of every texture and frame, pixels."""
WIDTH = 640
"""Columns of every frame, pixels."""
TILE = 1280
"""Columns of a belt texture, pixels; the texture wraps after them."""


def _noise(shape: tuple[int, int], sigma: float, rng: np.random.Generator) -> Array:
    """Smooth noise of unit variance that wraps horizontally."""
    field = rng.standard_normal(shape).astype(np.float32)
    if sigma > 0:
        pad = math.ceil(sigma * 3)
        wrapped = cv2.copyMakeBorder(field, 0, 0, pad, pad, cv2.BORDER_WRAP)
        field = np.asarray(cv2.GaussianBlur(wrapped, (0, 0), sigma)[:, pad:-pad], np.float32)
    return np.asarray(field / (float(field.std()) + 1e-6), np.float32)


def _woven(x: Array, y: Array, rng: np.random.Generator) -> Array:
    pitch = 2 * math.pi / (TILE / round(TILE / rng.uniform(5.0, 8.0)))
    return np.asarray(0.10 * np.sin(x * pitch) * np.sin(y * pitch) + 0.05 * np.sin((x + y) * pitch), np.float32)


def _speckle(x: Array, y: Array, rng: np.random.Generator) -> Array:
    fine = _noise(x.shape, 0.8, rng)
    return np.asarray(0.09 * fine + 0.35 * (fine > 2.6), np.float32)


def _plain(x: Array, y: Array, rng: np.random.Generator) -> Array:
    return np.asarray(0.04 * _noise(x.shape, 1.2, rng), np.float32)


def _ribbed(x: Array, y: Array, rng: np.random.Generator) -> Array:
    count = round(TILE / rng.uniform(16.0, 30.0))
    wave = np.sin(x * 2 * math.pi * count / TILE)
    return np.asarray(0.12 * np.sign(wave) * np.abs(wave) ** 0.5, np.float32)


def _chevron(x: Array, y: Array, rng: np.random.Generator) -> Array:
    count = round(TILE / rng.uniform(36.0, 60.0))
    wave = np.sin((x + np.abs(y - HEIGHT / 2)) * 2 * math.pi * count / TILE)
    return np.asarray(0.16 * np.clip(wave * 4 - 2.6, 0.0, 1.0), np.float32)


def _grooved(x: Array, y: Array, rng: np.random.Generator) -> Array:
    angle, pitch = rng.uniform(0, math.pi), rng.uniform(7.0, 40.0)
    wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / pitch)
    return np.asarray(rng.uniform(0.05, 0.16) * wave, np.float32)


def _waffle(x: Array, y: Array, rng: np.random.Generator) -> Array:
    pitch = 2 * math.pi / rng.uniform(14.0, 44.0)
    grid = np.maximum(np.cos(x * pitch), np.cos(y * pitch))
    return np.asarray(rng.uniform(-0.16, 0.16) * np.clip(grid * 5 - 3.8, 0.0, 1.0), np.float32)


def _diamond(x: Array, y: Array, rng: np.random.Generator) -> Array:
    pitch = 2 * math.pi * round(TILE / 22.0) / TILE
    ridge = np.maximum(np.cos((x + y) * pitch), np.cos((x - y) * pitch))
    return np.asarray(0.14 * np.clip(ridge * 6 - 4.9, 0.0, 1.0) - 0.02, np.float32)


PATTERNS = {"woven": _woven, "speckle": _speckle, "plain": _plain, "ribbed": _ribbed, "chevron": _chevron,
            "diamond": _diamond, "grooved": _grooved, "waffle": _waffle}
"""Belt textures by name: multiplicative relief around 0. `grooved` and `waffle` do not wrap: still pictures only."""


def texture(pattern: str, bgr: tuple[float, float, float], wear: float, rng: np.random.Generator) -> Array:
    """A [480, 1280, 3] belt: pattern, stains, scratches and lengthwise wear of strength `wear` 0..1.

    Raises: KeyError for an unknown `pattern`.
    """
    x, y = np.meshgrid(np.arange(TILE, dtype=np.float32), np.arange(HEIGHT, dtype=np.float32))
    relief = 1.0 + PATTERNS[pattern](x, y, rng)
    stains = np.clip(_noise((HEIGHT // 8, TILE // 8), 3.0, rng) - 0.8, 0.0, 1.5)
    relief -= 0.22 * wear * cv2.resize(stains, (TILE, HEIGHT), interpolation=cv2.INTER_LINEAR)
    relief += 0.06 * wear * cv2.GaussianBlur(rng.standard_normal((HEIGHT, 1)).astype(np.float32), (0, 0), 3.0)
    relief += 0.02 * _noise((HEIGHT, TILE), 0.0, rng)
    scratches = np.zeros((HEIGHT, TILE), np.float32)
    for _ in range(int(18 * wear)):
        start = (int(rng.uniform(0, TILE)), int(rng.uniform(0, HEIGHT)))
        end = (start[0] + int(rng.uniform(20, 160)), start[1] + int(rng.uniform(-12, 12)))
        cv2.line(scratches, start, end, float(rng.uniform(-0.2, 0.3)), 1, cv2.LINE_AA)
    relief = np.clip(relief + scratches, 0.2, 2.5)
    return np.asarray(relief[..., None] * np.asarray(bgr, np.float32), np.float32)


def rails(image: Array, thickness: int, reflectance: float) -> None:
    """Paint aluminium side rails of `thickness` pixels over the top and bottom of a frame, in place."""
    if thickness <= 0:
        return
    profile = 0.55 + 0.45 * np.sin(np.linspace(0.3, math.pi * 1.15, thickness)).astype(np.float32)
    bar = (reflectance * profile)[:, None, None]
    image[:thickness] = bar
    image[-thickness:] = bar[::-1]
    image[thickness:thickness + 5] *= np.linspace(0.45, 0.95, 5, dtype=np.float32)[:, None, None]
    image[-thickness - 5:-thickness] *= np.linspace(0.95, 0.45, 5, dtype=np.float32)[:, None, None]


def arm(tip_x: float, tip_y: float, from_top: bool) -> tuple[Array, Array]:
    """A gripper on a striped boom that reaches to (`tip_x`, `tip_y`): ([480, 640, 3] colour, [480, 640] alpha)."""
    color = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    far = -40.0 if from_top else HEIGHT + 40.0
    sign = 1.0 if from_top else -1.0

    def bar(x0: float, x1: float, y0: float, y1: float, bgr: tuple[float, float, float]) -> None:
        corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]) * 8
        points = np.round(corners).astype(np.int32)
        cv2.fillConvexPoly(alpha, points, 255, cv2.LINE_AA, 3)
        cv2.fillConvexPoly(color, points, bgr, cv2.LINE_8, 3)

    wrist = tip_y - sign * 62
    bar(tip_x - 34, tip_x + 34, far, wrist, (0.04, 0.42, 0.62))
    for stripe in range(0, 480, 44):
        y = wrist - sign * (30 + stripe)
        bar(tip_x - 34, tip_x + 34, y, y - sign * 14, (0.03, 0.03, 0.03))
    bar(tip_x - 46, tip_x + 46, wrist - sign * 12, wrist + sign * 18, (0.10, 0.10, 0.11))
    for side in (-1, 1):
        bar(tip_x + side * 38 - 9, tip_x + side * 38 + 9, wrist + sign * 18, tip_y, (0.28, 0.28, 0.28))
    across = (np.arange(WIDTH, dtype=np.float32) - tip_x) / 34
    color *= np.clip(1.15 - 0.35 * across**2 - 0.2 * across, 0.35, 1.3)[None, :, None]
    return color, alpha.astype(np.float32) / 255.0


def cable(points: Array, thickness: float, bgr: tuple[float, float, float]) -> tuple[Array, Array]:
    """A round cable along `points` [n, 2] pixels: ([480, 640, 3] colour, [480, 640] alpha)."""
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    line = np.round(points * 8).astype(np.int32)
    cv2.polylines(alpha, [line], False, 255, max(1, round(thickness)), cv2.LINE_AA, 3)
    core = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.polylines(core, [line - 8], False, 255, max(1, round(thickness * 0.35)), cv2.LINE_AA, 3)
    glow = cv2.GaussianBlur(core, (0, 0), 1.2).astype(np.float32) / 255.0
    color = np.asarray(bgr, np.float32) + 0.22 * glow[..., None]
    return np.asarray(color, np.float32), alpha.astype(np.float32) / 255.0
