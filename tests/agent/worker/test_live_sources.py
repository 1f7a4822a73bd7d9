"""Sources that are waited for, in a real source process: commands, HTTP and RTSP cameras that go away and come back."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from workerdriver import TIMEOUT_S, Camera, Daemon, Reader

from agent import protocol
from agent.errors import Reason
from agent.worker.sources import command as command_module
from agent.worker.sources.command import Command
from tests.fakes import rtspcamera
from tests.fakes.mjpegserver import MjpegCamera
from tests.fakes.rtspcamera import RtspCamera

LATENCY_NS = 50_000_000

# Writes numbered frames as a camera program does: 20 a second, MJPEG or raw, for ever or COUNT of them, then ends.
WRITER = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).resolve().parents[3])!r})
import cv2, numpy as np
from tests.fakes.mjpegserver import picture
pixels, count, status, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
out, number = sys.stdout.buffer, 0
print("the writer speaks", file=sys.stderr, flush=True)
while number != count:
    data = picture(number % 256, (160, 120))
    if pixels != "mjpeg":
        frame = cv2.imdecode(np.frombuffer(data, np.uint8), 1)
        if pixels != "bgr24":
            frame = cv2.cvtColor(frame, cv2.COLOR_BGR2YUV_I420)
        if pixels == "nv12":
            y, u, v = frame[:120], frame[120:150].reshape(-1), frame[150:].reshape(-1)
            frame = np.concatenate([y.reshape(-1), np.stack([u, v], 1).reshape(-1)])
        data = frame.tobytes()
    out.write(data)
    out.flush()
    number += 1
    time.sleep(pause)
sys.exit(status)
"""


def writer(pixels: str = "mjpeg", count: int = -1, status: int = 0, pause: float = 0.05) -> dict[str, Any]:
    options: dict[str, Any] = {"command": [sys.executable, "-c", WRITER, pixels, str(count), str(status), str(pause)]}
    return options | (
        {"format": "mjpeg"} if pixels == "mjpeg" else {"format": "raw", "pixels": pixels, "size": "160x120"}
    )


def states(camera: Camera, until: Callable[[protocol.SourceState], bool]) -> list[protocol.SourceState]:
    """Every state that the source tells of, up to the one that is waited for."""
    told: list[protocol.SourceState] = []
    end = time.monotonic() + TIMEOUT_S
    while not told or not until(told[-1]):
        told.append(camera.expect(protocol.SourceState, max(0.1, end - time.monotonic())))
    return told


def wait_state(camera: Camera, state: str, reason: str = "") -> protocol.SourceState:
    return states(camera, lambda told: told.state == state and told.reason == reason)[-1]


