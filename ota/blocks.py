"""Requests and answers of the block exchange over MQTT: what FORMAT.md, section "MQTT blocks", says, in code.

Pure: no connection, no files, no clock. Used by both ends, so that they cannot disagree.
Invariant: a request is checked completely before anything is looked up for it; a name in it is never a path.
"""

from __future__ import annotations

import enum
import re
import struct
from dataclasses import dataclass
from typing import Any

from ota import strictjson
from ota.errors import OtaError, Reason
from ota.release import LINE_PATTERN, check_target_name

VERSION = 1
MAX_REQUEST_BYTES = 1024
MAX_BLOCK_BYTES = 96 * 1024
MAX_DOCUMENT_BYTES = 16 * 1024 * 1024
STATUS_KEY = "status"
DIGEST_KEY = "sha256"

_HEADER = struct.Struct(">IQQ")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_ROLES = ("root", "timestamp", "snapshot", "targets")
_MAX_RID = 0xFFFFFFFF
_MAX_OFFSET = 1 << 40
_MAX_VERSION = 1 << 31
_COMMON = frozenset({"v", "rid", "get", "offset", "length"})
_KEYS = {
    "meta": _COMMON | {"role", "version", "max_bytes"},
    "desired": _COMMON | {"max_bytes"},
    "target": _COMMON | {"path", "sha256", "max_bytes"},
    "blob": _COMMON | {"sha256"},
}


class Status(enum.Enum):
    """What a server says about a request; only `OK` comes with bytes."""

    OK = "ok"
    NOT_FOUND = "not_found"
    REFUSED = "refused"
    TOO_LARGE = "too_large"


@dataclass(frozen=True, slots=True)
class Metadata:
    """A metadata document; `version` is None for the timestamp alone."""

    role: str
    version: int | None


@dataclass(frozen=True, slots=True)
class Desired:
    """The asking device's own desired document."""


@dataclass(frozen=True, slots=True)
class Target:
    """A target file by path and hash."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Blob:
    """A sealed payload by the hash of its bytes."""

    sha256: str


Item = Metadata | Desired | Target | Blob


@dataclass(frozen=True, slots=True)
class Request:
    """`length` bytes at `offset` of `item`; a document longer than `max_bytes` is not wanted at all."""

    rid: int
    item: Item
    offset: int
    length: int
    max_bytes: int | None

    def encode(self) -> bytes:
        """The request's JSON."""
        body: dict[str, Any] = {"v": VERSION, "rid": self.rid, "offset": self.offset, "length": self.length}
        match self.item:
            case Metadata(role, version):
                body |= {"get": "meta", "role": role, "version": version}
            case Desired():
                body |= {"get": "desired"}
            case Target(path, sha256):
                body |= {"get": "target", "path": path, "sha256": sha256}
            case Blob(sha256):
                body |= {"get": "blob", "sha256": sha256}
        if self.max_bytes is not None:
            body["max_bytes"] = self.max_bytes
        return strictjson.canonical(body)


@dataclass(frozen=True, slots=True)
class Header:
    """What an answer carries in its correlation data: which request, where its bytes start, how long the whole is."""

    rid: int
    offset: int
    total: int

    def encode(self) -> bytes:
        """20 bytes."""
        return _HEADER.pack(self.rid, self.offset, self.total)


def parse_request(data: bytes) -> Request:
    """Parse and check a request completely.

    Raises:
        OtaError: `bad_json` or `bad_target_name`.
    """
    body = strictjson.loads(data, max_bytes=MAX_REQUEST_BYTES, what="block request")
    if not isinstance(body, dict) or body.get("v") != VERSION:
        raise _bad(f"not an object of version {VERSION}")
    kind = body.get("get")
    if not isinstance(kind, str) or kind not in _KEYS or body.keys() != _KEYS[kind]:
        raise _bad("unknown kind, or fields that do not belong to it")
    max_bytes = None if kind == "blob" else _integer(body, "max_bytes", 1, MAX_DOCUMENT_BYTES)
    return Request(
        _integer(body, "rid", 0, _MAX_RID),
        _item(kind, body),
        _integer(body, "offset", 0, _MAX_OFFSET),
        _integer(body, "length", 1, MAX_BLOCK_BYTES),
        max_bytes,
    )


def request_id(data: bytes) -> int | None:
    """The `rid` of a request that `parse_request` refused, if it has one, so that the refusal can be answered."""
    try:
        body = strictjson.loads(data, max_bytes=MAX_REQUEST_BYTES, what="block request")
        return _integer(body, "rid", 0, _MAX_RID) if isinstance(body, dict) else None
    except OtaError:
        return None


def parse_header(correlation: bytes | None) -> Header | None:
    """The header of an answer, or None when it is not one."""
    if correlation is None or len(correlation) != _HEADER.size:
        return None
    return Header(*_HEADER.unpack(correlation))


def parse_status(user: tuple[tuple[str, str], ...]) -> tuple[Status, str] | None:
    """Status and document digest (empty when there is none) of an answer's user properties, or None."""
    fields = dict(user)
    try:
        status = Status(fields.get(STATUS_KEY, ""))
    except ValueError:
        return None
    digest = fields.get(DIGEST_KEY, "")
    if digest and not _HEX64.fullmatch(digest):
        return None
    return status, digest


def _item(kind: str, body: dict[str, Any]) -> Item:
    if kind == "desired":
        return Desired()
    if kind == "meta":
        return _metadata(body)
    sha256 = _text(body, "sha256")
    if not _HEX64.fullmatch(sha256):
        raise _bad("sha256 is not 64 hex digits")
    return Blob(sha256) if kind == "blob" else Target(check_target_name(_text(body, "path")), sha256)


def _metadata(body: dict[str, Any]) -> Metadata:
    role = _text(body, "role")
    line = role.removeprefix("release-")
    if role not in _ROLES and (line == role or not LINE_PATTERN.fullmatch(line)):
        raise _bad("unknown role")
    if role == "timestamp":
        if body["version"] is not None:
            raise _bad("the timestamp has no version")
        return Metadata(role, None)
    return Metadata(role, _integer(body, "version", 1, _MAX_VERSION))


def _text(body: dict[str, Any], key: str) -> str:
    value = body[key]
    if not isinstance(value, str):
        raise _bad(f"{key} is not a text")
    return value


def _integer(body: dict[str, Any], key: str, low: int, high: int) -> int:
    value = body.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _bad(f"{key} is not an integer from {low} to {high}")
    return value


def _bad(why: str) -> OtaError:
    return OtaError(Reason.BAD_JSON, f"block request: {why}", hint="update the older of the two ends")
