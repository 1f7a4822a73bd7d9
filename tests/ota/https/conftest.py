"""A web server for the tests of this area: nginx with the configuration that the guide shows, or a server that lies."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ota.mqtt import Tls
from tests.fakes.broker import Authority, Identity
from tests.fakes.webserver import WebServer


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def server_identity(authority: Authority) -> Identity:
    return authority.issue("server", hosts=["localhost", "127.0.0.1"])


@pytest.fixture(scope="session")
def device_tls(authority: Authority) -> Tls:
    identity = authority.issue("cam-1")
    return Tls(identity.ca, identity.certificate, identity.key)


@pytest.fixture(scope="session")
def nginx() -> None:
    """Skips by name where nginx is not installed, except in CI."""
    if not WebServer.available() and os.environ.get("CI") != "true":
        pytest.skip("nginx is not installed (Debian package nginx-light)")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nginx serves; tests add files of their own."""
    return tmp_path_factory.mktemp("repository")


@pytest.fixture(scope="session")
def web(
    nginx: None, tmp_path_factory: pytest.TempPathFactory, repository: Path, server_identity: Identity
) -> Iterator[WebServer]:
    with WebServer(tmp_path_factory.mktemp("nginx"), repository, server_identity) as server:
        yield server


Answer = Callable[[bytes, ssl.SSLSocket], None]


class LyingServer:
    """A TLS server with the right certificate that answers each request as the test says.

    `answer(request, socket)` writes what it likes; the connection ends when it returns, unless `keep`.
    """

    def __init__(self, server: Identity, answer: Answer, *, keep: bool = False) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._answer = answer
        self._keep = keep
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(server.certificate, server.key)
        self._context.load_verify_locations(server.ca)
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def __enter__(self) -> LyingServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._listener.close()

    def _run(self) -> None:
        while not self.ended.is_set():
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        try:
            with self._context.wrap_socket(raw, server_side=True) as sock:
                self.connections += 1
                while True:
                    request = b""
                    while not request.endswith(b"\r\n\r\n"):
                        piece = sock.recv(4096)
                        if not piece:
                            return
                        request += piece
                    self.requests.append(request)
                    self._answer(request, sock)
                    if not self._keep:
                        return
        except OSError:
            return  # the client left, which is what many of these tests want of it