def open_fault(daemon: Daemon, kind: str, options: dict[str, Any]) -> protocol.Fault:
    worker = daemon.spawn("source")
    worker.send(protocol.OpenSource("cam", kind, options))
    packet = worker.receive()
    assert packet is not None
    assert isinstance(packet.message, protocol.Fault), packet.message
    return packet.message


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    """Direct children of all threads of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def wait_gone(pids: list[int]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while any(map(alive, pids)):
        assert time.monotonic() < end, f"still there: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.02)


# --- pipe ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", ["mjpeg", "bgr24", "yuv420p", "nv12"])
def test_a_commands_frames_arrive_whole_in_order_and_at_their_time(daemon: Daemon, pixels: str) -> None:
    camera = Camera.open(daemon, {**writer(pixels), "queue_frames": 64}, "pipe")
    assert (camera.opened.dtype, camera.opened.shape) == ("uint8", [120, 160, 3])
    reader = Reader(camera, 1)
    reader.ask()
    answered = reader.run(8)
    numbers = [number for _, _, number in answered]
    assert numbers == list(range(numbers[0], numbers[0] + 8))
    assert [seq for seq, _, _ in answered] == list(range(8))
    times = [t_ns for _, t_ns, _ in answered]
    assert times == sorted(times)


def test_with_every_a_command_that_ends_well_ends_the_source_and_loses_no_frame(daemon: Daemon) -> None:
    camera = Camera.open(daemon, {**writer("mjpeg", 30, pause=0), "policy": "every", "queue_frames": 2}, "pipe")
    reader = Reader(camera, 1)
    reader.ask()
    assert [number for _, _, number in reader.run(30, work_s=0.005)] == list(range(30))
    assert wait_state(camera, "ended").frames == 30


def test_a_command_that_ends_is_started_again_into_the_same_ring(daemon: Daemon) -> None:
    camera = Camera.open(daemon, {**writer("mjpeg", 5, status=3), "queue_frames": 64}, "pipe")
    reader = Reader(camera, 1)
    reader.ask()
    seen = reader.run(12)
    assert [seq for seq, _, _ in seen] == list(range(12))
    assert [number for _, _, number in seen].count(0) >= 1
    told = states(camera, lambda told: told.reconnects >= 1)
    broken = [state for state in told if state.state == "reconnecting"]
    assert broken[0].reason == Reason.SOURCE_LOST.value
    assert "exit code 3" in broken[0].detail
    assert broken[0].detail.endswith("the writer speaks")


def test_a_command_that_stalls_is_stale_first_and_started_again_then(daemon: Daemon) -> None:
    # long enough for the command to start on a slow machine
    camera = Camera.open(daemon, {**writer(), "stale_s": 0.3, "timeout_s": 5}, "pipe")
    (command,) = children(camera.pid)
    os.kill(command, signal.SIGSTOP)
    wait_state(camera, "stale", Reason.SOURCE_STALE.value)
    assert "writes nothing" in wait_state(camera, "reconnecting", Reason.SOURCE_LOST.value).detail
    assert wait_state(camera, "streaming").reconnects == 1
    wait_gone([command])


@pytest.mark.parametrize("how", ["asked", "killed"])
def test_no_command_outlives_its_source(daemon: Daemon, how: str) -> None:
    nested = ["sh", "-c", f'sleep 1000 & exec {sys.executable} -c "$0" mjpeg -1 0 0.05', WRITER]
    camera = Camera.open(daemon, {"command": nested, "format": "mjpeg"}, "pipe")
    (command,) = children(camera.pid)
    (sleeper,) = children(command)
    if how == "asked":
        camera.send(protocol.StopWorker())
        assert daemon.wait_exit(camera).status == 0
    else:
        daemon.kill(camera)
    wait_gone([command, sleeper])


def test_a_command_that_is_started_again_and_again_leaves_no_process_behind_it(daemon: Daemon) -> None:
    nested = ["sh", "-c", f'sleep 1000 >/dev/null & {sys.executable} -c "$0" mjpeg 1 0 0; exit 3', WRITER]
    camera = Camera.open(daemon, {"command": nested, "format": "mjpeg"}, "pipe")
    states(camera, lambda told: told.reconnects >= 3)
    assert len(children(camera.pid)) <= 1
    assert len(children(daemon.process.pid)) == 1


def test_a_process_that_a_command_leaves_behind_writing_errors_for_ever_does_not_hold_its_end_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command_module, "adopt_orphans", lambda: None)  # not in this process
    command = Command(["sh", "-c", "exit 3"])
    try:
        assert command.read_into(memoryview(bytearray(9)), time.monotonic() + TIMEOUT_S) == 0
        endless = os.open("/dev/zero", os.O_RDONLY)
        os.dup2(endless, command._err)
        os.close(endless)
        assert command.ended()[0] == 3
    finally:
        command.close()


def test_a_command_whose_frames_are_too_large_for_a_ring_is_ended_when_it_is_refused(daemon: Daemon) -> None:
    zeros = ["sh", "-c", "head -c 17280000 /dev/zero; exec sleep 1000"]
    worker = daemon.spawn("source")
    options = {"command": zeros, "format": "raw", "size": "2400x2400", "queue_frames": 64, "timeout_s": 60}
    worker.send(protocol.OpenSource("cam", "pipe", options))
    packet = worker.receive()
    assert packet is not None
    assert isinstance(packet.message, protocol.Fault)
    assert "smaller queue_frames" in packet.message.hint
    assert children(worker.pid) == []


def test_a_command_gets_no_descriptor_and_no_more_of_the_environment_than_it_needs(daemon: Daemon) -> None:
    camera = Camera.open(daemon, writer(), "pipe")
    (command,) = children(camera.pid)
    kinds = {os.readlink(fd).partition(":")[0] for fd in Path(f"/proc/{command}/fd").iterdir()}
    assert "socket" not in kinds
    assert not any("memfd" in kind for kind in kinds), kinds
    names = {word.partition(b"=")[0] for word in Path(f"/proc/{command}/environ").read_bytes().split(b"\0") if word}
    assert names <= {b"PATH", b"LANG", b"LC_ALL", b"LD_LIBRARY_PATH", b"TMPDIR", b"HOME"}


@pytest.mark.parametrize(
    ("options", "reason", "words"),
    [
        ({"command": ["/no/such/program"]}, Reason.SOURCE_MISSING, "no program"),
        (
            {"command": ["sh", "-c", "echo no such sensor >&2; exit 7"]},
            Reason.SOURCE_LOST,
            "exit code 7: no such sensor",
        ),
        ({"command": ["sleep", "100"], "timeout_s": 1}, Reason.SOURCE_LOST, "writes nothing"),
        ({"command": ["yes"]}, Reason.SOURCE_UNREADABLE, "yes writes no JPEG pictures"),
    ],
)
def test_a_command_that_gives_no_frame_is_refused_with_its_own_words(
    daemon: Daemon, options: dict[str, Any], reason: Reason, words: str
) -> None:
    fault = open_fault(daemon, "pipe", {"format": "mjpeg", "timeout_s": 60, **options})
    assert (fault.reason, words in fault.message) == (reason.value, True), fault


# --- http ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def web() -> Iterator[MjpegCamera]:
    camera = MjpegCamera()
    camera.start()
    yield camera
    camera.stop()


def test_an_http_cameras_frames_are_given_out_as_they_arrive(daemon: Daemon, web: MjpegCamera) -> None:
    # a queue for seconds: the test's reader may be kept waiting by other processes, and that is no overload
    camera = Camera.open(daemon, {"url": web.url, "queue_frames": 64}, "http")
    reader = Reader(camera, 1)
    reader.ask()
    answered = reader.run(20)
    numbers = [number for _, _, number in answered]
    assert numbers == list(range(numbers[0], numbers[0] + 20))
    assert [seq for seq, _, _ in answered] == list(range(20))


def test_killed_and_stalled_are_told_apart_and_frames_go_on_in_the_same_ring(daemon: Daemon, web: MjpegCamera) -> None:
    camera = Camera.open(daemon, {"url": web.url, "stale_s": 0.5, "timeout_s": 1.5, "queue_frames": 64}, "http")
    reader = Reader(camera, 1)
    reader.ask()
    reader.run(5)
    web.stalled = True
    wait_state(camera, "stale", Reason.SOURCE_STALE.value)
    wait_state(camera, "reconnecting", Reason.SOURCE_LOST.value)
    web.stalled = False
    assert wait_state(camera, "streaming").reconnects == 1
    web.stop()
    told = wait_state(camera, "reconnecting", Reason.SOURCE_MISSING.value)
    assert "refused" in told.detail
    web.start()
    assert wait_state(camera, "streaming").reconnects == 2
    reader.run(20)
    assert reader.seen == sorted(set(reader.seen)), "numbered on, and none twice"


def test_frames_of_another_size_end_the_process_with_a_clear_word(daemon: Daemon, web: MjpegCamera) -> None:
    camera = Camera.open(daemon, {"url": web.url}, "http")
    wait_state(camera, "streaming")
    web.stop()
    web.size = (320, 240)
    web.start()
    told = wait_state(camera, "reconnecting", Reason.SOURCE_CHANGED.value)
    assert told.detail.endswith("changed from 160x120 to 320x240 pixels")
    assert daemon.wait_exit(camera).status == 0


def test_while_nobody_reads_frames_are_thrown_away_and_the_first_one_read_is_new(
    daemon: Daemon, web: MjpegCamera
) -> None:
    camera = Camera.open(daemon, {"url": web.url}, "http")
    wait_state(camera, "streaming")
    time.sleep(1.5)
    reader = Reader(camera, 1)
    asked_ns = time.monotonic_ns()
    reader.ask()
    ((seq, t_ns, number),) = reader.run(1)
    assert seq == 0
    assert t_ns >= asked_ns - LATENCY_NS
    assert number > 20


def test_passwords_are_in_no_message_command_line_or_last_word(daemon: Daemon) -> None:
    web = MjpegCamera(login="viewer:s3cret/word")
    web.start()
    try:
        camera = Camera.open(daemon, {"url": web.url, "credentials_file": "viewer:s3cret/word"}, "http")
        said = [str(state) for state in states(camera, lambda told: told.state == "streaming")]
        web.stop()
        said += [str(state) for state in states(camera, lambda told: told.reason == Reason.SOURCE_MISSING.value)]
        said.append(Path(f"/proc/{camera.pid}/cmdline").read_text())
        daemon.kill(camera, signal.SIGTERM)
        said.append(daemon.wait_exit(camera).stderr_tail)
        web.start()
        for url in (
            web.url,
            web.url.replace("://", "://viewer:s3cretly@"),
            web.url.replace("://", "://u:s3cret@[") + "?x",
        ):
            said.append(str(open_fault(daemon, "http", {"url": f"{url}?token=s3cret"})))
        assert len(said) >= 8
        assert not [text for text in said if "s3cret" in text]
    finally:
        web.stop()


@pytest.mark.parametrize(
    ("login", "path", "reason"),
    [
        ("", "/video", Reason.SOURCE_REFUSED),
        ("viewer:wrong@", "/video", Reason.SOURCE_REFUSED),
        ("viewer:right@", "/nowhere", Reason.SOURCE_MISSING),
    ],
)
def test_a_wrong_password_and_a_wrong_path_are_told_apart(
    daemon: Daemon, login: str, path: str, reason: Reason
) -> None:
    web = MjpegCamera(login="viewer:right")
    web.start()
    try:
        fault = open_fault(daemon, "http", {"url": f"http://{login}127.0.0.1:{web.port}{path}"})
        assert fault.reason == reason.value
        assert fault.hint
    finally:
        web.stop()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "http://no.such.host.invalid/"])
def test_a_camera_that_is_not_there_is_missing_and_that_is_known_soon(daemon: Daemon, url: str) -> None:
    began = time.monotonic()
    assert open_fault(daemon, "http", {"url": url}).reason == Reason.SOURCE_MISSING.value
    assert time.monotonic() - began < 30


# --- rtsp ------------------------------------------------------------------------------------------------------------


def test_an_rtsp_camera_wants_the_right_password_and_nothing_shows_it(daemon: Daemon) -> None:
    rtspcamera.require()
    gate = RtspCamera(user="viewer", password="s3cret/word")
    gate.start()
    try:
        for login in ("", "viewer:s3cretly@"):
            fault = open_fault(daemon, "rtsp", {"url": gate.url.replace("://", f"://{login}")})
            assert fault.reason == Reason.SOURCE_REFUSED.value
            assert "s3cret" not in str(fault)
        camera = Camera.open(daemon, {"url": gate.url, "credentials_file": "viewer:s3cret/word"}, "rtsp")
        assert camera.opened.shape == [240, 320, 3]
        assert "s3cret" not in str(wait_state(camera, "streaming"))
        gate.kill()
        assert "s3cret" not in str(wait_state(camera, "reconnecting", Reason.SOURCE_MISSING.value))
    finally:
        gate.kill()
