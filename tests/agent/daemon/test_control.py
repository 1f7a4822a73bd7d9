"""HTTP on the unix socket: honest clients, broken ones, slow ones, and the end of the daemon in between."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.daemon import control
from agent.daemon.control import MAX_BODY_BYTES, ControlServer, Reply, json_reply, text_reply
from agent.errors import ControlError, Reason
from ota.errors import OtaError
from ota.errors import Reason as OtaReason


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(5)
        self.sock.connect(str(self._path))


async def echo(fields: Mapping[str, Any]) -> Reply:
    return json_reply(fields)


async def refuse(_: Mapping[str, Any]) -> Reply:
    raise OtaError(OtaReason.BUSY, "an update is running", hint="wait")


async def reject(_: Mapping[str, Any]) -> Reply:
    raise ControlError(Reason.UNKNOWN_LINE, "no such line", hint="see status")


async def big(_: Mapping[str, Any]) -> Reply:
    return text_reply("x" * 4_000_000)


ROUTES = {"GET /echo": echo, "POST /echo": echo, "POST /refuse": refuse, "POST /reject": reject, "GET /big": big}


def serving(path: Path, client: Callable[[], Any], routes: Mapping[str, Any] = ROUTES) -> Any:
    """What `client` returns, run in a thread beside a server on `path`; no failure of a connection may go unheard."""
    faults: list[Mapping[str, Any]] = []

    async def main() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        server = ControlServer(path, routes)
        await server.start()
        try:
            return await asyncio.to_thread(client)
        finally:
            await server.stop()

    answer = asyncio.run(main())
    assert not faults
    return answer


def ask(path: Path, method: str, target: str, body: str | bytes | None = None) -> tuple[int, Any]:
    connection = UnixConnection(path)
    connection.request(method, target, body)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text) if text else None


def raw(path: Path, data: bytes, *, timeout_s: float = 5) -> bytes:
    """Everything the server says to `data`."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
        return answer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control.sock"


def test_an_object_comes_in_and_an_answer_goes_out(path: Path) -> None:
    assert serving(path, lambda: ask(path, "POST", "/echo?x=1", '{"line": "parts"}')) == (200, {"line": "parts"})


def test_one_connection_carries_many_requests(path: Path) -> None:
    def client() -> list[int]:
        connection = UnixConnection(path)
        found = []
        for _ in range(3):
            connection.request("GET", "/echo")
            response = connection.getresponse()
            response.read()
            found.append(response.status)
        connection.close()
        return found

    assert serving(path, client) == [200, 200, 200]


def test_the_socket_is_for_owner_and_group_and_goes_away(path: Path) -> None:
    assert serving(path, lambda: stat.S_IMODE(path.stat().st_mode)) == 0o660
    assert not path.exists()


def test_a_stale_socket_file_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    assert serving(path, lambda: ask(path, "GET", "/echo"))[0] == 200


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()

    async def main() -> None:
        with pytest.raises(ControlError) as caught:
            await ControlServer(tmp_path / "run" / "control.sock", ROUTES).start()
        assert caught.value.reason is Reason.STATE_UNWRITABLE

    asyncio.run(main())


@pytest.mark.parametrize(
    ("method", "target", "body", "status", "reason"),
    [
        ("GET", "/nowhere", None, 404, "bad_usage"),
        ("DELETE", "/echo", None, 404, "bad_usage"),
        ("POST", "/refuse", "{}", 409, "busy"),
        ("POST", "/reject", "{}", 409, "unknown_line"),
        ("POST", "/echo", "[1]", 409, "bad_usage"),
        ("POST", "/echo", "{", 409, "bad_json"),
        ("POST", "/echo", '{"a": 1, "a": 2}', 409, "bad_json"),
        ("POST", "/echo", '{"a": NaN}', 409, "bad_json"),
        ("POST", "/echo", "[" * 10_000, 409, "bad_json"),
        ("POST", "/echo", b"\xff\xfe", 409, "bad_json"),
        ("POST", "/echo", "x" * (MAX_BODY_BYTES + 1), 413, "bad_usage"),
    ],
)
def test_what_cannot_be_done_is_answered_with_its_reason(
    path: Path, method: str, target: str, body: Any, status: int, reason: str
) -> None:
    seen, answer = serving(path, lambda: ask(path, method, target, body))
    assert (seen, answer["reason"]) == (status, reason)


def test_a_body_without_end_is_cut_off(path: Path) -> None:
    def client() -> bytes:
        head = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        return raw(path, head + b"1000\r\n%s\r\n" % (b"x" * 0x1000) * 32)

    assert b" 413 " in serving(path, client).split(b"\r\n")[0]


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET /echo HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 40_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
    ],
)
def test_what_is_not_http_is_refused(path: Path, data: bytes) -> None:
    assert serving(path, lambda: raw(path, data)).split(b" ")[1][:1] == b"4"


@pytest.mark.parametrize(
    "data",
    [
        b"HEAD /echo HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET //[ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /echo HTTP/1.0\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nshort",
    ],
)
def test_odd_requests_cost_the_server_nothing(path: Path, data: bytes) -> None:
    def client() -> int:
        raw(path, data)
        return ask(path, "GET", "/echo")[0]

    assert serving(path, client) == 200


@given(st.lists(st.binary(max_size=60), max_size=5))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_leave_the_server_serving(tmp_path: Path, parts_of_it: list[bytes]) -> None:
    path = tmp_path / "c.sock"

    def client() -> int:
        raw(path, b"POST /echo HTTP/1.1\r\n" + b"\r\n".join(parts_of_it))
        return ask(path, "GET", "/echo")[0]

    assert serving(path, client) == 200


def test_a_client_that_says_nothing_or_reads_nothing_is_let_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "REQUEST_TIMEOUT_S", 0.2)

    def client() -> tuple[bytes, float]:
        silent, deaf = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        with silent, deaf:
            for sock in (silent, deaf):
                sock.settimeout(5)
                sock.connect(str(path))
            silent.sendall(b"GET /ec")
            deaf.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
            started = time.monotonic()
            said = silent.recv(100)
            time.sleep(0.4)
            got = 0
            while chunk := deaf.recv(1 << 20):
                got += len(chunk)
            assert got < 4_000_000
            return said, time.monotonic() - started

    said, seconds = serving(path, client)
    assert said == b""
    assert seconds < 3


def test_more_connections_than_it_holds_are_turned_away(path: Path) -> None:
    def client() -> list[bytes]:
        socks = [socket.socket(socket.AF_UNIX) for _ in range(control.MAX_CONNECTIONS + 4)]
        for sock in socks:
            sock.settimeout(5)
            sock.connect(str(path))
        refused = [sock.recv(1) for sock in socks[-4:]]
        for sock in socks:
            sock.close()
        return refused

    assert serving(path, client) == [b""] * 4


def test_a_request_in_progress_is_cancelled_before_the_server_has_stopped(path: Path) -> None:
    ends = []

    async def slow(_: Mapping[str, Any]) -> Reply:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.05)  # what it holds is put back
            ends.append("cancelled")
            raise
        return json_reply({})

    async def main() -> None:
        server = ControlServer(path, {"GET /slow": slow})
        await server.start()
        _, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0.1)
        await server.stop()
        assert ends == ["cancelled"]
        writer.close()

    asyncio.run(main())
