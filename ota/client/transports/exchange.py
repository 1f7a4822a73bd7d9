"""One HTTP request over a connection of `http.client`, and what its answer, or its absence, means.

Blocking, in a thread; `abandon` alone is called from elsewhere. Not here: connections and who waits (`https`).
Invariants: never more of a body is read than was asked for; an answer that is encoded, redirected, of another range or
longer than wanted is refused with a reason.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from ota import brokertls
from ota.client.transports.address import Address
from ota.client.transports.layout import Place
from ota.errors import OtaError, Reason, TransferError, TrustError

if TYPE_CHECKING:
    from http.client import HTTPResponse, HTTPSConnection

# a server without ranges sends the whole payload for every block: borne for small ones
_WHOLE_MAX_BYTES = 1 << 20
_CHUNK_BYTES = 64 << 10
_RANGE = re.compile(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15}|\*)")
_SERVER = {
    Reason.BROKER_UNREACHABLE: Reason.SOURCE_UNREACHABLE,
    Reason.BROKER_NOT_YET_VALID: Reason.SERVER_NOT_YET_VALID,
    Reason.BROKER_REFUSED: Reason.SERVER_REFUSED,
}


@dataclass(frozen=True, slots=True)
class Waits:
    """How long what may last.

    Attributes:
        connect_s: reaching the server, and the TLS handshake.
        silence_s: between two pieces of an answer.
        whole_s: one request.
        idle_s: a connection nobody uses is closed after it.
    """

    connect_s: float = 10.0
    silence_s: float = 15.0
    whole_s: float = 60.0
    idle_s: float = 20.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file, or `length` bytes of one from `offset` on; with `whole`, `length` bounds the file."""

    place: Place
    offset: int
    length: int
    whole: bool

    @property
    def name(self) -> str:
        return "/".join(self.place)


class Stale(Exception):
    """The server closed the connection before it answered; the cause says how."""


