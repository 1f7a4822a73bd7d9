"""A repository behind a web server: what nginx serves arrives; a server that lies, stalls or floods costs little."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ota import payload as payloads
from ota.client.fetch import Inbox
from ota.client.fsops import Fs
from ota.client.limits import Limits
from ota.client.transfer import Counts
from ota.client.transports.address import Address, parse_address
from ota.client.transports.directory import DirectoryTransport
from ota.client.transports.exchange import Waits
from ota.client.transports.https import HttpsTransport
from ota.errors import OtaError, Reason, TransferError
from ota.mqtt import Tls
from ota.release import LEAF_BYTES, Payload
from tests.docs.documents import blocks
from tests.fakes.broker import Authority, Identity
from tests.fakes.ports import free_port
from tests.fakes.webserver import GUIDE, WebServer

from .conftest import LyingServer

T = TypeVar("T")
DATA = random.Random(5).randbytes(1_000_000)
SHA = hashlib.sha256(DATA).hexdigest()
DESCRIBED = Payload(SHA, len(DATA), "raw", "cobblestone-256", "0" * 32, payloads.leaves(DATA))
SHORT = Waits(connect_s=1.0, silence_s=0.3, whole_s=0.8, idle_s=5.0)


def run(work: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(bounded())


def _write(repository: Path, name: str, data: bytes) -> None:
    path = repository / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _failure(call: Coroutine[Any, Any, Any]) -> OtaError:
    with pytest.raises(OtaError) as caught:
        run(call)
    return caught.value


@pytest.fixture
def transport(web: WebServer, repository: Path, device_tls: Tls) -> HttpsTransport:
    _write(repository, f"payloads/{SHA}", DATA)
    return HttpsTransport(parse_address(web.url), "cam-1", lambda: device_tls)


def _lied_to(server: LyingServer, tls: Tls, waits: Waits = SHORT) -> HttpsTransport:
    return HttpsTransport(Address("127.0.0.1", server.port, "/edge"), "cam-1", lambda: tls, waits=waits)


# -- nginx, as the guide configures it ---------------------------------------------------------------------------------


def test_documents_and_blocks_come_from_the_places_of_the_repository(
    transport: HttpsTransport, repository: Path
) -> None:
    _write(repository, "metadata/timestamp.json", b"ts")
    _write(repository, "metadata/3.root.json", b"root")
    _write(repository, "devices/cam-1/desired.json", b"mine")
    _write(repository, f"targets/person/1.0.0/{SHA}.release.json", b"release")

    async def main() -> None:
        assert await transport.metadata("timestamp", None, 100) == b"ts"
        assert await transport.metadata("root", 3, 100) == b"root"
        assert await transport.desired(100) == b"mine"
        assert await transport.target("person/1.0.0/release.json", SHA, 100) == b"release"
        assert await transport.block(SHA, 65536, 4096) == DATA[65536 : 65536 + 4096]
        assert await transport.block(SHA, 983040, 65536) == DATA[983040:]
        transport.close()

    run(main())


def test_what_is_not_there_is_not_found_and_what_is_too_long_is_not_read(
    transport: HttpsTransport, repository: Path
) -> None:
    _write(repository, "metadata/9.root.json", bytes(5000))
    assert _failure(transport.metadata("root", 77, 100)).reason is Reason.NOT_FOUND
    assert _failure(transport.block("00" * 32, 0, 4096)).reason is Reason.NOT_FOUND
    assert _failure(transport.block(SHA, len(DATA), 4096)).reason is Reason.NOT_FOUND
    assert _failure(transport.metadata("root", 9, 4999)).reason is Reason.METADATA_TOO_LARGE


def test_a_device_sees_its_own_document_alone(web: WebServer, repository: Path, authority: Authority) -> None:
    _write(repository, "devices/cam-1/desired.json", b"for cam-1")
    other = authority.issue("cam-2")
    spy = HttpsTransport(parse_address(web.url), "cam-1", lambda: Tls(other.ca, other.certificate, other.key))
    assert _failure(spy.desired(100)).reason is Reason.NOT_FOUND


def test_nothing_but_the_repositorys_public_places_is_served(
    transport: HttpsTransport, repository: Path, web: WebServer, device_tls: Tls
) -> None:
    _write(repository, "keys/root-1.pem", b"secret")
    _write(repository, "devices/cam-1/device.json", b"inner")
    context = ssl.create_default_context(cafile=device_tls.ca)
    context.load_cert_chain(device_tls.certificate, device_tls.key)
    from http.client import HTTPSConnection

    for path in ("/edge/keys/root-1.pem", "/edge/devices/cam-1/device.json", "/edge/metadata/../keys/root-1.pem", "/"):
        connection = HTTPSConnection("127.0.0.1", web.port, context=context)
        connection.request("GET", path)
        assert connection.getresponse().status in (400, 404), path
        connection.close()


def test_a_payload_comes_whole_over_kept_connections(transport: HttpsTransport, tmp_path: Path) -> None:
    counts = Counts()
    run(Inbox(Fs(tmp_path), Limits(), random.Random(1)).fetch(DESCRIBED, [transport], counts))
    assert (tmp_path / "inbox" / f"{SHA}.part").read_bytes() == DATA
    assert counts.fetched_bytes == transport.counts.body_bytes == len(DATA)
    assert transport.counts.connections <= 8 < transport.counts.answers


def test_half_from_one_source_and_the_rest_from_another_costs_each_byte_once(
    transport: HttpsTransport, repository: Path, tmp_path: Path
) -> None:
    class Pulled(DirectoryTransport):
        """A stick that is pulled half-way."""

        blocks = 0

        async def block(self, sha256: str, offset: int, length: int) -> bytes:
            if offset >= 8 * LEAF_BYTES:
                raise TransferError(Reason.SOURCE_UNREACHABLE, "pulled")
            data = await super().block(sha256, offset, length)
            self.blocks += len(data)
            return data

    stick = Pulled(repository, "cam-1")
    counts = Counts()
    run(Inbox(Fs(tmp_path), Limits(), random.Random(1)).fetch(DESCRIBED, [stick, transport], counts))
    assert (tmp_path / "inbox" / f"{SHA}.part").read_bytes() == DATA
    assert stick.blocks + transport.counts.body_bytes == len(DATA)
    assert stick.blocks >= 4 * LEAF_BYTES <= transport.counts.body_bytes
    assert (counts.fetched_bytes, counts.refetched_bytes, counts.duplicate_bytes) == (len(DATA), 0, 0)


def test_a_connection_that_the_server_closed_meanwhile_is_replaced_unseen(
    tmp_path: Path, nginx: None, server_identity: Identity, device_tls: Tls
) -> None:
    _write(tmp_path, "repository/metadata/timestamp.json", b"ts")
    with WebServer(tmp_path / "nginx", tmp_path / "repository", server_identity) as server:
        transport = HttpsTransport(parse_address(server.url), "cam-1", lambda: device_tls)

        async def main() -> None:
            assert await transport.metadata("timestamp", None, 10) == b"ts"
            server.stop()
            server.start()
            assert await transport.metadata("timestamp", None, 10) == b"ts"
            transport.close()

        run(main())
        assert transport.counts.connections == 2


def test_proxies_of_the_environment_are_not_used(transport: HttpsTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert run(transport.block(SHA, 0, 4096)) == DATA[:4096]


def test_idle_connections_and_threads_end(web: WebServer, repository: Path, device_tls: Tls) -> None:
    _write(repository, f"payloads/{SHA}", DATA)
    waits = Waits(idle_s=0.1)
    transport = HttpsTransport(parse_address(web.url), "cam-1", lambda: device_tls, waits=waits)

    async def main() -> None:
        before = set(threading.enumerate())
        await asyncio.gather(*(transport.block(SHA, n * 65536, 65536) for n in range(8)))
        assert set(threading.enumerate()) - before
        deadline = time.monotonic() + 60
        while set(threading.enumerate()) - before and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        assert not set(threading.enumerate()) - before
        assert await transport.block(SHA, 0, 10) == DATA[:10]
        transport.close()

    run(main())


def test_http_client_is_loaded_by_the_first_request_alone() -> None:
    code = "import sys, ota.client.transports.https as h; sys.exit('http.client' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


# -- who is at the other end -------------------------------------------------------------------------------------------


def test_a_server_of_another_authority_or_name_is_not_trusted(
    tmp_path: Path, authority: Authority, device_tls: Tls
) -> None:
    stranger = Authority(tmp_path / "stranger").issue("server", hosts=["127.0.0.1"])
    misnamed = authority.issue("server", hosts=["files.example.org"])
    for identity in (stranger, misnamed):
        with LyingServer(identity, lambda request, sock: None) as server:
            failure = _failure(_lied_to(server, device_tls).desired(100))
            assert failure.reason is Reason.SERVER_UNTRUSTED
            assert server.requests == []


def test_a_certificate_that_is_not_valid_yet_is_told_from_an_untrusted_one(
    authority: Authority, device_tls: Tls
) -> None:
    tomorrow = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    early = authority.issue("server", hosts=["127.0.0.1"], starts=tomorrow)
    with LyingServer(early, lambda request, sock: None) as server:
        failure = _failure(_lied_to(server, device_tls).desired(100))
    assert failure.reason is Reason.SERVER_NOT_YET_VALID
    assert "clock" in failure.hint


def test_a_server_that_refuses_our_certificate_says_so(tmp_path: Path, web: WebServer, device_tls: Tls) -> None:
    stranger = Authority(tmp_path / "stranger").issue("cam-1")
    tls = Tls(device_tls.ca, stranger.certificate, stranger.key)
    transport = HttpsTransport(parse_address(web.url), "cam-1", lambda: tls)
    assert _failure(transport.desired(100)).reason is Reason.SERVER_REFUSED


def test_a_renewed_certificate_is_used_by_the_next_connection(
    tmp_path: Path, web: WebServer, repository: Path, device_tls: Tls
) -> None:
    _write(repository, "devices/cam-1/desired.json", b"mine")
    stranger = Authority(tmp_path / "stranger").issue("cam-1")
    in_force = [Tls(device_tls.ca, stranger.certificate, stranger.key)]
    transport = HttpsTransport(parse_address(web.url), "cam-1", lambda: in_force[0])
    assert _failure(transport.desired(100)).reason is Reason.SERVER_REFUSED
    in_force[0] = device_tls
    assert run(transport.desired(100)) == b"mine"


def test_without_a_server_the_source_is_unreachable(device_tls: Tls) -> None:
    transport = HttpsTransport(Address("127.0.0.1", free_port(), ""), "cam-1", lambda: device_tls)
    failure = _failure(transport.desired(100))
    assert failure.reason is Reason.SOURCE_UNREACHABLE
    assert failure.retry


# -- a server that lies ------------------------------------------------------------------------------------------------


def _head(status: str, *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def _says(data: bytes) -> Callable[[bytes, ssl.SSLSocket], None]:
    return lambda request, sock: sock.sendall(data)


def _part(range_: str, body: bytes, *lines: str) -> bytes:
    return _head("206 Part", f"Content-Range: bytes {range_}", *lines) + body


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (_head("302 Found", "Location: https://evil.example/", "Content-Length: 0"), Reason.SERVER_REFUSED),
        (_head("403 Forbidden", "Content-Length: 0"), Reason.SERVER_REFUSED),
        (_head("500 Oops", "Content-Length: 0"), Reason.SOURCE_UNREACHABLE),
        (_head("503 Busy", "Content-Length: 0"), Reason.SOURCE_UNREACHABLE),
        (_head("404 Not Found", "Content-Length: 0"), Reason.NOT_FOUND),
        (_head("204 Nothing"), Reason.SERVER_REFUSED),
        (_part("5-14/100", b"0123456789", "Content-Length: 10"), Reason.TRANSFER_CORRUPT),
        (_head("206 Part", "Content-Length: 10") + b"0123456789", Reason.TRANSFER_CORRUPT),
        (_part("0-99/100", bytes(200), "Content-Length: 200"), Reason.TRANSFER_CORRUPT),
        (_part("0-99/100", bytes(9000)), Reason.TRANSFER_CORRUPT),
        (_part("0-99/100", bytes(50), "Content-Length: 100"), Reason.TRANSFER_CORRUPT),
        (_part("0-9/9", bytes(10), "Content-Length: 10", "Content-Encoding: gzip"), Reason.TRANSFER_CORRUPT),
        (_head("200 All", "Content-Length: 2000000"), Reason.SERVER_REFUSED),
        (_head("200 All", "Transfer-Encoding: chunked"), Reason.SERVER_REFUSED),
        (b"SSH-2.0-OpenSSH_9\r\n", Reason.SOURCE_UNREACHABLE),
        (b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 70_000 + b"\r\n\r\n", Reason.SOURCE_UNREACHABLE),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", Reason.SOURCE_UNREACHABLE),
        (b"", Reason.SOURCE_UNREACHABLE),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_refused_with_a_reason(
    server_identity: Identity, device_tls: Tls, answer: bytes, reason: Reason
) -> None:
    with LyingServer(server_identity, _says(answer)) as server:
        failure = _failure(_lied_to(server, device_tls).block(SHA, 0, 100))
        assert failure.reason is reason, failure.message
        assert all(request.startswith(b"GET /edge/payloads/") for request in server.requests)


def test_a_server_without_ranges_still_gives_blocks_of_small_payloads(
    server_identity: Identity, device_tls: Tls
) -> None:
    whole = _head("200 OK", "Content-Length: 5000") + DATA[:5000]
    with LyingServer(server_identity, _says(whole)) as server:
        assert run(_lied_to(server, device_tls).block(SHA, 4096, 4096)) == DATA[4096:5000]


def test_a_document_that_never_ends_is_cut_off(server_identity: Identity, device_tls: Tls) -> None:
    sent = [0]

    def flood(request: bytes, sock: ssl.SSLSocket) -> None:
        sock.sendall(_head("200 OK", "Connection: close"))
        while True:
            sock.sendall(bytes(16384))
            sent[0] += 16384

    with LyingServer(server_identity, flood) as server:
        assert _failure(_lied_to(server, device_tls).metadata("root", 2, 50_000)).reason is Reason.METADATA_TOO_LARGE
        time.sleep(0.2)
        assert sent[0] < 8_000_000


@pytest.mark.fault("F24")
@pytest.mark.parametrize("what", ["silent", "trickling_head", "trickling_body", "endless_continue"])
def test_a_server_that_keeps_us_waiting_is_left_within_the_time_for_one_request(
    server_identity: Identity, device_tls: Tls, what: str
) -> None:
    def answer(request: bytes, sock: ssl.SSLSocket) -> None:
        if what == "trickling_body":
            sock.sendall(_head("206 Part", "Content-Length: 100", "Content-Range: bytes 0-99/100"))
        while True:
            if what == "endless_continue":
                sock.sendall(_head("100 Continue"))
            elif what != "silent":
                sock.sendall(b"H")
            time.sleep(0.05)

    with LyingServer(server_identity, answer) as server:
        transport = _lied_to(server, device_tls)
        began = time.monotonic()
        assert _failure(transport.block(SHA, 0, 100)).reason is Reason.TRANSFER_TIMEOUT
        assert time.monotonic() - began < 2.0


def test_a_cancelled_request_frees_its_thread_and_leaves_the_transport_usable(
    server_identity: Identity, device_tls: Tls
) -> None:
    answers = [b"", _head("200 OK", "Content-Length: 2") + b"ok"]

    def answer(request: bytes, sock: ssl.SSLSocket) -> None:
        data = answers.pop(0)
        if data:
            sock.sendall(data)
        else:
            time.sleep(30)

    with LyingServer(server_identity, answer) as server:
        waits = Waits(silence_s=30.0, whole_s=30.0)
        address = Address("127.0.0.1", server.port, "/edge")
        transport = HttpsTransport(address, "cam-1", lambda: device_tls, connections=1, waits=waits)

        async def main() -> None:
            task = asyncio.create_task(transport.desired(100))
            while not server.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # the one thread there is must be free again for this to be answered
            assert await asyncio.wait_for(transport.desired(100), 15) == b"ok"
            transport.close()

        run(main())


def test_where_connecting_outlasts_the_patience_for_a_block_the_connection_serves_the_next_one(
    server_identity: Identity, device_tls: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a name has addresses of a network that swallows packets before those of one that does not."""
    genuine, delays = socket.getaddrinfo, [1.0]

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(delays.pop() if delays else 0.0)
        return genuine(*arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    answer = _says(_head("200 OK", "Content-Length: 2") + b"ok")
    with LyingServer(server_identity, answer, keep=True) as server:
        address = Address("127.0.0.1", server.port, "/edge")
        transport = HttpsTransport(address, "cam-1", lambda: device_tls, connections=1)

        async def main() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(transport.desired(100), 0.2)
            assert await transport.desired(100) == b"ok"
            transport.close()

        run(main())
        assert (server.connections, transport.counts.connections) == (1, 1)
        assert len(server.requests) == 1, "what nobody waits for is not asked"


def test_a_request_that_waits_for_a_thread_is_answered_when_idle_connections_are_closed(
    server_identity: Identity, device_tls: Tls
) -> None:
    def answer(request: bytes, sock: ssl.SSLSocket) -> None:
        sock.sendall(_head("200 OK", "Content-Length: 10"))
        for _ in range(10):
            time.sleep(0 if len(server.requests) == 1 else 0.05)
            sock.sendall(b"x")

    with LyingServer(server_identity, answer) as server:
        waits = Waits(idle_s=0.2)
        address = Address("127.0.0.1", server.port, "/edge")
        transport = HttpsTransport(address, "cam-1", lambda: device_tls, connections=1, waits=waits)

        async def main() -> None:
            await transport.desired(10)  # from its end on, idle time is counted
            both = await asyncio.gather(transport.desired(10), transport.desired(10))
            assert both == [b"x" * 10, b"x" * 10]
            transport.close()

        run(main())


_LEAVES = """
import asyncio, sys, threading, time
from ota.brokertls import Tls
from ota.client.transports.address import Address
from ota.client.transports.exchange import Waits
from ota.client.transports.https import HttpsTransport

what, port, *files = sys.argv[1:]
if what == "name":
    import socket
    socket.getaddrinfo = lambda *_, **__: time.sleep(300)
waits = Waits(connect_s=300.0, silence_s=300.0, whole_s=300.0)
transport = HttpsTransport(Address("127.0.0.1", int(port), ""), "cam-1", lambda: Tls(*files), waits=waits)

async def main():
    asking = [asyncio.create_task(transport.desired(100)) for _ in range(10)]
    await asyncio.sleep(0.5)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    transport.close()
    assert any(thread.name == "https" for thread in threading.enumerate()), "they hang"

asyncio.run(main())
print("left", flush=True)
"""


@pytest.mark.parametrize("what", ["name", "connection", "handshake"])
def test_a_process_ends_at_once_although_a_server_swallows_every_packet(device_tls: Tls, what: str) -> None:
    with socket.socket() as silent, contextlib.ExitStack() as others:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0 if what == "connection" else 16)
        for _ in range(3 if what == "connection" else 0):
            # the queue of a server that accepts nobody is full: it answers no further attempt
            other = others.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(silent.getsockname())
        files = (device_tls.ca, device_tls.certificate, device_tls.key)
        arguments = [sys.executable, "-c", _LEAVES, what, str(silent.getsockname()[1]), *files]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "left\n"
                assert process.wait(60) == 0
            finally:
                process.kill()


