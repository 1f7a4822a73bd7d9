"""One connection of the enrolment listener: one request read within bounds, one answer in JSON, and the end.

What the answer is, is not decided here (`listener.Registrar`). Invariants: a bounded number of bytes is read, of the
head as of the body; whatever they hold, a refusal is one reason and hint, and one line for the operator, in which a
stranger cannot begin a line of his own.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any, BinaryIO

from ota import enrolment
from ota.errors import OtaError, PublishError, Reason

Answer = Callable[[str, str, str, bytes], dict[str, Any]]

_STATUS = {
    Reason.TOKEN_UNKNOWN: 403,
    Reason.TOKEN_USED: 403,
    Reason.TOKEN_EXPIRED: 403,
    Reason.TOKEN_OTHER_DEVICE: 403,
    Reason.BAD_PROOF: 403,
    Reason.DEVICE_REVOKED: 403,
    Reason.CERTIFICATE_EXPIRED: 403,
    Reason.UNKNOWN_DEVICE: 404,
    Reason.NOT_FOUND: 404,
    Reason.DEVICE_EXISTS: 409,
    Reason.TOO_MANY_ATTEMPTS: 429,
    Reason.BUSY: 503,
    Reason.KEY_MISSING: 503,
    Reason.IO_ERROR: 503,
    Reason.NO_SPACE: 503,
    Reason.STATE_CORRUPT: 503,
}
# the library alone would take a hundred lines of 64 KiB before it asks anybody
_MAX_HEAD_BYTES = 16 * 1024
_THROWN_AWAY_BYTES = 256 * 1024


def refusal(error: OtaError) -> dict[str, Any]:
    """An error as a device reads it."""
    return {
        "version": enrolment.VERSION,
        "error": error.reason.value,
        "message": error.message,
        "hint": error.hint,
        "retry": error.retry,
    }


class _Bounded:
    """A stream of which no more than `left` bytes are read: what comes then counts as its end."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self._file = file
        self.left = left

    def readline(self, limit: int) -> bytes:
        return self._taken(self._file.readline(min(limit, self.left)))

    def read(self, length: int) -> bytes:
        return self._taken(self._file.read(min(length, self.left)))

    def close(self) -> None:
        self._file.close()

    def _taken(self, data: bytes) -> bytes:
        self.left -= len(data)
        return data


class Conversation(BaseHTTPRequestHandler):
    """A connection, from its making to its end.

    Args:
        answer: takes the peer's address, method, path and body; raises OtaError to refuse.
        say: takes one line for the operator.
    """

    protocol_version = "HTTP/1.0"
    server_version, sys_version = "edge-ota", ""

    def __init__(self, sock: ssl.SSLSocket, address: Any, answer: Answer, say: Callable[[str], None]) -> None:
        self._answer = answer
        self._say = say
        super().__init__(sock, address, None)  # type: ignore[arg-type]

    def setup(self) -> None:
        """Bound what is read."""
        super().setup()
        self._bounded = _Bounded(self.rfile, _MAX_HEAD_BYTES)  # type: ignore[arg-type]
        self.rfile = self._bounded  # type: ignore[assignment]

    def parse_request(self) -> bool:
        """Whether there is a request to answer, its head read to the end."""
        if not super().parse_request():
            return False
        if not self._bounded.left:
            self.send_error(431, "its head is too long")
            return False
        return True

    def do_GET(self) -> None:
        """See `listener.Registrar`."""
        self._reply(b"")

    def do_POST(self) -> None:
        """See `listener.Registrar`."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 9):
            self._refuse(PublishError(Reason.BAD_REQUEST, "a request needs a Content-Length", hint="update the agent"))
        elif int(length) > enrolment.MAX_BODY_BYTES:
            too_large = f"{length} bytes, more than the {enrolment.MAX_BODY_BYTES} allowed"
            # read and thrown away, as far as it is worth it: who is still sending does not hear an answer
            self._body(min(int(length), _THROWN_AWAY_BYTES))
            self._refuse(PublishError(Reason.BAD_REQUEST, too_large, hint="update the agent"))
        else:
            self._reply(self._body(int(length)))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses by itself."""
        # a method that is none is in `message`, cut and quoted
        self.command, self.path = "", getattr(self, "path", "")
        # a first line that is none would otherwise be answered without a status, as HTTP once was
        self.request_version = self.protocol_version
        what = f"not a request of this listener ({code}: {(message or '')[:80]!r})"
        self._refuse(PublishError(Reason.BAD_REQUEST, what, hint="is this the enrolment listener's URL?"))

    def log_message(self, format: str, *args: Any) -> None:
        """What is worth telling is told in `_refuse`."""

    def _body(self, length: int) -> bytes:
        self._bounded.left = length
        return self.rfile.read(length)

    def _reply(self, body: bytes) -> None:
        try:
            answer = self._answer(self.client_address[0], self.command, self.path, body)
        except OtaError as e:
            self._refuse(e)
        else:
            self._send(200 if "error" not in answer else 403, answer)

    def _refuse(self, error: OtaError) -> None:
        self._say(f"{self.client_address[0]} {self.command} {self.path[:40]!r}: {error.message} [{error.reason.value}]")
        self._send(_STATUS.get(error.reason, 400), refusal(error))

    def _send(self, status: int, fields: Mapping[str, Any]) -> None:
        data = json.dumps(fields).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
