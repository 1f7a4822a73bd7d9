"""The block server: answers requests of devices for metadata, targets and payload blocks over MQTT.

Stateless towards devices: any number of servers share the requests through the broker's shared subscription, and one
may die at any moment; devices ask again. It signs nothing and decides nothing.
Invariants: an answer goes only into the tree of the device whose request it answers (the broker's ACL vouches for the
device in the topic; a Response Topic is never looked at); a request is checked completely before anything is opened;
what one device may ask for is bounded; an unreadable repository answers nothing, because silence is repairable.
"""

from __future__ import annotations

import collections
import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ota import blocks
from ota.blocks import Header, Item, Request, Status
from ota.brokertls import client_context
from ota.errors import OtaError
from ota.mailbox import Connected, Event, Inbox, Lost, Message, Received, Sent, Subscribed
from ota.mqtt import Limits, Mqtt, Reconnect, ReconnectPolicy, Settings, Subscription, Tls
from ota.pace import TokenBucket
from ota.release import DEVICE_PATTERN

REQUEST_FILTER = "$share/ota/edge/v1/+/+/blk/get"
_ANSWER_EXPIRY_S = 60
_QUOTA_COST_BYTES = 1024
_LARGEST_PACKET_BYTES = 1 << 28
# requests have 1 KiB at most; what one device makes the broker pass on must not keep the others waiting
_LARGEST_REQUEST_PACKET_BYTES = 4096
# a PUBLISH packet around payload, tenant and device: fixed header 5, topic 26, properties 8 + 23 + 18 + 76, rounded up
_ENVELOPE_BYTES = 176


