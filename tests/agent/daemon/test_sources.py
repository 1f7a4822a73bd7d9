"""What the daemon makes of a source process: its word, its silence, its end; what is told how often, and figures."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent import memfd, protocol
from agent.daemon import report, sources
from agent.daemon.offeredring import check_ring
from agent.daemon.sources import SourceRuntime, network_host
from agent.daemon.supervisor import Supervisor
from agent.errors import AgentError, Reason
from agent.sourceconfig import SourceConfig
from tests import workerpython
from tests.fakes.mjpegserver import MjpegCamera

FAULTY = str(Path(__file__).resolve().parents[2] / "fakes" / "livesources.py")
HTTP = {"url_file": "", "credentials_file": "", "queue_frames": 4, "stale_s": 2.0, "timeout_s": 3.0}


class Watch:
    """One source with nobody who reads it; `told` are the states that were passed on, `restarted` the new rings."""

    def __init__(self, kind: str, options: Mapping[str, Any], secrets: dict[str, Any] | None = None) -> None:
        self.told: list[tuple[str, str]] = []
        self.restarted = 0
        program = workerpython.program(FAULTY, "host")
        self.supervisor = Supervisor(listen=None, host_command=program, on_lost=lambda: None)
        self.source = SourceRuntime(
            SourceConfig("cam", kind, options),
            self.supervisor,
            options=None if secrets is None else lambda source: {**source.options, **secrets},
            on_dropped=lambda *_: None,
            on_restarted=self._restarted,
            on_state=lambda source: self.told.append((source.state, source.reason)),
        )

    def _restarted(self, _: SourceRuntime) -> None:
        self.restarted += 1

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not true():
                await asyncio.sleep(0.01)


def run(watch: Watch, body: Callable[[Watch], Awaitable[None]]) -> None:
    async def main() -> None:
        await watch.supervisor.start()
        watch.source.start()
        try:
            await body(watch)
        finally:
            await watch.source.stop()
            await watch.supervisor.stop()

    asyncio.run(main())


def faulty(kind: str) -> Watch:
    return Watch(kind, {})


def test_a_source_that_flickers_is_told_of_now_and_then_and_at_last_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TOLD_EVERY_S", 2.0)

    async def body(watch: Watch) -> None:
        began = time.monotonic()
        await watch.until(lambda: watch.source.reconnects >= 12)
        seconds = time.monotonic() - began
        assert len(watch.told) <= sources.TOLD_BURST + seconds / 2.0 + 1
        assert len(watch.told) >= sources.TOLD_BURST
        assert ("reconnecting", "source_lost") in watch.told
        assert ("streaming", "") in watch.told

    run(faulty("flickers"), body)


def test_a_call_that_never_returns_ends_the_process_and_another_begins() -> None:
    async def body(watch: Watch) -> None:
        await watch.until(lambda: watch.source.state == "stale")
        assert watch.source.reason == Reason.SOURCE_STALE.value
        hung = watch.source.pid
        await watch.until(lambda: watch.source.reason == Reason.WORKER_HUNG.value)
        assert "has not answered for 1 s" in watch.source.detail
        await watch.until(lambda: watch.restarted == 1 and watch.source.pid not in (0, hung))
        await watch.until(lambda: watch.source.frames > 3)
        assert watch.source.restarts == 1

    run(faulty("hangs"), body)


def test_what_nobody_expected_in_the_waiting_thread_is_a_crash_and_no_silence() -> None:
    async def body(watch: Watch) -> None:
        await watch.until(lambda: watch.source.reason == Reason.WORKER_CRASHED.value)
        assert "exit code 70" in watch.source.detail
        await watch.until(lambda: watch.source.restarts >= 1 and watch.source.state == "streaming")

    run(faulty("dies"), body)


def test_a_ring_that_no_reader_could_take_is_the_sources_fault_and_never_handed_on() -> None:
    async def body(watch: Watch) -> None:
        await watch.until(lambda: watch.source.reason == Reason.BAD_MESSAGE.value)
        assert "float64" in watch.source.detail
        assert watch.source.opened is None
        await watch.until(lambda: watch.source.restarts >= 2)
        assert watch.restarted == 0

    run(faulty("lies"), body)


@pytest.mark.parametrize("change", [
    {"dtype": "float64"}, {"shape": []}, {"shape": [24, 0, 3]}, {"shape": [24, 32]}, {"shape": [24, 33, 3]},
    {"slots": 0}, {"slots": 3}, {"slot_bytes": 1 << 40}, {"slots": -2, "slot_bytes": -2304},
    {"dtype": "float32", "shape": [24, 8, 3]},
])  # fmt: skip
def test_what_is_said_of_a_ring_has_to_be_true(change: dict[str, Any]) -> None:
    ring = memfd.create("frames", 2 * 2304)
    try:
        told = {"dtype": "uint8", "shape": [24, 32, 3], "fps": 1.0, "slots": 2, "slot_bytes": 2304}
        with pytest.raises(AgentError, match="not sealed"):
            check_ring(protocol.SourceOpened(**told), ring, pictures=True)
        fcntl.fcntl(ring, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        check_ring(protocol.SourceOpened(**told), ring, pictures=True)
        with pytest.raises(AgentError, match="ring that is none"):
            check_ring(protocol.SourceOpened(**{**told, **change}), ring, pictures=True)
    finally:
        os.close(ring)


def test_a_source_that_complains_without_end_is_written_down_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    async def body(watch: Watch) -> None:
        await watch.until(lambda: watch.source.frames >= 20)
        assert watch.source.state in ("stale", "streaming")

    run(faulty("complains"), body)
    said = [record for record in caplog.records if record.getMessage() == "source cam: no"]
    assert 1 <= len(said) < 200


def test_the_status_has_figures_that_were_measured_and_no_secret() -> None:
    web = MjpegCamera(login="viewer:s3cret", fps=25)
    web.start()

    async def body(watch: Watch) -> None:
        await watch.until(lambda: watch.source.fps > 5)
        shown = report.source_status(watch.source)
        assert (shown["state"], shown["size"], shown["isolation"]) == ("streaming", "160x120", "process")
        assert shown["frames"] > 5
        assert 5 < shown["measured_fps"] < 40
        assert 0 <= shown["age_s"] < 30
        before = watch.source.frames
        watch.source._worker.kill(signal.SIGKILL)  # type: ignore[union-attr]
        await watch.until(lambda: watch.restarted == 1 and watch.source.state == "streaming")
        assert watch.source.frames >= before, "frames of the process before count on"
        await asyncio.to_thread(web.stop)
        await watch.until(lambda: watch.source.reason == Reason.SOURCE_MISSING.value)
        shown = report.source_status(watch.source)
        assert (shown["measured_fps"], shown["state"]) == (0.0, "reconnecting")
        await watch.until(lambda: report.source_status(watch.source)["age_s"] > 1)
        assert "s3cret" not in str(shown)
        assert "s3cret" not in str(watch.source.config)

    try:
        run(Watch("http", {"url": web.url, **HTTP}, {"credentials_file": "viewer:s3cret"}), body)
    finally:
        web.stop()


def test_a_camera_that_announces_two_gigabytes_gets_no_memory_for_them() -> None:
    def answer(sock: socket.socket, head: str) -> None:
        number = sock.recv(4096).partition(b"CSeq: ")[2].partition(b"\r")[0].decode()
        sock.sendall(f"RTSP/1.0 200 OK\r\nCSeq: {number}\r\n{head}\r\n\r\n".encode())

    def camera(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                with listener.accept()[0] as sock, contextlib.suppress(OSError):
                    answer(sock, "Public: DESCRIBE")
                    answer(sock, "Content-Type: application/sdp\r\nContent-Length: 2000000000")
                    for _ in range(200):
                        sock.sendall(b"a=x\r\n" * 200_000)

    async def body(watch: Watch) -> None:
        await watch.until(lambda: watch.source.reason in (Reason.SOURCE_UNREADABLE.value, Reason.SOURCE_LOST.value))
        status = Path(f"/proc/{watch.source.pid}/status").read_text()
        assert int(status.partition("VmHWM:")[2].split()[0]) < 150_000
        assert watch.source.restarts == 0

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=camera, args=(listener,), daemon=True).start()
        url = f"rtsp://127.0.0.1:{listener.getsockname()[1]}/1"
        run(Watch("rtsp", {"url": url, "transport": "tcp", **HTTP}), body)
        listener.shutdown(socket.SHUT_RDWR)


def test_a_camera_that_is_absent_at_first_is_found_by_the_same_process() -> None:
    web = MjpegCamera()

    async def body(watch: Watch) -> None:
        await watch.until(lambda: watch.source.reason == Reason.SOURCE_MISSING.value)
        pid = watch.source.pid
        await asyncio.sleep(1.5)
        web.start()
        began = time.monotonic()
        await watch.until(lambda: watch.source.state == "streaming")
        print(f"first frame {time.monotonic() - began:.2f} s after the camera came")
        assert (watch.source.pid, watch.source.restarts) == (pid, 0)

    try:
        run(Watch("http", {"url": web.url, **HTTP}), body)
    finally:
        web.stop()


@pytest.mark.parametrize(("workers", "kind", "beside"), [
    ("unit", "http", True), ("unit", "video", False), ("process", "http", False),
])  # fmt: skip
def test_a_second_host_is_there_only_for_units_with_a_source_that_needs_the_network(
    tmp_path: Path, workers: str, kind: str, beside: bool
) -> None:
    from agent import config

    source = {"name": "cam", "kind": kind, **({"url": "http://cam/"} if kind == "http" else {"path": "/a"})}
    parsed = config.parse({"workers": workers, "run_dir": str(tmp_path), "source": [source]}, tmp_path / "agent.toml")
    assert (network_host(parsed, lambda: None) is not None) == beside
