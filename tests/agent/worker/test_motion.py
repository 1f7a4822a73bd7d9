"""The motion gate: noise and slow light do not pass, a small thing that moves does."""

from __future__ import annotations

import numpy as np

from agent.worker.motion import MotionGate

FRAME_NS = 33_333_333
SIZE = (480, 640, 3)


def street(rng: np.random.Generator) -> np.ndarray:
    """A picture with structure: large random tiles."""
    tiles = rng.integers(40, 200, (12, 16, 3), dtype=np.uint8)
    return np.kron(tiles, np.ones((40, 40, 1), np.uint8))


def passed(frames: list[np.ndarray], share: float = 0.002, refresh_s: float = 1e6) -> list[int]:
    gate = MotionGate(share, refresh_s)
    return [number for number, frame in enumerate(frames) if gate.passes(frame, number * FRAME_NS)]


def test_the_noise_of_a_camera_is_no_motion() -> None:
    rng = np.random.default_rng(1)
    still = street(rng).astype(np.int16)
    frames = [np.clip(still + rng.normal(0, 6, SIZE).astype(np.int16), 0, 255).astype(np.uint8) for _ in range(40)]
    assert passed(frames) == [0]


def test_light_that_fades_over_a_minute_is_no_motion() -> None:
    still = street(np.random.default_rng(2)).astype(np.float32)
    frames = [(still * (1 - 0.4 * number / 1800)).astype(np.uint8) for number in range(300)]
    assert passed(frames) == [0]


def test_a_small_thing_that_walks_through_passes_in_each_frame() -> None:
    still = street(np.random.default_rng(3))
    frames = [still.copy() for _ in range(30)]
    for number in range(10, 20):
        frames[number][200:280, 20 * number : 20 * number + 40] = 255
    found = passed(frames)
    assert set(range(10, 20)) <= set(found)
    assert not set(range(1, 10)) & set(found)


def test_what_stands_still_long_enough_becomes_part_of_the_picture() -> None:
    still = street(np.random.default_rng(4))
    parked = still.copy()
    parked[200:320, 200:360] = 250
    found = passed([still] * 5 + [parked] * 300)
    assert 5 in found
    assert max(found) < 299


def test_a_frame_passes_at_the_latest_after_the_refresh_time() -> None:
    still = street(np.random.default_rng(5))
    assert passed([still] * 91, refresh_s=1.0) == [0, 31, 62]


def test_the_gate_never_writes_to_the_frame() -> None:
    frame = street(np.random.default_rng(6))
    frame.flags.writeable = False
    MotionGate(0.01, 1.0).passes(frame, 0)