class Source(Protocol):
    """Where answers come from; `ota.publisher.repository.Repository` is one.

    Every name given is from outside and must be checked again by the source. None means "there is none"; a fault of
    its own (a disk that cannot be read) is raised as `OtaError`.
    """

    def read_metadata(self, role: str, version: int | None) -> bytes | None:
        """One metadata document."""
        ...

    def read_desired(self, device: str) -> bytes | None:
        """What the director wants `device` to run."""
        ...

    def read_target(self, path: str, sha256: str) -> bytes | None:
        """One target file."""
        ...

    def open_payload(self, sha256: str) -> tuple[int, int] | None:
        """Descriptor, which the caller closes, and length of a sealed payload."""
        ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one server spends.

    Attributes:
        device_bytes_per_s, device_burst_bytes: what one device is served at most; what is above is not answered.
        devices: devices whose use is remembered.
        open_payloads: descriptors kept open.
        cached_bytes: documents of a fixed version kept in memory.
    """

    device_bytes_per_s: float = 64e6
    device_burst_bytes: float = 64e6
    devices: int = 10_000
    open_payloads: int = 32
    cached_bytes: int = 16 * 1024 * 1024


@dataclass(slots=True)
class Served:
    """What a server did; every number only grows. `last_fault` is the last trouble with the repository itself."""

    answers: int = 0
    answer_bytes: int = 0
    not_found: int = 0
    refused: int = 0
    over_quota: int = 0
    malformed: int = 0
    unsent: int = 0
    faults: int = 0
    last_fault: str = ""


class BlockServer:
    """Turns one request into one answer.

    Args:
        source: the repository.
        tenant: the only tenant it answers.
        clock: monotonic seconds.

    Attributes:
        max_packet_bytes: largest packet that the broker takes; no answer is larger.
    """

    def __init__(
        self, source: Source, tenant: str, *, clock: Callable[[], float], bounds: Bounds | None = None
    ) -> None:
        self._source = source
        self._tenant = tenant
        self._clock = clock
        self._bounds = bounds or Bounds()
        self._quota: collections.OrderedDict[str, TokenBucket] = collections.OrderedDict()
        self._payloads: collections.OrderedDict[str, tuple[int, int]] = collections.OrderedDict()
        self._documents: collections.OrderedDict[Item, tuple[bytes, str]] = collections.OrderedDict()
        self._cached_bytes = 0
        self.max_packet_bytes = _LARGEST_PACKET_BYTES
        self.served = Served()

    def answer(self, received: Received) -> Message | None:
        """The answer to a message from `blk/get`; None where none is due."""
        device = self._device(received.topic)
        if device is None:
            self.served.malformed += 1
            return None
        try:
            request = blocks.parse_request(received.payload)
        except OtaError:
            self.served.malformed += 1
            rid = blocks.request_id(received.payload)
            if rid is None or not self._within_quota(device, 0):
                return None
            return self._message(device, Header(rid, 0, 0), Status.REFUSED, b"", "")
        if not self._within_quota(device, request.length):
            return None
        try:
            return self._look_up(device, request)
        except (OtaError, OSError) as e:
            # not "not found": that is an answer a device acts on
            self.served.faults += 1
            self.served.last_fault = f"{type(e).__name__}: {e}"
            return None

    def close(self) -> None:
        """Close the descriptors."""
        for fd, _ in self._payloads.values():
            os.close(fd)
        self._payloads.clear()

    def _device(self, topic: str) -> str | None:
        levels = topic.split("/")
        if len(levels) != 6 or levels[:3] != ["edge", "v1", self._tenant] or levels[4:] != ["blk", "get"]:
            return None
        return levels[3] if DEVICE_PATTERN.fullmatch(levels[3]) else None

    def _within_quota(self, device: str, length: int) -> bool:
        bucket = self._quota.get(device)
        if bucket is None:
            bucket = self._quota[device] = TokenBucket(self._bounds.device_bytes_per_s, self._bounds.device_burst_bytes)
            if len(self._quota) > self._bounds.devices:
                self._quota.popitem(last=False)
        self._quota.move_to_end(device)
        if bucket.take(_QUOTA_COST_BYTES + length, self._clock()):
            return True
        self.served.over_quota += 1
        return False

    def _look_up(self, device: str, request: Request) -> Message:
        if isinstance(request.item, blocks.Blob):
            return self._block(device, request, request.item.sha256)
        document = self._document(device, request.item)
        if document is None:
            self.served.not_found += 1
            return self._message(device, Header(request.rid, request.offset, 0), Status.NOT_FOUND, b"", "")
        content, digest = document
        header = Header(request.rid, request.offset, len(content))
        if request.max_bytes is None or len(content) > request.max_bytes:
            self.served.refused += 1
            return self._message(device, header, Status.TOO_LARGE, b"", "")
        part = content[request.offset : request.offset + min(request.length, self._room(device))]
        return self._message(device, header, Status.OK, part, digest)

    def _document(self, device: str, item: Item) -> tuple[bytes, str] | None:
        if item in self._documents:
            self._documents.move_to_end(item)
            return self._documents[item]
        fixed = False
        match item:
            case blocks.Metadata(role, version):
                content = self._source.read_metadata(role, version)
                fixed = version is not None
            case blocks.Target(path, sha256):
                content = self._source.read_target(path, sha256)
                fixed = True
            case _:
                content = self._source.read_desired(device)
        if content is None:
            return None
        document = (content, hashlib.sha256(content).hexdigest())
        if fixed:
            self._remember(item, document)
        return document

    def _remember(self, item: Item, document: tuple[bytes, str]) -> None:
        self._documents[item] = document
        self._cached_bytes += len(document[0])
        while self._cached_bytes > self._bounds.cached_bytes and self._documents:
            _, (content, _) = self._documents.popitem(last=False)
            self._cached_bytes -= len(content)

    def _block(self, device: str, request: Request, sha256: str) -> Message:
        payload = self._payload(sha256)
        if payload is None:
            self.served.not_found += 1
            return self._message(device, Header(request.rid, request.offset, 0), Status.NOT_FOUND, b"", "")
        fd, total = payload
        header = Header(request.rid, request.offset, total)
        if request.offset >= total:
            # a device asks within the signed length: what lies here is no longer what was sealed
            self.served.not_found += 1
            return self._message(device, header, Status.NOT_FOUND, b"", "")
        room = self._room(device)
        if request.length > room:
            self.served.refused += 1
            return self._message(device, Header(request.rid, request.offset, room), Status.TOO_LARGE, b"", "")
        block = os.pread(fd, request.length, request.offset)
        return self._message(device, header, Status.OK, block, "")

    def _room(self, device: str) -> int:
        """Bytes of payload that fit into one packet to `device`."""
        return max(0, self.max_packet_bytes - _ENVELOPE_BYTES - len(self._tenant) - len(device))

    def _payload(self, sha256: str) -> tuple[int, int] | None:
        opened = self._payloads.get(sha256)
        if opened is None:
            opened = self._source.open_payload(sha256)
            if opened is None:
                return None
            self._payloads[sha256] = opened
            if len(self._payloads) > self._bounds.open_payloads:
                _, (fd, _) = self._payloads.popitem(last=False)
                os.close(fd)
        self._payloads.move_to_end(sha256)
        return opened

    def _message(self, device: str, header: Header, status: Status, payload: bytes, digest: str) -> Message:
        self.served.answers += 1
        self.served.answer_bytes += len(payload)
        user = ((blocks.STATUS_KEY, status.value),)
        return Message(
            f"edge/v1/{self._tenant}/{device}/blk/data",
            payload,
            qos=0,
            expiry_s=_ANSWER_EXPIRY_S,
            correlation=header.encode(),
            user=(*user, (blocks.DIGEST_KEY, digest)) if digest else user,
            purpose="blocks",
        )


def run(
    repository: Source,
    *,
    host: str,
    port: int,
    tls: Tls,
    tenant: str,
    client_id: str,
    bounds: Bounds | None = None,
    report: Callable[[str], None] | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status 0. Lost connections are waited out.

    Args:
        tls: identity of this server; every server process needs one of its own, because the broker makes the
            certificate's name the client id and one client id has one connection.
        client_id: that name.
        report: takes one line for every change of the connection; standard error by default.

    Raises:
        BrokerError: `broker_tls` when the TLS files cannot be used; nothing else ends it.
    """
    client_context(tls)
    say = report or _to_stderr
    inbox = Inbox(limit_messages=4096, limit_bytes=4 * 1024 * 1024)
    settings = Settings(
        host,
        port,
        tls,
        client_id,
        subscriptions=(Subscription(REQUEST_FILTER, qos=0),),
        limits=Limits(
            max_packet_bytes=_LARGEST_REQUEST_PACKET_BYTES,
            outbox_messages=4096,
            outbox_bytes=64 * 1024 * 1024,
            unsent_bytes=0,
        ),
    )
    # a server is one of few and people wait for it: it comes back sooner than a fleet's devices
    reconnect = Reconnect(ReconnectPolicy(first_s=1.0, longest_s=30.0), random.Random())
    mqtt = Mqtt(settings, inbox, reconnect=reconnect, clock=time.monotonic)
    server = BlockServer(repository, tenant, clock=time.monotonic, bounds=bounds)
    stopping: list[int] = []
    former = {number: signal.signal(number, lambda n, _: stopping.append(n)) for number in _STOP_SIGNALS}
    mqtt.start()
    try:
        while not stopping:
            mqtt.start()  # only if its thread should have died
            event = inbox.get(0.5)
            _take(server, event, mqtt, say)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        mqtt.close()
        server.close()
        served = server.served
        say(f"stopped: {served.answers} answers, {served.answer_bytes} bytes, {served.not_found} not found")
    return 0


