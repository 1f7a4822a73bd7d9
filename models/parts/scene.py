"""Deterministic pictures of a conveyor belt with bolts, nuts and washers, and where each part is.

What it is: the only data of the `parts` line. Three configurations that share no seed: `TRAIN` (training and
calibration), `HELDOUT` (evaluation alone: other belts, lamps, sizes, distractors) and `CLIP` (the demo's moving
belt), each under `day` and `evening` light.
What it is not: photographs. Figures measured on these pictures say nothing about a real camera.
Invariants: the same configuration, light and index give the same bytes on one machine with one OpenCV; a part is
listed when at least `MIN_VISIBLE` of its area shows; boxes bound the whole outline, clipped to the frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from models.parts import belt
from models.parts.belt import HEIGHT, WIDTH
from models.parts.sprites import FINISHES, LABELS, Array, Sprite, draw

Light = Literal["day", "evening"]
LIGHTS: tuple[Light, ...] = ("day", "evening")
"""The two lightings, in the order that seeds number them."""
MIN_VISIBLE = 0.4
"""Share of a part's area that must show for it to count."""
Range = tuple[float, float]
Box = tuple[int, float, float, float, float]
"""(class index in LABELS, x0, y0, x1, y1) in pixels of the 640x480 frame."""


@dataclass(frozen=True, slots=True)
class LightRanges:
    """What the lamps may do. `gain` is exposure, `tint` linear BGR, `fall` the gradient's depth 0..1,
    `noise` the sensor's read noise in linear units, `blur_px` the motion blur's length."""

    gain: Range
    tint_low: tuple[float, float, float]
    tint_high: tuple[float, float, float]
    fall: Range
    noise: Range
    blur_px: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Configuration:
    """One generator of pictures; `seeds` is the half-open range of indices it may be asked for."""

    name: str
    seeds: tuple[int, int]
    belts: tuple[str, ...]
    belt_low: tuple[float, float, float]
    belt_high: tuple[float, float, float]
    wear: Range
    scale: Range
    finishes: tuple[str, ...]
    distractors: tuple[str, ...]
    parts: tuple[int, int]
    rails: tuple[int, int]
    day: LightRanges
    evening: LightRanges

    def light(self, light: Light) -> LightRanges:
        return self.day if light == "day" else self.evening


@dataclass(frozen=True, slots=True)
class Frame:
    """A [480, 640, 3] uint8 BGR picture and its parts."""

    image: NDArray[np.uint8]
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class _Item:
    """A sprite at a place (pixels); `label` is -1 for a distractor."""

    label: int
    sprite: Sprite
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class _Lamp:
    """A drawn lighting: every number fixed."""

    gain: float
    tint: tuple[float, float, float]
    fall: float
    angle: float
    spot: tuple[float, float]
    noise: float
    blur_px: int


TRAIN = Configuration(
    "train", (1_000_000, 2_000_000), ("woven", "speckle", "plain", "grooved", "grooved", "waffle"),
    (0.020, 0.022, 0.020), (0.20, 0.17, 0.13),
    (0.2, 1.0), (0.75, 1.20), ("zinc", "stainless", "brass", "black"), ("disc", "o_ring", "pin", "scrap"), (1, 9),
    (0, 36),
    LightRanges((0.80, 1.35), (0.92, 0.95, 0.92), (1.08, 1.03, 1.06), (0.05, 0.45), (0.002, 0.008), (1, 4)),
    LightRanges((0.18, 0.42), (0.38, 0.66, 0.95), (0.60, 0.82, 1.10), (0.25, 0.75), (0.006, 0.016), (2, 7)),
)
"""Training and calibration."""

HELDOUT = Configuration(
    "heldout", (5_000_000, 6_000_000), ("ribbed", "chevron", "speckle"), (0.025, 0.035, 0.025), (0.15, 0.21, 0.12),
    (0.3, 1.2), (0.70, 1.12), ("zinc", "stainless", "brass", "black", "rust"), ("disc", "o_ring", "pin", "scrap"),
    (2, 10), (10, 44),
    LightRanges((0.70, 1.25), (0.90, 0.95, 0.90), (1.06, 1.03, 1.10), (0.10, 0.50), (0.003, 0.009), (1, 4)),
    LightRanges((0.16, 0.38), (0.34, 0.62, 0.95), (0.56, 0.80, 1.12), (0.30, 0.75), (0.007, 0.018), (2, 7)),
)
"""Evaluation: neither training nor calibration reads it."""

