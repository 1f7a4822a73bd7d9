"""A captured picture as it lies on a device and travels: sealed to the operator's key, so that the device itself, and
whoever copies its storage, cannot open what it kept.

One file: a line of JSON, the header, then the picture under a key of its own (Cobblestone-256), which the header holds
wrapped to the operator's X25519 key (HPKE). Invariant: the whole header but for the wrapped key is the context of both,
so no byte of it can be changed and no picture be put under another's header.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ota import payload, strictjson
from ota.errors import OtaError, PayloadError, Reason

FORMAT = 1
SUFFIX = ".cap"
MAX_HEADER_BYTES = 8192
MAX_PICTURE_BYTES = 16 << 20
NAME_PATTERN = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")


def seal(picture: bytes, public_key: bytes, facts: Mapping[str, Any]) -> bytes:
    """The file of one capture.

    Args:
        picture: at most `MAX_PICTURE_BYTES`.
        public_key: the operator's, raw X25519.
        facts: what may be read without the key: device, line, rule, time and the like; plain JSON values.
    """
    header = {**facts, "format": FORMAT, "kid": payload.key_id(public_key), "length": len(picture)}
    context = _context(header)
    key = payload.new_key()
    wrapped = base64.b64encode(payload.wrap_key(key, public_key, context)).decode()
    return _line({**header, "wrapped": wrapped}) + b"\n" + payload.seal(picture, key, context)


def read_header(data: bytes) -> dict[str, Any]:
    """The header in front of a capture, unverified: it says what lies there, `open_with` proves it.

    Raises:
        PayloadError: `payload_corrupt` when these are not the first bytes of a capture.
    """
    line, found, _ = data[:MAX_HEADER_BYTES].partition(b"\n")
    try:
        if not found:
            raise ValueError("no end of the header")
        header = strictjson.loads(line, max_bytes=MAX_HEADER_BYTES, what="header of the capture")
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError("another format")
        if not 0 <= int(header["length"]) <= MAX_PICTURE_BYTES or not isinstance(header["kid"], str):
            raise ValueError("another format")
    except (OtaError, ValueError, KeyError, TypeError) as e:
        raise PayloadError(Reason.PAYLOAD_CORRUPT, f"this is not a capture: {e}") from e
    return header


def open_with(data: bytes, private_key: X25519PrivateKey) -> tuple[dict[str, Any], bytes]:
    """The header and the picture of a capture.

    Raises:
        PayloadError: `payload_corrupt` for a changed byte, `not_for_this_device` for one sealed to another key.
    """
    header = read_header(data)
    kid = payload.key_id(private_key.public_key().public_bytes_raw())
    if header["kid"] != kid:
        raise PayloadError(
            Reason.NOT_FOR_THIS_DEVICE,
            f"the capture is sealed to key {header['kid'][:16]}, this is key {kid}",
            hint="use the key whose public half was operator_key in the device's agent.toml",
        )
    try:
        wrapped = base64.b64decode(header.pop("wrapped"), validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error) as e:
        raise PayloadError(Reason.PAYLOAD_CORRUPT, "the capture has no wrapped key") from e
    context = _context(header)
    try:
        key = payload.unwrap_key(wrapped, private_key, context)
    except PayloadError as e:
        raise PayloadError(Reason.PAYLOAD_CORRUPT, "the header of the capture was changed") from e
    picture = bytearray(int(header["length"]))
    body = data[data.index(b"\n") + 1 :]
    with memoryview(picture) as view:
        written = payload.open_into([body], key, context, view)
    if written != len(picture):
        raise PayloadError(Reason.PAYLOAD_TRUNCATED, "the capture is shorter than its header says")
    return header, bytes(picture)


def _context(header: Mapping[str, Any]) -> bytes:
    return b"\0".join((b"edge capture v1", payload.SUITE.encode(), payload.WRAP_SUITE.encode(), _line(header)))


def _line(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