def _take(server: BlockServer, event: Event | None, mqtt: Mqtt, say: Callable[[str], None]) -> None:
    """Answer a request, or say what became of the connection."""
    settings = mqtt.settings
    where = f"{settings.host}:{settings.port}"
    if isinstance(event, Connected):
        server.max_packet_bytes = event.max_packet_bytes
    elif isinstance(event, Received):
        _answer(server, event, mqtt, say)
    elif isinstance(event, Subscribed) and event.refused:
        say(f"{where} refuses the subscription: may {settings.client_id} read requests? See the broker's ACL")
    elif isinstance(event, Subscribed):
        say(f"connected to {where} as {settings.client_id}")
    elif isinstance(event, Lost):
        say(f"{event.error.reason.value}: {event.error.message}; next attempt in {event.retry_in_s:.1f} s")


def _answer(server: BlockServer, event: Received, mqtt: Mqtt, say: Callable[[str], None]) -> None:
    fault = server.served.last_fault
    answer = server.answer(event)
    if answer is not None and mqtt.publish(answer) is not Sent.QUEUED:
        server.served.unsent += 1
    if server.served.last_fault != fault:
        say(f"cannot read the repository: {server.served.last_fault}")


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _to_stderr(line: str) -> None:
    print(f"edge-ota serve: {line}", file=sys.stderr, flush=True)