CLIP = Configuration(
    "clip", (9_000_000, 9_000_001), ("diamond",), (0.040, 0.058, 0.046), (0.046, 0.066, 0.052),
    (0.6, 0.7), (0.85, 1.05), ("zinc", "stainless", "brass", "black"), ("disc", "o_ring", "scrap"), (0, 0),
    (30, 30),
    LightRanges((1.25, 1.25), (0.98, 1.0, 1.0), (0.98, 1.0, 1.0), (0.28, 0.28), (0.004, 0.004), (3, 3)),
    LightRanges((0.28, 0.28), (0.42, 0.70, 1.05), (0.42, 0.70, 1.05), (0.60, 0.60), (0.015, 0.015), (4, 4)),
)
"""The demo's moving belt."""

_SIZES: dict[str, Range] = {"bolt": (92, 150), "nut": (46, 76), "washer": (46, 84), "disc": (30, 70),
                            "o_ring": (40, 80), "pin": (50, 120), "scrap": (16, 70)}
_SOFT = {"o_ring": ("rubber",), "scrap": ("card", "plastic", "rust"), "disc": ("plastic", "rust", "zinc")}


def _between(limits: Range, rng: np.random.Generator) -> float:
    return float(rng.uniform(*limits))


def _mix(low: Sequence[float], high: Sequence[float], share: float) -> tuple[float, float, float]:
    b, g, r = (a + (z - a) * share for a, z in zip(low, high, strict=True))
    return (b, g, r)


def _lamp(ranges: LightRanges, rng: np.random.Generator) -> _Lamp:
    return _Lamp(
        _between(ranges.gain, rng), _mix(ranges.tint_low, ranges.tint_high, float(rng.uniform())),
        _between(ranges.fall, rng), float(rng.uniform(0, 2 * math.pi)),
        (float(rng.uniform(0.2, 0.8)), float(rng.uniform(0.2, 0.8))), _between(ranges.noise, rng),
        int(rng.integers(ranges.blur_px[0], ranges.blur_px[1] + 1)))


def _illumination(lamp: _Lamp) -> Array:
    """[480, 640, 3] factor: a gradient along the lamp's angle, a soft spot, a vignette, the tint, the gain."""
    x, y = np.meshgrid(np.linspace(-1, 1, 32, dtype=np.float32), np.linspace(-0.75, 0.75, 24, dtype=np.float32))
    gradient = 1.0 + lamp.fall * (x * math.cos(lamp.angle) + y * math.sin(lamp.angle)) * 0.8
    sx, sy = 2 * lamp.spot[0] - 1, 1.5 * lamp.spot[1] - 0.75
    spot = 1.0 + 0.6 * lamp.fall * np.exp(-((x - sx) ** 2 + (y - sy) ** 2) / 0.35)
    vignette = 1.0 - (0.10 + 0.20 * lamp.fall) * (x**2 + y**2)
    plane = np.clip(gradient * spot * vignette, 0.12, None) * lamp.gain
    low = plane[..., None] * np.asarray(lamp.tint, np.float32)
    return np.asarray(cv2.resize(low.astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC), np.float32)


def _light_vector(angle: float) -> tuple[float, float, float]:
    return (0.62 * math.cos(angle), 0.62 * math.sin(angle), math.sqrt(1 - 0.62**2))


