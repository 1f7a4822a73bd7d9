"""A real RTSP camera that is absent, killed and stalled while a model reads it: states, and when frames come again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from agent.config import LineConfig
from agent.daemon.lines import LineRuntime
from agent.daemon.sources import SILENT_S, SourceRuntime
from agent.errors import Reason
from agent.sourceconfig import SourceConfig
from ota.client.ports import Candidate
from tests import workerpython
from tests.agent.daemon.rig import LIMITS, Rig
from tests.fakes import rtspcamera
from tests.fakes.mjpegserver import MjpegCamera
from tests.fakes.rtspcamera import RtspCamera

BACK_S = 5.0
"""So long after a camera's return its first frame may take; a machine under other load gets three times that."""
SLACK = 3.0


def run(body: Callable[[Rig], Awaitable[None]], clip: Path, source: SourceConfig, silent_s: float = SILENT_S) -> None:
    """Run `body` on a rig whose line reads `source`; `rig.events` gets what is told of it."""

    async def main() -> None:
        rig = Rig(clip, LIMITS, workerpython.host_command(), "live")
        rig.source = SourceRuntime(
            source, rig.supervisor,
            on_dropped=lambda _, seqs, reason: rig.dropped.extend((seq, reason) for seq in seqs),
            on_restarted=lambda _: rig.line.source_restarted(),
            on_state=lambda told: rig.events.append(f"{told.state} {told.reason}".rstrip()), silent_s=silent_s,
        )  # fmt: skip
        rig.line = LineRuntime(
            LineConfig("parts", source.name, 1, "never", ()), rig.source, rig.supervisor, LIMITS,
            on_result=lambda _, result: rig.results.append(result), on_event=lambda kind, _: rig.events.append(kind),
        )  # fmt: skip
        await rig.supervisor.start()
        rig.source.start()
        try:
            await body(rig)
        finally:
            await rig.line.stop()
            await rig.source.stop()
            await rig.supervisor.stop()

    asyncio.run(main())


@pytest.fixture
def camera() -> Iterator[RtspCamera]:
    rtspcamera.require()
    camera = RtspCamera()
    yield camera
    camera.kill()


def rtsp(camera: RtspCamera, **options: object) -> SourceConfig:
    defaults = {"url": camera.url, "url_file": "", "credentials_file": "", "transport": "tcp", "queue_frames": 4,
                "stale_s": 2.0, "timeout_s": 3.0}  # fmt: skip
    return SourceConfig("gate", "rtsp", {**defaults, **options})


async def first_frame_after(rig: Rig, what: str, back: Callable[[], None]) -> float:
    """Seconds from the camera's return to its first answered frame; printed."""
    await asyncio.to_thread(back)
    seen, began = len(rig.results), time.monotonic()
    await rig.until(lambda: len(rig.results) > seen)
    seconds = time.monotonic() - began
    print(f"first frame {seconds:.2f} s after the camera came back ({what})")
    assert seconds < BACK_S * SLACK
    return seconds


async def until_state(rig: Rig, state: str, reason: Reason) -> None:
    await rig.until(lambda: (rig.source.state, rig.source.reason) == (state, reason.value))


def test_absent_killed_and_stalled_are_told_apart_and_the_same_model_reads_on(
    clip: Path, parts: Candidate, camera: RtspCamera
) -> None:
    async def body(rig: Rig) -> None:
        serving = asyncio.create_task(rig.serve(parts))
        await until_state(rig, "reconnecting", Reason.SOURCE_MISSING)
        assert "refused" in rig.source.detail
        await first_frame_after(rig, "absent at the start", camera.start)
        await serving
        model, source = rig.pid, rig.source.pid
        assert rig.source.restarts == 0

        await asyncio.to_thread(camera.kill)
        await until_state(rig, "reconnecting", Reason.SOURCE_MISSING)
        await first_frame_after(rig, "killed", camera.start)
        assert rig.source.reconnects == 1

        camera.stall()
        await until_state(rig, "stale", Reason.SOURCE_STALE)
        await until_state(rig, "reconnecting", Reason.SOURCE_LOST)
        await first_frame_after(rig, "stalled", camera.go_on)
        await rig.frames(20)
        assert rig.source.reconnects == 2
        assert (rig.pid, rig.source.pid) == (model, source), "the same processes, so the same ring"
        assert (rig.line.restarts, rig.source.restarts) == (0, 0)
        seqs = [result.seq for result in rig.results]
        assert seqs == sorted(set(seqs))

    run(body, clip, source=rtsp(camera))


def test_a_camera_that_stalls_for_a_moment_is_stale_and_not_opened_again(
    clip: Path, parts: Candidate, camera: RtspCamera
) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames(5)
        camera.stall()
        await until_state(rig, "stale", Reason.SOURCE_STALE)
        camera.go_on()
        await rig.until(lambda: rig.source.state == "streaming")
        await rig.frames(5)
        assert (rig.source.reconnects, rig.source.restarts) == (0, 0)

    camera.start()
    run(body, clip, source=rtsp(camera, stale_s=1.0, timeout_s=30.0))


def test_another_picture_size_brings_a_new_process_with_a_new_ring(clip: Path, parts: Candidate) -> None:
    web = MjpegCamera()
    web.start()

    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames(3)
        before = rig.source.pid
        await asyncio.to_thread(web.stop)
        web.size = (320, 240)
        web.start()
        await rig.until(lambda: rig.source.opened is not None and rig.source.opened.size == "320x240")
        await rig.frames(3)
        assert rig.source.pid != before
        assert f"reconnecting {Reason.SOURCE_CHANGED.value}" in rig.events
        assert rig.line.tally.crashes == 0

    options = {
        "url": web.url,
        "url_file": "",
        "credentials_file": "",
        "queue_frames": 4,
        "stale_s": 2.0,
        "timeout_s": 3.0,
    }
    try:
        run(body, clip, source=SourceConfig("gate", "http", options))
    finally:
        web.stop()


def test_a_source_process_that_says_nothing_is_ended_and_started_again(clip: Path, parts: Candidate) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames(3)
        hung = rig.source.pid
        os.kill(hung, signal.SIGSTOP)
        await rig.until(lambda: rig.source.reason == Reason.WORKER_HUNG.value)
        await rig.until(lambda: rig.source.pid not in (0, hung))
        await rig.frames(3)
        assert rig.source.restarts == 1
        assert not Path(f"/proc/{hung}").exists()

    options = {"path": str(clip), "policy": "live", "loop": True, "queue_frames": 4, "fps": 60}
    run(body, clip, SourceConfig("belt", "video", options), silent_s=1.0)