def test_a_path_is_asked_for_as_it_was_written(server_identity: Identity, device_tls: Tls) -> None:
    with LyingServer(server_identity, _says(_head("200 OK", "Content-Length: 2") + b"ok")) as server:
        address = parse_address(f"https://127.0.0.1:{server.port}/our%20files")
        transport = HttpsTransport(address, "cam-1", lambda: device_tls, waits=SHORT)
        assert run(transport.desired(100)) == b"ok"
        assert server.requests[0].startswith(b"GET /our%20files/devices/cam-1/desired.json HTTP/1.1")


@pytest.mark.parametrize(
    "text",
    [
        "http://host/x",
        "https://",
        "host:8443",
        "https://user:secret@host/x",
        "https://host/x?y=1",
        "https://host/x#y",
        "https://host:99999/x",
        "https://ho st/x",
        "https://host/\r\nX: y",
        "https://host:0/x",
        "https://.host/x",
        "https://files..host/x",
        f"https://{'a' * 64}.host/x",
    ],
)
def test_an_address_that_is_more_or_less_than_host_port_and_path_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("https://files.example.org", Address("files.example.org", 443, "")),
        ("https://10.0.0.1:8443/edge/", Address("10.0.0.1", 8443, "/edge")),
        ("https://[fd00::1]:8443/a/b", Address("fd00::1", 8443, "/a/b")),
        (f"https://{'a' * 63}.host./a%20b", Address(f"{'a' * 63}.host.", 443, "/a%20b")),
    ],
)
def test_an_address_is_host_port_and_path(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


# -- the guide ---------------------------------------------------------------------------------------------------------


def test_what_the_guide_copies_is_what_a_device_needs_and_holds_no_secret(
    tmp_path: Path, nginx: None, server_identity: Identity, device_tls: Tls
) -> None:
    for name in ("timestamp.json", "1.root.json", "7.snapshot.json"):
        _write(tmp_path / "fleet", f"metadata/{name}", name.encode())
    _write(tmp_path / "fleet", f"targets/person/1.0.0/{SHA}.release.json", b"release")
    _write(tmp_path / "fleet", f"payloads/{SHA}", DATA)
    _write(tmp_path / "fleet", "devices/cam-1/desired.json", b"mine")
    for secret in ("keys/root-1.pem", "vault/plain/x", "devices/cam-1/device.json"):
        _write(tmp_path / "fleet", secret, b"secret")
    script = next(block.text for block in blocks(GUIDE) if block.info == "sh device")
    for _ in range(2):
        subprocess.run(["sh", "-eu", "-c", script.replace("/srv/edge", "srv")], cwd=tmp_path, check=True)
    copied = {str(path.relative_to(tmp_path / "srv")) for path in (tmp_path / "srv").rglob("*") if path.is_file()}
    assert not any(path.read_bytes() == b"secret" for path in (tmp_path / "srv").rglob("*") if path.is_file())
    assert len(copied) == 6
    with WebServer(tmp_path / "nginx", tmp_path / "srv", server_identity) as server:
        transport = HttpsTransport(parse_address(server.url), "cam-1", lambda: device_tls)

        async def main() -> None:
            assert await transport.metadata("timestamp", None, 100) == b"timestamp.json"
            assert await transport.metadata("snapshot", 7, 100) == b"7.snapshot.json"
            assert await transport.target("person/1.0.0/release.json", SHA, 100) == b"release"
            assert await transport.desired(100) == b"mine"
            assert await transport.block(SHA, 0, 65536) == DATA[:65536]
            transport.close()

        run(main())