def _paste(image: Array, owner: NDArray[np.int16], item: _Item, mark: int) -> float:
    """Blend an item and its shadow into `image`, mark its pixels in `owner`, return its whole area in pixels."""
    half = item.sprite.alpha.shape[0] // 2
    left, top = math.floor(item.x) - half, math.floor(item.y) - half
    shift = np.array([[1, 0, item.x - math.floor(item.x)], [0, 1, item.y - math.floor(item.y)]], np.float32)
    n = 2 * half + 1
    alpha = cv2.warpAffine(item.sprite.alpha, shift, (n, n))
    whole = float(np.count_nonzero(alpha > 0.5))
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + n, WIDTH), min(top + n, HEIGHT)
    if x0 >= x1 or y0 >= y1:
        return whole
    inner = np.s_[y0 - top:y1 - top, x0 - left:x1 - left]
    alpha = alpha[inner]
    color = cv2.warpAffine(item.sprite.color, shift, (n, n), borderMode=cv2.BORDER_REPLICATE)[inner]
    shadow = cv2.warpAffine(item.sprite.shadow, shift, (n, n))[inner]
    spot = image[y0:y1, x0:x1]
    spot *= (1.0 - 0.62 * shadow)[..., None]
    spot += alpha[..., None] * (color - spot)
    owner[y0:y1, x0:x1][alpha > 0.5] = mark
    return whole


def _cover(image: Array, owner: NDArray[np.int16], layer: tuple[Array, Array], drop: float) -> None:
    """Lay something that is `drop` pixels above the belt over the frame, with its soft shadow."""
    color, alpha = layer
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    if not rows.size:
        return
    reach = int(drop * 2 + 12)
    y0, y1 = max(rows[0] - reach, 0), min(rows[-1] + reach, HEIGHT)
    x0, x1 = max(columns[0] - reach, 0), min(columns[-1] + reach, WIDTH)
    spot, alpha = image[y0:y1, x0:x1], alpha[y0:y1, x0:x1]
    shift = np.array([[1, 0, drop], [0, 1, drop * 0.7]], np.float32)
    moved = cv2.warpAffine(alpha, shift, (x1 - x0, y1 - y0), borderMode=cv2.BORDER_REPLICATE)
    spot *= (1.0 - 0.5 * cv2.GaussianBlur(moved, (0, 0), 0.5 * drop + 1))[..., None]
    spot += alpha[..., None] * (color[y0:y1, x0:x1] - spot)
    owner[y0:y1, x0:x1][alpha > 0.5] = -1


