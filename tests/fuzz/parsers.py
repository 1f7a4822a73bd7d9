"""Every reader of bytes from outside, as the fuzzer calls it: through the public call that the product uses."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent import config, protocol
from agent.daemon import commands, control, enroll, topics
from agent.daemon.keys import HPKE_KEY, STORAGE_KEY, TLS_KEY, FileKeys
from agent.errors import AgentError
from agent.errors import Reason as AgentReason
from agent.worker import follow, golden, graph
from agent.worker.delegates import tflitefile
from agent.worker.delegates.reference import ReferenceSession
from ota import blocks, delta, payload, release, strictjson
from ota.client import journal
from ota.client.desired import parse_grants, split_path
from ota.client.fsops import Fs
from ota.client.store import Store
from ota.client.transfer import claimed
from ota.client.transports.directory import DirectoryTransport
from ota.client.transports.mqtt import MqttTransport, Waits
from ota.errors import OtaError
from ota.errors import Reason as OtaReason
from ota.publisher import enroll as publisher_enroll
from ota.publisher import settings, spec
from ota.publisher.create import create
from ota.publisher.repository import Repository
from ota.release import LEAF_BYTES, Payload
from tests.crash.memory import MemoryDisk
from tests.fuzz import answers, known_keys, lifecycle, repository
from tests.fuzz.engine import Parser

PLAIN = bytes(range(256)) * 80
BASE = bytes(reversed(range(256))) * 60 + PLAIN[:4000]
KEY = b"k" * 32
CONTEXT = b"fuzz"


@functools.cache
def folder() -> Path:
    """Scratch space of this process, in memory where there is a place for it."""
    memory = Path("/dev/shm")
    made = tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None)
    _keep.append(made)
    return Path(made.name)


_keep: list[tempfile.TemporaryDirectory[str]] = []


def listing(below: Path) -> object:
    """Names and content of everything below a folder."""
    return {str(p.relative_to(below)): p.read_bytes() for p in sorted(below.rglob("*")) if p.is_file()}


def from_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A parser that is given a path."""

    def parse(data: bytes) -> object:
        path = folder() / name
        path.write_bytes(data)
        return read(path)

    return parse


# -- documents ---------------------------------------------------------------------------------------------------------


