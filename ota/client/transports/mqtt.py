"""Metadata and payload blocks over MQTT: small requests out, raw bytes back, matched by request id.

The connection is somebody else's: this module needs a way to publish one request and is handed the answers. Requests
are QoS 0. Those for documents are repeated when silence lasts, for smaller parts each time, because a broker drops what
it finds too large without a word; whether and how a block is asked for again is the transfer's to decide. What was
under way when the connection broke is asked again by the next one.
Invariants: silence is never an answer; an answer nobody waits for, or longer than was asked, is dropped and counted;
answers are not trusted, their bytes are checked by the caller against signed values.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ota import blocks
from ota.blocks import MAX_BLOCK_BYTES, MAX_DOCUMENT_BYTES, Header, Item, Request, Status
from ota.errors import BlockTooLarge, Reason, TransferError

_SMALLEST_PART_BYTES = 4096
_SHRINK = 4


class BlockLink(Protocol):
    """The device's connection, seen from here."""

    def request(self, payload: bytes) -> bool:
        """Publish one request, at most once; False when there is no connection to publish it on. Never blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Waits:
    """How long silence may last.

    Attributes:
        first_s: before the first answer has shown how fast the way is.
        shortest_s, longest_s: bounds of what is learnt from answers.
        attempts: how often a request for a document is sent before the call gives up.
        block_s: longest wait for a block.
        offline_s: longest wait for a connection to ask by; another source may have one.
        shunned_s: after two requests in a row during which nothing at all was heard, nobody is asked for so long; 0
            asks on. Two, because one may be dropped for what it asks for.
    """

    first_s: float = 4.0
    shortest_s: float = 1.0
    longest_s: float = 16.0
    attempts: int = 4
    block_s: float = 20.0
    offline_s: float = 5.0
    shunned_s: float = 0.0


BESIDE_ANOTHER = Waits(longest_s=8.0, attempts=2, block_s=15.0, shunned_s=300.0)
"""Where another source can be asked: one whose servers are all silent may hold up nobody for long, or twice."""


@dataclass(slots=True)
class Counts:
    """What came back that was not used; every number only grows."""

    answers: int = 0
    repeated_requests: int = 0
    unknown: int = 0
    malformed: int = 0
    oversize: int = 0


class AnswerTime:
    """How long to wait for an answer: smoothed time plus four deviations (the rule of RFC 6298), within bounds.

    Times of repeated requests are not learnt (Karn: nobody knows which request was answered); until one is learnt
    again, waits stay doubled.
    """

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        self._smooth_s: float | None = None
        self._deviation_s = 0.0
        self._wait_s = waits.first_s

    @property
    def wait_s(self) -> float:
        """Silence to bear before the first repetition."""
        return self._wait_s

    def learn(self, took_s: float) -> None:
        """An unrepeated request was answered after `took_s`."""
        if self._smooth_s is None:
            self._smooth_s, self._deviation_s = took_s, took_s / 2
        else:
            self._deviation_s += (abs(self._smooth_s - took_s) - self._deviation_s) / 4
            self._smooth_s += (took_s - self._smooth_s) / 8
        self._wait_s = self._bounded(self._smooth_s + 4 * self._deviation_s)

    def silence(self, waited_s: float) -> float:
        """`waited_s` of silence ended; returns how long to wait after the repetition."""
        longer = self._bounded(2 * waited_s)
        self._wait_s = max(self._wait_s, longer)
        return longer

    def _bounded(self, value_s: float) -> float:
        return min(self._waits.longest_s, max(self._waits.shortest_s, value_s))


@dataclass(frozen=True, slots=True)
class _Part:
    payload: bytes
    total: int
    digest: str


@dataclass(slots=True)
class _Pending:
    """A request under way; `published` says whether there was a connection for it, `reconnected` wakes who waits for
    a document."""

    request: Request
    encoded: bytes
    answer: asyncio.Future[_Part]
    reconnected: asyncio.Future[None] | None = None
    published: bool = False
    repeated: bool = False


class MqttTransport:
    """`ota.client.ports.Transport` over a link; not thread-safe, everything happens in one event loop.

    Args:
        link: publishes requests.
        clock: monotonic seconds.
        first_rid: first request id; random, so that answers to a former process are not taken for ours.
    """

    name = "mqtt"

    def __init__(
        self, link: BlockLink, *, clock: Callable[[], float], first_rid: int, waits: Waits | None = None
    ) -> None:
        self._link = link
        self._clock = clock
        self._waits = waits or Waits()
        self._rids = (rid & 0xFFFFFFFF for rid in itertools.count(first_rid))
        self._pending: dict[int, _Pending] = {}
        self._time = AnswerTime(self._waits)
        self._heard_s = -math.inf
        self._unheard = 0
        self._shunned_until_s = -math.inf
        self._part_bytes = MAX_BLOCK_BYTES
        self.counts = Counts()

    def beside_another(self) -> None:
        """There is another source to ask: bear silence for less long, and then leave it to that one for a while."""
        self._waits = BESIDE_ANOTHER
        self._time = AnswerTime(self._waits)

    async def metadata(self, role: str, version: int | None, max_bytes: int) -> bytes:
        """One metadata document; see `Transport`."""
        return await self._document(blocks.Metadata(role, version), max_bytes)

    async def desired(self, max_bytes: int) -> bytes:
        """This device's desired document; see `Transport`."""
        return await self._document(blocks.Desired(), max_bytes)

    async def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """One target file; see `Transport`."""
        return await self._document(blocks.Target(path, sha256), max_bytes)

    async def block(self, sha256: str, offset: int, length: int) -> bytes:
        """At most `length` bytes at `offset` of a payload; see `Transport`."""
        self._check_shunned()
        request = Request(next(self._rids), blocks.Blob(sha256), offset, min(length, MAX_BLOCK_BYTES), None)
        loop = asyncio.get_running_loop()
        pending = _Pending(request, request.encode(), loop.create_future())
        self._pending[request.rid] = pending
        started_s = self._clock()
        pending.published = self._link.request(pending.encoded)
        patience_s = self._waits.block_s if pending.published else self._waits.offline_s
        timer = loop.call_later(patience_s, self._expire, pending, started_s)
        try:
            part = await pending.answer
        finally:
            timer.cancel()
            self._forget(pending)
        if not pending.repeated:
            self._time.learn(self._clock() - started_s)
        return part.payload

    def received(self, correlation: bytes | None, user: tuple[tuple[str, str], ...], payload: bytes) -> None:
        """Take a message that arrived on the device's `blk/data`."""
        header = blocks.parse_header(correlation)
        status = blocks.parse_status(user)
        if header is None or status is None:
            self.counts.malformed += 1
            return
        pending = self._pending.get(header.rid)
        if pending is None or pending.answer.done() or header.offset != pending.request.offset:
            self.counts.unknown += 1
            return
        if len(payload) > pending.request.length:
            self.counts.oversize += 1
            return
        self.counts.answers += 1
        self._heard_s, self._unheard, self._shunned_until_s = self._clock(), 0, -math.inf
        self._settle(pending, header, *status, payload)

    def reconnected(self) -> None:
        """The link lost its connection and has one again: what was asked in between is asked at once."""
        self._unheard, self._shunned_until_s = 0, -math.inf
        for pending in self._pending.values():
            self._repeat(pending)
            if pending.reconnected is not None and not pending.reconnected.done():
                pending.reconnected.set_result(None)

    async def _document(self, item: Item, max_bytes: int) -> bytes:
        """Fetch a document part by part; a document that changed meanwhile is started over once."""
        max_bytes = min(max_bytes, MAX_DOCUMENT_BYTES)
        for _ in range(2):
            parts = [await self._ask(item, 0, min(max_bytes, self._part_bytes), max_bytes)]
            total, digest = parts[0].total, parts[0].digest
            if total > max_bytes:
                raise _too_large(item, total)
            got = len(parts[0].payload)
            while 0 < got < total:
                part = await self._ask(item, got, min(total - got, self._part_bytes), max_bytes)
                if (part.total, part.digest) != (total, digest) or not part.payload:
                    break
                parts.append(part)
                got += len(part.payload)
            document = b"".join(part.payload for part in parts)
            if got == total and hashlib.sha256(document).hexdigest() == digest:
                return document
        raise TransferError(Reason.TRANSFER_CORRUPT, f"{_name(item)} does not arrive in one piece", retry=True)

    async def _ask(self, item: Item, offset: int, length: int, max_bytes: int) -> _Part:
        """Ask for a part of a document, and again when silence lasts."""
        self._check_shunned()
        request = Request(next(self._rids), item, offset, min(length, MAX_BLOCK_BYTES), max_bytes)
        loop = asyncio.get_running_loop()
        pending = _Pending(request, request.encode(), loop.create_future(), loop.create_future())
        self._pending[request.rid] = pending
        try:
            return await self._wait(pending)
        finally:
            self._forget(pending)

    async def _wait(self, pending: _Pending) -> _Part:
        started_s = self._clock()
        pending.published = self._link.request(pending.encoded)
        wait_s = self._time.wait_s if pending.published else self._waits.offline_s
        silences = reconnections = 0
        attempts = 1 if self._unheard else self._waits.attempts
        while silences < attempts and reconnections <= self._waits.attempts:
            either: set[asyncio.Future[Any]] = {pending.answer}
            if pending.reconnected is not None:
                either.add(pending.reconnected)
            await asyncio.wait(either, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if pending.answer.done():
                if not pending.repeated:
                    self._time.learn(self._clock() - started_s)
                return pending.answer.result()
            if pending.reconnected is not None and pending.reconnected.done():
                # it was asked again; the server may need a moment longer than we did to come back
                pending.reconnected = asyncio.get_running_loop().create_future()
                reconnections += 1
                wait_s = self._waits.shortest_s
                continue
            if not pending.published:
                break
            silences += 1
            wait_s = self._time.silence(wait_s)
            if silences < attempts:
                self._shrink(pending)
                self._repeat(pending)
        raise self._unanswered(pending, started_s)

    def _expire(self, pending: _Pending, started_s: float) -> None:
        if not pending.answer.done():
            pending.answer.set_exception(self._unanswered(pending, started_s))

    def _check_shunned(self) -> None:
        if self._clock() < self._shunned_until_s:
            raise TransferError(
                Reason.SOURCE_UNREACHABLE,
                "no block server has answered lately",
                hint="is edge-ota serve running?",
                retry=True,
            )

    def _unanswered(self, pending: _Pending, started_s: float) -> TransferError:
        if pending.published and self._heard_s < started_s and self._waits.shunned_s:
            self._unheard += 1
            if self._unheard > 1:
                self._shunned_until_s = self._clock() + self._waits.shunned_s
        item = _name(pending.request.item)
        if not pending.published:
            return TransferError(
                Reason.SOURCE_UNREACHABLE, f"no connection to the broker to ask for {item}", retry=True
            )
        return TransferError(
            Reason.TRANSFER_TIMEOUT,
            f"no block server answered for {item} at {pending.request.offset}",
            hint="is edge-ota serve running?",
            retry=True,
        )

    def _forget(self, pending: _Pending) -> None:
        del self._pending[pending.request.rid]
        if pending.answer.done() and not pending.answer.cancelled():
            # a cancelled caller never looks at it, and asyncio would complain
            pending.answer.exception()

    def _shrink(self, pending: _Pending) -> None:
        """Repeat a request for less: an answer to the larger one stays welcome."""
        length = max(_SMALLEST_PART_BYTES, min(pending.request.length, self._part_bytes) // _SHRINK)
        if length < pending.request.length:
            self._part_bytes = length
            pending.encoded = replace(pending.request, length=length).encode()

    def _repeat(self, pending: _Pending) -> None:
        pending.repeated = True
        self.counts.repeated_requests += 1
        pending.published = self._link.request(pending.encoded)

    def _settle(self, pending: _Pending, header: Header, status: Status, digest: str, payload: bytes) -> None:
        if status is Status.OK:
            pending.answer.set_result(_Part(payload, header.total, digest))
            return
        item = _name(pending.request.item)
        if status is Status.NOT_FOUND:
            error = TransferError(Reason.NOT_FOUND, f"the publisher has no {item}")
        elif status is Status.TOO_LARGE and isinstance(pending.request.item, blocks.Blob):
            error = BlockTooLarge(f"the broker carries {header.total} bytes of {item} at once", header.total)
        elif status is Status.TOO_LARGE:
            error = _too_large(pending.request.item, header.total)
        else:
            error = TransferError(
                Reason.UNSUPPORTED, f"the block server does not understand a request for {item}", hint="update it"
            )
        pending.answer.set_exception(error)


def _too_large(item: Item, total: int) -> TransferError:
    return TransferError(Reason.METADATA_TOO_LARGE, f"{_name(item)} has {total} bytes, more than asked for")


def _name(item: Item) -> str:
    match item:
        case blocks.Metadata(role, version):
            return role if version is None else f"{version}.{role}"
        case blocks.Desired():
            return "desired.json"
        case blocks.Target(path, _):
            return path
        case blocks.Blob(sha256):
            return f"payload {sha256[:16]}"