class Exchange:
    """One request and its answer, in a thread; `abandon` may be called from another."""

    def __init__(self, address: Address, wanted: Wanted, waits: Waits) -> None:
        self._address = address
        self._wanted = wanted
        self._due_s = time.monotonic() + waits.whole_s
        self._lock = threading.Lock()
        self._connection: HTTPSConnection | None = None
        self._abandoned = False

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._abandoned

    def hold(self, connection: HTTPSConnection | None) -> None:
        """Note what `abandon` has to interrupt."""
        with self._lock:
            self._connection = connection
            if self._abandoned and connection is not None:
                raise self.silence()

    def abandon(self) -> None:
        """Nobody waits for the answer any more: wake the thread that does."""
        with self._lock:
            self._abandoned = True
            sock = None if self._connection is None else self._connection.sock
            if sock is not None:
                try:
                    # not SSLSocket's own, which would drop the encryption under the reader's feet
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
                except OSError:
                    pass  # it is closed already

    def silence(self) -> TransferError:
        """The error of an answer that did not come in time."""
        return TransferError(
            Reason.TRANSFER_TIMEOUT, f"{self._address} does not answer for {self._wanted.name}", retry=True
        )

    def run(self, connection: HTTPSConnection) -> tuple[bytes, bool]:
        """The body, and whether the connection can be used again.

        Raises:
            TransferError, TrustError: what the answer, or its absence, means.
        """
        from http.client import HTTPException

        self.hold(connection)
        try:
            response = self._ask(connection)
            body = self._body(response)
            # a connection whose answer was not read to its end is of no use
            whole = response.isclosed() or response.length == 0
            response.close()
            return body, whole and not response.will_close
        except TimeoutError as e:
            raise self.silence() from e
        except (OSError, HTTPException) as e:
            if isinstance(e, ssl.SSLError) and "ALERT" in str(e.reason or ""):
                raise connect_failure(e, self._address) from e
            raise TransferError(
                Reason.SOURCE_UNREACHABLE,
                f"{self._address}: the answer for {self._wanted.name} broke off: {str(e)[:100] or type(e).__name__}",
                retry=True,
            ) from e
        finally:
            self.hold(None)

    def _ask(self, connection: HTTPSConnection) -> HTTPResponse:
        from http.client import RemoteDisconnected

        wanted = self._wanted
        headers = {"Accept-Encoding": "identity", "User-Agent": "edge-agent"}
        if not wanted.whole:
            headers["Range"] = f"bytes={wanted.offset}-{wanted.offset + wanted.length - 1}"
        try:
            connection.request("GET", quote(f"{self._address.path}/{wanted.name}", safe="/%"), headers=headers)
            return connection.getresponse()
        except (RemoteDisconnected, ConnectionError, ssl.SSLEOFError) as e:
            raise Stale from e

    def _body(self, response: HTTPResponse) -> bytes:
        wanted, status = self._wanted, response.status
        if (response.getheader("Content-Encoding") or "identity") != "identity":
            raise self._corrupt("is encoded although that was not asked for")
        if status == 200 and wanted.whole:
            return self._read(response, wanted.length)
        if status == 206 and not wanted.whole:
            self._check_range(response)
            return self._read(response, wanted.length)
        if status == 200:
            return self._cut_out(response)
        raise self._status(response)

    def _read(self, response: HTTPResponse, limit: int) -> bytes:
        """The whole body, of at most `limit` bytes."""
        if response.length is not None and response.length > limit:
            raise self._too_long(response.length)
        pieces, got = [], 0
        while piece := response.read1(min(_CHUNK_BYTES, limit + 1 - got)):
            pieces.append(piece)
            got += len(piece)
            if got > limit:
                raise self._too_long(got)
            if time.monotonic() > self._due_s:
                raise self.silence()
        if response.length:
            raise self._corrupt(f"ends {response.length} bytes early")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _check_range(self, response: HTTPResponse) -> None:
        wanted = self._wanted
        match = _RANGE.fullmatch(response.getheader("Content-Range") or "")
        if match is None:
            raise self._corrupt("has no range, or several")
        first, last = int(match[1]), int(match[2])
        if first != wanted.offset or not first <= last < wanted.offset + wanted.length:
            raise self._corrupt(f"is the range {first}-{last}, which was not asked for")

    def _cut_out(self, response: HTTPResponse) -> bytes:
        """The range out of the whole file, from a server that knows no ranges."""
        wanted = self._wanted
        if response.length is None or response.length > _WHOLE_MAX_BYTES:
            raise TransferError(
                Reason.SERVER_REFUSED,
                f"{self._address} sends all of {wanted.name} instead of a range",
                hint="the web server must support byte ranges",
            )
        return self._read(response, _WHOLE_MAX_BYTES)[wanted.offset : wanted.offset + wanted.length]

    def _status(self, response: HTTPResponse) -> OtaError:
        status, name = response.status, self._wanted.name
        if status in (404, 410, 416):
            return TransferError(Reason.NOT_FOUND, f"{self._address} has no {name}")
        if status >= 500 or status == 429:
            return TransferError(
                Reason.SOURCE_UNREACHABLE,
                f"{self._address} answers {status} for {name}",
                hint="see the web server's log",
                retry=True,
            )
        if 300 <= status < 400:
            return TransferError(
                Reason.SERVER_REFUSED,
                f"{self._address} redirects {name}, which is not followed",
                hint="set update.https to where the files really are",
            )
        return TransferError(
            Reason.SERVER_REFUSED,
            f"{self._address} refuses {name}: {status}",
            hint="does the web server accept certificates of the enrolled authority?",
        )

    def _too_long(self, length: int) -> OtaError:
        if self._wanted.whole:
            return TrustError(
                Reason.METADATA_TOO_LARGE,
                f"{self._wanted.name} has {length} bytes or more, {self._wanted.length} are allowed",
            )
        return self._corrupt(f"has {length} bytes or more, {self._wanted.length} were asked for")

    def _corrupt(self, what: str) -> TransferError:
        return TransferError(
            Reason.TRANSFER_CORRUPT, f"{self._address}: the answer for {self._wanted.name} {what}", retry=True
        )


def connect_failure(error: OSError, address: Address) -> TransferError:
    """What `error`, raised while connecting, says about the server; told like a broker's."""
    known = brokertls.connect_failure(error, address.host, address.port)
    reason = _SERVER.get(known.reason, Reason.SERVER_UNTRUSTED)
    message, hint = (text.replace("broker", "server") for text in (known.message, known.hint))
    return TransferError(reason, message, hint=hint, retry=known.retry)
