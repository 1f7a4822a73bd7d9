"""A repository behind any web server that knows byte ranges, over mutual TLS, as a transport.

Files lie where FORMAT.md §1 says, below one URL; nothing on the server is ours. A few threads with one kept-alive
connection each do the blocking work of `http.client`, which is imported by the first request.
Not here: whether the bytes are right (the caller checks them against signed values), when to ask (`fetch`).
Invariants: only `https`, only with the device's certificate and only to a server of the enrolled authority; no proxy
and no redirect is followed; never more is read than was asked for; every request ends within `Waits.whole_s`;
cancelling one ends its connection, not the transport.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ota import brokertls
from ota.brokertls import Tls
from ota.client.transports import layout
from ota.client.transports.address import Address
from ota.client.transports.exchange import Exchange, Stale, Waits, Wanted, connect_failure
from ota.client.transports.threads import Threads
from ota.errors import BrokerError, Reason, TransferError

if TYPE_CHECKING:
    from http.client import HTTPSConnection


@dataclass(slots=True)
class Counts:
    """Requests answered, bytes of their bodies, connections made; every number only grows."""

    answers: int = 0
    body_bytes: int = 0
    connections: int = 0


class HttpsTransport:
    """Implements `ota.client.ports.Transport` over a web server.

    Args:
        device: id of this device, whose desired.json is read.
        tls: the files to connect with, asked for at every new connection, so that a renewed certificate is used.
        connections: requests that run at once.
    """

    name = "https"

    def __init__(
        self, address: Address, device: str, tls: Callable[[], Tls], *, connections: int = 8, waits: Waits | None = None
    ) -> None:
        self._address = address
        self._desired = layout.desired_place(device)
        self._tls = tls
        self._connections = connections
        self._waits = waits or Waits()
        self._threads: Threads | None = None
        self._lock = threading.Lock()
        self._idle: list[HTTPSConnection] = []
        self._used_s = 0.0
        self._closer: asyncio.TimerHandle | None = None
        self.counts = Counts()

    @property
    def address(self) -> Address:
        """Where the repository is."""
        return self._address

    async def metadata(self, role: str, version: int | None, max_bytes: int) -> bytes:
        """One metadata document; see `Transport`."""
        return await self._get(Wanted(layout.metadata_place(role, version), 0, max_bytes, whole=True))

    async def desired(self, max_bytes: int) -> bytes:
        """This device's desired document; see `Transport`."""
        return await self._get(Wanted(self._desired, 0, max_bytes, whole=True))

    async def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """One target file; see `Transport`."""
        return await self._get(Wanted(layout.target_place(path, sha256), 0, max_bytes, whole=True))

    async def block(self, sha256: str, offset: int, length: int) -> bytes:
        """At most `length` bytes at `offset` of a payload; see `Transport`."""
        return await self._get(Wanted(layout.payload_place(sha256), offset, length, whole=False))

    def close(self) -> None:
        """Close the connections nobody uses and let the threads end; the transport stays usable, and what is under way
        or waits for a thread goes on."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.close()
        for connection in self._take_idle():
            connection.close()

    async def _get(self, wanted: Wanted) -> bytes:
        loop = asyncio.get_running_loop()
        if self._threads is None:
            self._threads = Threads(self._connections, "https")
        exchange = Exchange(self._address, wanted, self._waits)
        try:
            async with asyncio.timeout(self._waits.whole_s):
                body = await self._threads.run(functools.partial(self._run, exchange))
        except TimeoutError as e:
            raise exchange.silence() from e
        finally:
            exchange.abandon()
            self._used_s = loop.time()
            if self._closer is None:
                self._closer = loop.call_later(self._waits.idle_s, self._close_idle)
        self.counts.answers += 1
        self.counts.body_bytes += len(body)
        return body

    def _close_idle(self) -> None:
        self._closer = None
        loop = asyncio.get_running_loop()
        left_s = self._used_s + self._waits.idle_s - loop.time()
        if left_s > 0:
            self._closer = loop.call_later(left_s, self._close_idle)
        else:
            self.close()

    # --- threads -----------------------------------------------------------------------------------------------------

    def _run(self, exchange: Exchange) -> bytes:
        """One request, on a kept connection if one still stands."""
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        if kept is not None:
            try:
                return self._over(exchange, kept)
            except Stale:
                pass  # the server closed it meanwhile, which it may at any time
        made = self._connect(exchange)
        if exchange.abandoned:
            # where connecting takes longer than anybody waits for an answer, the next one finds it done
            self._keep(made)
            raise exchange.silence()
        try:
            return self._over(exchange, made)
        except Stale as e:
            cause = e.__cause__
            text = str(cause) or type(cause).__name__
            raise TransferError(
                Reason.SOURCE_UNREACHABLE, f"{self._address}: the server ended the connection: {text}", retry=True
            ) from cause

    def _over(self, exchange: Exchange, connection: HTTPSConnection) -> bytes:
        reusable = False
        try:
            body, reusable = exchange.run(connection)
            return body
        finally:
            if reusable:
                self._keep(connection)
            else:
                connection.close()

    def _keep(self, connection: HTTPSConnection) -> None:
        with self._lock:
            self._idle.append(connection)

    def _connect(self, exchange: Exchange) -> HTTPSConnection:
        from http.client import HTTPSConnection

        address = self._address
        try:
            context = brokertls.client_context(self._tls())
            connection = HTTPSConnection(address.host, address.port, timeout=self._waits.connect_s, context=context)
            exchange.hold(connection)
            connection.connect()
        except BrokerError as e:
            raise TransferError(Reason.SERVER_UNTRUSTED, e.message, hint=e.hint) from e
        except OSError as e:
            raise connect_failure(e, address) from e
        connection.sock.settimeout(self._waits.silence_s)
        self.counts.connections += 1
        return connection

    def _take_idle(self) -> list[HTTPSConnection]:
        with self._lock:
            idle, self._idle = self._idle, []
        return idle