def _expose(image: Array, lamp: _Lamp, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Light, lens and sensor: linear float scene in, 8-bit BGR with gamma out."""
    image *= _illumination(lamp)
    if lamp.blur_px > 1:
        image = np.asarray(cv2.blur(image, (lamp.blur_px, 1)), np.float32)
    image = np.asarray(cv2.GaussianBlur(image, (3, 3), 0.55), np.float32)
    noise = _grain_bank()
    y, x = (int(v) for v in rng.integers(0, 256, 2))
    grain = noise[y:y + HEIGHT, x:x + WIDTH]
    # Shot noise grows with the square root of the light, read noise does not.
    image += grain * (lamp.noise * (0.6 + 1.6 * np.sqrt(np.clip(image, 0.0, 1.0))))
    np.clip(image, 0.0, 1.0, out=image)
    table = _gamma_table()
    return np.asarray(table[(image * 4095.0).astype(np.uint16)], np.uint8)


_BANK: dict[str, NDArray[np.generic]] = {}


def _grain_bank() -> Array:
    """A fixed field of sensor noise, cut at a random place for each frame: drawing it anew costs 30 ms."""
    if "grain" not in _BANK:
        field = np.random.default_rng(424242).standard_normal((HEIGHT + 256, WIDTH + 256, 3), np.float32)
        _BANK["grain"] = field
    return np.asarray(_BANK["grain"], np.float32)


def _gamma_table() -> NDArray[np.uint8]:
    if "gamma" not in _BANK:
        _BANK["gamma"] = np.round(255 * (np.arange(4096) / 4095.0) ** (1 / 2.2)).astype(np.uint8)
    return np.asarray(_BANK["gamma"], np.uint8)


def _new_item(config: Configuration, kind: str, place: tuple[float, float], light_angle: float,
              rng: np.random.Generator) -> _Item:
    names = _SOFT.get(kind, config.finishes)
    finish = FINISHES[names[int(rng.integers(len(names)))]]
    size = _between(_SIZES[kind], rng) * _between(config.scale, rng)
    sprite = draw(kind, size, float(rng.uniform(0, 2 * math.pi)), finish, _light_vector(light_angle), rng)
    return _Item(LABELS.index(kind) if kind in LABELS else -1, sprite, *place)


def _compose(image: Array, items: Sequence[_Item], covers: Sequence[tuple[tuple[Array, Array], float]],
             ) -> tuple[Box, ...]:
    """Paint items in order, then what passes above them; return the boxes of the parts that show."""
    owner = np.full((HEIGHT, WIDTH), -1, np.int16)
    areas = [_paste(image, owner, item, mark) for mark, item in enumerate(items)]
    for layer, drop in covers:
        _cover(image, owner, layer, drop)
    seen = np.bincount(owner.ravel() + 1, minlength=len(items) + 1)[1:]
    boxes: list[Box] = []
    for item, whole, visible in zip(items, areas, seen, strict=True):
        if item.label < 0 or visible < MIN_VISIBLE * whole:
            continue
        left, top, right, bottom = item.sprite.extent
        boxes.append((item.label, max(item.x + left, 0.0), max(item.y + top, 0.0),
                      min(item.x + right, float(WIDTH)), min(item.y + bottom, float(HEIGHT))))
    return tuple(boxes)


def _scatter(config: Configuration, light_angle: float, rng: np.random.Generator) -> list[_Item]:
    """Parts and distractors at random places; most keep their distance, some overlap."""
    items: list[_Item] = []
    margin = config.rails[0]
    wanted = int(rng.integers(config.parts[0], config.parts[1] + 1))
    kinds = [LABELS[int(rng.integers(3))] for _ in range(wanted)]
    kinds += [str(rng.choice(config.distractors)) for _ in range(int(rng.integers(0, 4)))]
    for kind in (kinds[i] for i in rng.permutation(len(kinds))):
        crowd = rng.uniform() < 0.25
        for _ in range(12):
            place = (float(rng.uniform(-5, WIDTH + 5)), float(rng.uniform(margin, HEIGHT - margin)))
            near = min((math.dist(place, (i.x, i.y)) for i in items), default=1e9)
            if near > (34 if crowd else 92):
                items.append(_new_item(config, kind, place, light_angle, rng))
                break
    return items


def _passing(config: Configuration, rng: np.random.Generator) -> list[tuple[tuple[Array, Array], float]]:
    covers: list[tuple[tuple[Array, Array], float]] = []
    if rng.uniform() < 0.15:
        covers.append((belt.arm(float(rng.uniform(60, WIDTH - 60)), float(rng.uniform(60, HEIGHT - 60)),
                                bool(rng.uniform() < 0.5)), 22.0))
    if rng.uniform() < 0.18:
        ends = rng.uniform(0, HEIGHT, 3)
        t = np.linspace(0, 1, 24, dtype=np.float32)[:, None]
        a, b, c = (np.array([[x, y]], np.float32) for x, y in zip((-10, rng.uniform(150, 490), WIDTH + 10), ends,
                                                                  strict=True))
        curve = np.asarray((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c, np.float32)
        covers.append((belt.cable(curve, float(rng.uniform(6, 13)), (0.03, 0.03, 0.035)), 9.0))
    return covers


def render(config: Configuration, light: Light, index: int) -> Frame:
    """Picture number `index` (from 0) of a configuration under a light.

    Raises: ValueError when `index` leaves the configuration's seed range.
    """
    seed = config.seeds[0] + index
    if not config.seeds[0] <= seed < config.seeds[1]:
        raise ValueError(f"index {index} is outside the {config.name} seeds {config.seeds}")
    rng = np.random.default_rng([seed, LIGHTS.index(light)])
    lamp = _lamp(config.light(light), rng)
    pattern = config.belts[int(rng.integers(len(config.belts)))]
    bgr = _mix(config.belt_low, config.belt_high, float(rng.beta(1.0, 1.6)))
    tile = belt.texture(pattern, bgr, _between(config.wear, rng), rng)
    start = int(rng.integers(0, belt.TILE - WIDTH))
    image = tile[:, start:start + WIDTH].copy()
    thickness = int(rng.integers(config.rails[0], config.rails[1] + 1))
    belt.rails(image, thickness if rng.uniform() < 0.6 else 0, float(rng.uniform(0.25, 0.5)))
    boxes = _compose(image, _scatter(config, lamp.angle, rng), _passing(config, rng))
    return Frame(_expose(image, lamp, rng), boxes)


BELT_SPEED_PX_S = 96.0
"""How far the clip's belt moves in a second."""


def _clip_items(seconds: float, rng: np.random.Generator) -> list[_Item]:
    """Everything that will lie on the clip's belt, x counted from the belt's left edge at time 0 (mostly negative)."""
    items: list[_Item] = []
    x = float(WIDTH) - 40.0
    order = 0
    while x > -(seconds * BELT_SPEED_PX_S + 120):
        kind = LABELS[order % 3] if rng.uniform() < 0.85 else str(rng.choice(CLIP.distractors))
        order += 1
        place = (x, float(rng.uniform(95, HEIGHT - 95)))
        near = min((math.dist(place, (i.x, i.y)) for i in items), default=1e9)
        if near > (100 if rng.uniform() < 0.88 else 45):
            items.append(_new_item(CLIP, kind, place, 3.9, rng))
        x -= float(rng.uniform(18, 75))
    return items


def _fade(t: float, seconds: float) -> float:
    """0 by day, 1 by evening: light falls between 50 % and 70 % of the clip."""
    s = min(max((t / seconds - 0.5) / 0.2, 0.0), 1.0)
    return s * s * (3 - 2 * s)


def _clip_lamp(t: float, share: float) -> _Lamp:
    """The clip's lamp at time `t`: drifting, flickering a little, `share` of the way to evening."""
    day, evening = CLIP.day, CLIP.evening
    # Exposure falls by equal ratios, as an eye or a camera would see dusk.
    gain = day.gain[0] * (evening.gain[0] / day.gain[0]) ** share * (1 + 0.03 * math.sin(0.9 * t))
    spot = (0.5 + 0.22 * math.sin(0.31 * t), 0.45 + 0.15 * math.cos(0.23 * t))
    return _Lamp(gain, _mix(day.tint_low, evening.tint_low, share),
                 day.fall[0] + (evening.fall[0] - day.fall[0]) * share, 3.9 + 0.12 * math.sin(0.2 * t), spot,
                 day.noise[0] + (evening.noise[0] - day.noise[0]) * share, 3)


def _clip_arm(t: float) -> list[tuple[tuple[Array, Array], float]]:
    """The gripper dips in for 1.6 s out of every 6 s."""
    phase = (t - 2.2) % 6.0
    if phase >= 1.6:
        return []
    depth = math.sin(math.pi * phase / 1.6)
    visit = int((t - 2.2) // 6.0)
    return [(belt.arm(420.0 - 90.0 * (visit % 3), -20.0 + 270.0 * depth, True), 22.0)]


def clip_frames(seconds: float, fps: int) -> Iterator[Frame]:
    """Frames of the demo clip in order; the first N do not depend on how many are taken."""
    rng = np.random.default_rng(CLIP.seeds[0])
    bgr = _mix(CLIP.belt_low, CLIP.belt_high, float(rng.uniform()))
    tile = belt.texture(CLIP.belts[0], bgr, _between(CLIP.wear, rng), rng)
    tile[:, :5] *= 0.55  # the belt's seam
    tile = np.concatenate([tile, tile[:, :WIDTH + 2]], axis=1)
    items = _clip_items(seconds, rng)
    for number in range(round(seconds * fps)):
        t = number / fps
        travel = t * BELT_SPEED_PX_S
        start = -travel % belt.TILE
        whole = math.floor(start)
        rest = np.float32(start - whole)
        image = tile[:, whole:whole + WIDTH] * (1 - rest) + tile[:, whole + 1:whole + 1 + WIDTH] * rest
        belt.rails(image, CLIP.rails[0], 0.4)
        near = [_Item(i.label, i.sprite, i.x + travel, i.y) for i in items if -110 < i.x + travel < WIDTH + 110]
        boxes = _compose(image, near, _clip_arm(t))
        noise_rng = np.random.default_rng([CLIP.seeds[0], number])
        yield Frame(_expose(image, _clip_lamp(t, _fade(t, seconds)), noise_rng), boxes)
