"""HTTP on a unix socket: how the command line and a scraper on the board speak to the daemon.

Access is the socket's file mode, and its group where the board has technicians; there is no TCP port. Who asks is
known to a route as `asker()`. Bodies are small JSON, answers JSON or Prometheus text. An error
is answered as {"reason", "message", "hint"} with the status 4xx or 5xx.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11

from agent.daemon import askers
from agent.daemon.askers import Asker
from agent.errors import AgentError, ControlError, Reason
from ota import strictjson
from ota.errors import OtaError

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 * 1024
# 32 KiB of settings as JSON text, where a character may take several
MAX_BODY_BYTES = 96 * 1024
READ_BYTES = 8192
REQUEST_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 32


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: status, media type and body."""

    status: int
    media_type: str
    body: bytes


def json_reply(value: Any, status: int = 200) -> Reply:
    """`value` as a JSON answer."""
    return Reply(status, "application/json", json.dumps(value, default=str).encode() + b"\n")


def text_reply(text: str) -> Reply:
    """Prometheus text exposition."""
    return Reply(200, "text/plain; version=0.0.4; charset=utf-8", text.encode())


Route = Callable[[Mapping[str, Any]], Awaitable[Reply]]
_asking: contextvars.ContextVar[Asker] = contextvars.ContextVar("asking")


def asker() -> Asker:
    """Who sent the request that the calling route answers."""
    return _asking.get()


class ControlServer:
    """Serves `routes`, keyed by "METHOD /path", on the unix socket `path`; or on `listening`, which somebody else made
    and will remove."""

    def __init__(self, path: Path, routes: Mapping[str, Route], listening: socket.socket | None = None) -> None:
        self._path = path
        self._routes = routes
        self._listening = listening
        self._server: asyncio.Server | None = None
        self._talking: set[asyncio.Task[Any]] = set()

    @property
    def idle(self) -> bool:
        """Whether nobody is connected."""
        return not self._talking

    async def start(self) -> None:
        """Listen; a stale socket file is replaced.

        Raises:
            ControlError: `state_unwritable`.
        """
        if self._listening is not None:
            self._server = await asyncio.start_unix_server(self._serve, sock=self._listening)
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
            self._server = await asyncio.start_unix_server(self._serve, str(self._path))
            self._path.chmod(0o660)
            technicians = askers.group_id(askers.TECHNICIANS)
            if technicians is not None and technicians in os.getgroups():
                os.chown(self._path, -1, technicians)
        except OSError as e:
            raise ControlError(
                Reason.STATE_UNWRITABLE, f"cannot listen on {self._path}: {e.strerror or e}", hint="check run_dir"
            ) from e

    async def stop(self) -> None:
        """Stop listening, remove the socket, and cancel what is being answered."""
        if self._server is not None:
            self._server.close()
            if self._listening is None:
                self._path.unlink(missing_ok=True)
        for task in self._talking:
            task.cancel()
        await asyncio.gather(*self._talking, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._talking) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._talking.add(task)
        try:
            # each connection is a task, so this is seen by its routes alone
            peer: socket.socket = writer.get_extra_info("socket")
            _asking.set(askers.of_peer(peer))
            await self._talk(reader, writer)
        except asyncio.CancelledError:
            return  # its end either way; the streams of Python 3.11 report a cancelled one as an accident
        finally:
            self._talking.discard(task)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        try:
            while True:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    request, body = await _read(connection, reader)
                reply = await self._answer(request, body)
                _write(connection, writer, reply)
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await writer.drain()
                if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                    return
                connection.start_next_cycle()
        except TimeoutError:
            # closing would wait for ever for a peer that does not read
            writer.transport.abort()
        except (ConnectionError, EOFError, h11.LocalProtocolError):
            return
        except h11.RemoteProtocolError as e:
            if connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                _write(connection, writer, _error(Reason.BAD_USAGE.value, str(e), "", e.error_status_hint))
        finally:
            writer.close()

    async def _answer(self, request: h11.Request, body: bytes) -> Reply:
        path = request.target.decode("ascii", "replace").partition("?")[0]
        route = self._routes.get(f"{request.method.decode()} {path}")
        if route is None:
            return _error(Reason.BAD_USAGE.value, f"no such resource: {path[:100]}", "", 404)
        try:
            fields = strictjson.loads(body, max_bytes=MAX_BODY_BYTES, what="request body") if body else {}
            if not isinstance(fields, dict):
                raise ControlError(Reason.BAD_USAGE, "request body: not an object")
            return await route(fields)
        except AgentError as e:
            return _error(e.reason.value, e.message, e.hint, 409)
        except OtaError as e:
            return _error(e.reason.value, e.message, e.hint, 409)


def _error(reason: str, message: str, hint: str, status: int) -> Reply:
    return json_reply({"reason": reason, "message": message, "hint": hint}, status)


async def _read(connection: h11.Connection, reader: asyncio.StreamReader) -> tuple[h11.Request, bytes]:
    """One whole request.

    Raises:
        EOFError: the peer closed.
        h11.RemoteProtocolError: not HTTP, or a body above the limit.
    """
    request: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(READ_BYTES))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_BODY_BYTES:
                raise h11.RemoteProtocolError(f"body above {MAX_BODY_BYTES} bytes", error_status_hint=413)
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            return request, bytes(body)
        else:
            raise EOFError


def _write(connection: h11.Connection, writer: asyncio.StreamWriter, reply: Reply) -> None:
    headers = [("content-type", reply.media_type), ("content-length", str(len(reply.body)))]
    for event in (
        h11.Response(status_code=reply.status, headers=headers),
        h11.Data(data=reply.body),
        h11.EndOfMessage(),
    ):
        data = connection.send(event)
        if data:
            writer.write(data)
