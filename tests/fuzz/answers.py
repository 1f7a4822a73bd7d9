"""What a web server or an enrolment listener answers, byte for byte, to the code that asked it."""

from __future__ import annotations

import http.client
import io
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

from agent.daemon import registrar
from ota import enrolment
from ota.client.transports.address import Address
from ota.client.transports.exchange import Exchange, Stale, Waits, Wanted
from ota.errors import Reason, TransferError
from tests.fuzz import known_keys
from tests.fuzz.engine import CORPUS, Parser

LENGTH = 4096


class _Socket:
    """Takes every request and answers with the same bytes."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._answer)

    def sendall(self, data: bytes) -> None:
        pass

    def close(self) -> None:
        pass


class _Connection(http.client.HTTPConnection):
    def __init__(self, answer: bytes) -> None:
        super().__init__("server.example")
        self._answer = answer
        self.connect()

    def connect(self) -> None:
        self.sock: Any = _Socket(self._answer)


def read_document(data: bytes) -> object:
    wanted = Wanted(("metadata", "timestamp.json"), 0, LENGTH, whole=True)
    return _exchanged(data, wanted)


def read_block(data: bytes) -> object:
    wanted = Wanted(("payloads", "a" * 64), LENGTH, LENGTH, whole=False)
    return _exchanged(data, wanted)


def _exchanged(data: bytes, wanted: Wanted) -> object:
    try:
        body, _ = Exchange(Address("server.example", 443, ""), wanted, Waits()).run(_Connection(data))  # type: ignore[arg-type]
    except Stale as e:
        # its caller makes another connection, and says this when that ends so too
        raise TransferError(Reason.SOURCE_UNREACHABLE, "the server ended the connection") from e
    assert len(body) <= LENGTH
    return body


def read_answer(ask: Callable[[registrar.Server], object]) -> Callable[[bytes], object]:
    def parse(data: bytes) -> object:
        connection = mock.Mock(side_effect=lambda *_, **__: _Connection(data))
        with mock.patch.object(registrar.http.client, "HTTPSConnection", connection):
            return ask(registrar.Server("server.example", 8884, ""))

    return parse


def kept_ca() -> str:
    """The authority of the kept bundle; signing it again would give another certificate."""
    return str(json.loads((CORPUS / "bundle" / "valid-bundle.json").read_text())["ca"])


def _fetch_ca(server: registrar.Server) -> object:
    pem = kept_ca()
    token = enrolment.Token("cam-1", b"s" * enrolment.SECRET_BYTES, enrolment.ca_fingerprint(pem))
    return registrar.fetch_ca(server, token)


def _enroll(server: registrar.Server) -> object:
    return registrar.enroll(server, known_keys.certificates("cam-1")[1], "token", {"version": 1})


def parsers() -> list[Parser]:
    """All of them."""
    return [
        Parser("https-document", read_document, form="bytes", person=True),
        Parser("https-block", read_block, form="bytes", person=True),
        Parser("ca-answer", read_answer(_fetch_ca), form="bytes", person=True),
        Parser("enroll-answer", read_answer(_enroll), form="bytes", person=True),
    ]


# -- valid inputs ------------------------------------------------------------------------------------------------------


def response(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    fields = {"Content-Length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def chunked(body: bytes) -> bytes:
    parts = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:]))
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n"
