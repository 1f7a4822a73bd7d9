"""A source that is told to give fewer frames, in a real source process."""

from __future__ import annotations

import select
import sys
import time
from itertools import pairwise
from pathlib import Path

from workerdriver import Camera, Daemon, Reader

from agent import protocol

QUIET_S = 0.6
# 50 pictures a second, numbered
WRITER = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).resolve().parents[3])!r})
from tests.fakes.mjpegserver import picture
number = 0
while True:
    sys.stdout.buffer.write(picture(number % 256, (160, 120)))
    sys.stdout.buffer.flush()
    number += 1
    time.sleep(0.02)
"""


def live(daemon: Daemon, policy: str = "live") -> Camera:
    options = {"command": [sys.executable, "-c", WRITER], "format": "mjpeg", "policy": policy}
    return Camera.open(daemon, options, "pipe")


def silent(reader: Reader) -> bool:
    """No notice comes, once what was on its way has been taken."""
    end = time.monotonic() + 10 * QUIET_S
    while time.monotonic() < end:
        if not select.select([reader.sock], [], [], QUIET_S)[0]:
            return True
        reader.run(1)
    return False


def test_a_live_source_gives_every_third_frame_and_then_all_again(daemon: Daemon) -> None:
    camera = live(daemon)
    reader = Reader(camera, 1)
    reader.ask()
    reader.run(5)
    camera.send(protocol.SetPace(3))
    numbers = [number for _, _, number in reader.run(30)][10:]
    steps = [(b - a) % 256 for a, b in pairwise(numbers)]
    # a slow reader misses more, never fewer
    assert all(step and step % 3 == 0 for step in steps), steps
    camera.send(protocol.SetPace(1))
    numbers = [number for _, _, number in reader.run(60)][10:]
    assert 1 in [(b - a) % 256 for a, b in pairwise(numbers)]


def test_a_paused_live_source_gives_nothing_and_is_still_said_to_stream(daemon: Daemon) -> None:
    camera = live(daemon)
    reader = Reader(camera, 1)
    reader.ask()
    reader.run(3)
    camera.send(protocol.SetPace(0))
    assert silent(reader)
    camera.collect(0.1)
    state = camera.expect(protocol.SourceState)
    assert (state.state, state.reason) == ("streaming", "")
    camera.send(protocol.SetPace(1))
    assert len(reader.run(5)) == 5


def test_where_the_readers_decide_a_source_is_stopped_but_loses_nothing(daemon: Daemon) -> None:
    camera = live(daemon, "every")
    reader = Reader(camera, 1)
    reader.ask()
    numbers = [number for _, _, number in reader.run(5)]
    camera.send(protocol.SetPace(0))
    end = time.monotonic() + 10 * QUIET_S
    while select.select([reader.sock], [], [], QUIET_S)[0] and time.monotonic() < end:
        numbers += [number for _, _, number in reader.run(1)]
    assert time.monotonic() < end
    camera.send(protocol.SetPace(4))
    numbers += [number for _, _, number in reader.run(10)]
    assert numbers == list(range(len(numbers)))


def test_a_file_with_a_pace_of_its_own_is_played_slower(daemon: Daemon, clip: Path) -> None:
    camera = Camera.open(daemon, {"path": str(clip), "policy": "live", "loop": True, "queue_frames": 4, "fps": 50})
    reader = Reader(camera, 1)
    reader.ask()
    reader.run(5)
    camera.send(protocol.SetPace(5))
    times = [t_ns for _, t_ns, _ in reader.run(15)][5:]
    assert min(b - a for a, b in pairwise(times)) >= 100_000_000
    camera.send(protocol.SetPace(0))
    assert silent(reader)
    camera.send(protocol.SetPace(1))
    times = [t_ns for _, t_ns, _ in reader.run(20)][5:]
    assert min(b - a for a, b in pairwise(times)) < 100_000_000