def read_release(data: bytes) -> object:
    parsed = release.parse(data)
    for component in (*parsed.components, parsed.golden):
        assert component.full.length <= release.MAX_PAYLOAD_BYTES
        assert len(component.full.leaves) == -(-component.full.length // LEAF_BYTES)
    return parsed


def read_names(data: bytes) -> object:
    """Target paths, roles and hashes, down to the file system: a file beside the root is never reached."""
    text = data.decode("utf-8", "surrogateescape")
    root, secret = folder() / "root", folder() / "secret"
    for made in (root / "targets", root / "metadata"):
        made.mkdir(parents=True, exist_ok=True)
    secret.write_bytes(b"secret")
    transport = DirectoryTransport(root, "cam-1")
    first, _, second = text.partition("\n")
    for read in (
        lambda: asyncio.run(transport.target(first, second, 100)),
        lambda: asyncio.run(transport.metadata(first, None, 100)),
        lambda: asyncio.run(transport.block(first, 0, 100)),
        lambda: split_path(first),
    ):
        with contextlib.suppress(OtaError):
            found = read()
            assert found != b"secret", f"{text!r} leaves its folder"
    return release.check_target_name(first)


def read_journal(data: bytes) -> object:
    """The body of a slot under a right checksum, as a later version or a bug might have written it."""
    return journal.decode(b"edge-ota state " + hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


# -- payloads ----------------------------------------------------------------------------------------------------------


def read_payload(data: bytes) -> object:
    out = bytearray(payload.plain_length(len(data)) if len(data) < 1 << 20 else 0)
    chunks = [data[at : at + 4096] for at in range(0, len(data), 4096)]
    return payload.open_into(chunks, KEY, CONTEXT, memoryview(out))


def read_delta(codec: str, base: bytes | None) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        out = bytearray(len(PLAIN) + 32)
        guard = bytes(out[len(PLAIN) :])
        try:
            delta.apply(codec, data, base, memoryview(out)[: len(PLAIN)])
        finally:
            assert out[len(PLAIN) :] == guard, "written beyond the buffer"
        return None

    return read


def read_map(data: bytes) -> object:
    found = claimed(map_payload(), data)
    assert found is None or all(0 <= index < 20 for index in found)
    return found


def map_payload() -> Payload:
    leaves = tuple(hashlib.sha256(bytes([index])).hexdigest() for index in range(20))
    return Payload("a" * 64, 20 * LEAF_BYTES - 1, "raw", "cobblestone-256", "b" * 32, leaves)


PLAIN_SHA256 = hashlib.sha256(PLAIN).hexdigest()


def read_store(data: bytes) -> object:
    disk = MemoryDisk()
    fs = Fs(disk)
    store = Store(fs, KEY, 0)
    fs.write_atomic(f"store/{PLAIN_SHA256}.cbs", [data])
    fd = store.open(PLAIN_SHA256)
    try:
        assert os.pread(fd, len(PLAIN) + 1, 0) == PLAIN
    finally:
        os.close(fd)
    return None


# -- the wire ----------------------------------------------------------------------------------------------------------


def read_answer(data: bytes) -> object:
    """A message on blk/data: 20 bytes of correlation data, a line of user properties, the payload."""
    correlation, rest = data[:20], data[20:]
    line, _, body = rest.partition(b"\n")
    words = line.decode("utf-8", "replace").split(" ")
    user = tuple((word.partition("=")[0], word.partition("=")[2]) for word in words)

    class Link:
        def request(self, asked: bytes) -> bool:
            blocks.parse_request(asked)
            transport.received(correlation, user, body)
            return True

    transport = MqttTransport(Link(), clock=lambda: 0.0, first_rid=7, waits=Waits(0.001, 0.001, 0.001, 1))
    document = asyncio.run(transport.metadata("timestamp", None, 4096))
    assert len(document) <= 4096
    return document


def read_command(data: bytes) -> object:
    verdict = commands.Gate().admit(data, retained=False, wall_s=1_800_000_000, now_s=0.0)
    if isinstance(verdict, commands.Refusal):
        raise AgentError(verdict.reason, verdict.message)
    assert verdict is not None
    return verdict


def read_topic(data: bytes) -> object:
    text = data.decode("utf-8", "replace")
    origin = topics.parse(text)
    if origin is not None:
        assert topics.Topics(origin.tenant, origin.device).of(origin.suffix) == text
    return origin


_REASONS = {reason.value for reason in (*OtaReason, *AgentReason)}


def read_control(data: bytes) -> object:
    """Bytes sent to the control socket; whatever comes back is HTTP, and an error in it has a reason."""

    async def check(fields: Mapping[str, Any]) -> control.Reply:
        return control.json_reply({"heard": len(fields)})

    async def talk() -> bytes:
        path = folder() / "control.sock"
        server = control.ControlServer(path, {"POST /v1/check": check, "GET /v1/status": check})
        await server.start()
        reader, writer = await asyncio.open_unix_connection(str(path))
        try:
            writer.write(data)
            writer.write_eof()
            async with asyncio.timeout(5):
                return await reader.read()
        except ConnectionError:
            return b""  # it hung up while we were still talking
        finally:
            writer.close()
            await server.stop()

    answer = asyncio.run(talk())
    assert not answer or answer.startswith(b"HTTP/1.1 "), answer[:100]
    head, _, body = answer.partition(b"\r\n\r\n")
    if head[9:10] in (b"4", b"5"):
        error = json.loads(body.partition(b"HTTP/1.1 ")[0])
        assert error["reason"] in _REASONS
        assert error["message"]
    return answer


# -- what a person hands over ------------------------------------------------------------------------------------------


@functools.cache
def device_keys() -> FileKeys:
    kept = folder() / "keys"
    kept.mkdir(mode=0o700)
    for name, data in ((TLS_KEY, known_keys.tls_key_pem()), (HPKE_KEY, known_keys.HPKE), (STORAGE_KEY, KEY)):
        (kept / name).write_bytes(data)
        (kept / name).chmod(0o600)
    return FileKeys(kept)


def read_bundle(data: bytes) -> object:
    state = folder() / "state"
    state.mkdir(exist_ok=True)
    return enroll.install(data, device_keys().load(), state)


@functools.cache
def publisher() -> Repository:
    return create(folder() / "publisher")


def read_request(data: bytes) -> object:
    return publisher_enroll.enroll(publisher(), data, host="localhost", port=8883, replace=True)


def read_graph(data: bytes) -> object:
    return graph.parse_graph(strictjson.loads(data, max_bytes=1 << 20, what="graph"))


def read_tflite(data: bytes) -> object:
    return ReferenceSession(tflitefile.read_graph(memoryview(data)))


def documents() -> list[Parser]:
    """Signed documents and what they list."""
    walks = [
        Parser(f"trust-{role}", functools.partial(repository.walk, role), person=True) for role in repository.ROLES
    ]
    return [
        Parser("strictjson", lambda data: strictjson.loads(data, max_bytes=1 << 16, what="text"), person=True),
        *walks,
        Parser("release", read_release, person=True),
        Parser("grants", lambda data: parse_grants(strictjson.loads(data, max_bytes=1 << 18, what="grants"))),
        Parser("names", read_names, form="bytes"),
        Parser("journal", read_journal),
        Parser("graph", read_graph),
        Parser("found", follow.read),
    ]


def payloads() -> list[Parser]:
    """Sealed and encoded bytes."""
    return [
        Parser("payload", read_payload, form="bytes"),
        Parser("delta-zstd", read_delta("zstd", None), form="bytes"),
        Parser("delta-zstd-patch", read_delta("zstd-patch", BASE), form="bytes"),
        Parser("delta-raw", read_delta("raw", None), form="bytes"),
        Parser("map", read_map, form="bytes"),
        Parser("store", read_store, form="bytes"),
        Parser("golden", golden.load_vectors, form="bytes"),
        Parser("tflite", read_tflite, form="bytes", person=True),
    ]


def messages() -> list[Parser]:
    """What arrives over a socket."""
    return [
        Parser("block-request", blocks.parse_request),
        Parser("block-request-id", blocks.request_id),
        Parser("block-answer", read_answer, form="bytes", examples=40),
        Parser("command", read_command),
        Parser("hint", commands.parse_hint),
        Parser("topic", read_topic, form="bytes"),
        Parser("worker-message", protocol.decode),
        Parser("control", read_control, form="bytes", examples=30),
    ]


def files() -> list[Parser]:
    """Files that a person hands over."""
    state, devices = folder() / "state", folder() / "publisher" / "devices"
    return [
        Parser("agent-toml", from_file("agent.toml", config.load), form="toml", person=True),
        Parser("spec-toml", from_file("spec.toml", lambda path: spec.load(path)), form="toml", person=True),
        Parser("repo-toml", settings.parse, form="toml", person=True),
        Parser("bundle", read_bundle, person=True, state=lambda: listing(state)),
        Parser("enroll-request", read_request, person=True, state=lambda: listing(devices), examples=40),
    ]


def all_parsers() -> list[Parser]:
    """Every parser, in a stable order."""
    registry = folder() / "publisher"
    life = lifecycle.parsers(folder(), publisher, lambda: listing(registry))
    return [*documents(), *payloads(), *messages(), *files(), *life, *answers.parsers()]
