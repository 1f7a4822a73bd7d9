"""The header in front of everything this device seals for itself: store files and the key ring.

48 bytes: magic, header version, suite name, id of the sealing key, plaintext length. It is not authenticated by itself:
whoever seals puts the whole header into the context, so a changed byte of it opens nothing; until then only its length
is used, and that against the size of the file. Another suite or version is refused by name, never guessed at.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass

from ota import payload
from ota.errors import PayloadError, Reason

VERSION = 2
# magic, header version, zero padding, suite name (zero-padded), key id, plaintext length
_LAYOUT = struct.Struct("<8sB7s16s8sQ")
HEADER_BYTES = _LAYOUT.size
KEY_ID_BYTES = 8
MAX_LENGTH = 1 << 40


@dataclass(frozen=True, slots=True)
class Header:
    """What a sealed file says of itself. `key_id` names the 32-byte key it is sealed under (`key_id`), in hex."""

    key_id: str
    length: int

    def pack(self, magic: bytes) -> bytes:
        """The 48 bytes, under the 8-byte `magic` of the kind of file."""
        return _LAYOUT.pack(magic, VERSION, b"", payload.SUITE.encode(), bytes.fromhex(self.key_id), self.length)


def key_id(key: bytes) -> str:
    """Public name of a symmetric key, 16 hex digits; tells nothing about a key that is random."""
    return hmac.digest(key, b"edge-ota key id v1", hashlib.sha256)[:KEY_ID_BYTES].hex()


def parse(data: bytes, magic: bytes, size: int) -> Header:
    """Read a header.

    Args:
        data: the first `HEADER_BYTES` of the file, fewer when it is shorter.
        size: of the whole file.

    Raises:
        PayloadError: `payload_corrupt` for another kind of file; `unsupported` for a suite or version that this agent
            does not know; `payload_truncated` when the file cannot hold the length it names.
    """
    if len(data) < HEADER_BYTES:
        raise PayloadError(Reason.PAYLOAD_TRUNCATED, "shorter than its header")
    found, version, padding, suite, key, length = _LAYOUT.unpack(data[:HEADER_BYTES])
    if found != magic:
        raise PayloadError(Reason.PAYLOAD_CORRUPT, "not a file of this kind")
    name = suite.rstrip(b"\0")
    if version != VERSION or name != payload.SUITE.encode():
        shown = name.decode("ascii", "replace")
        raise PayloadError(Reason.UNSUPPORTED, f"header version {version}, suite {shown!r}: not known here")
    if any(padding) or length > MAX_LENGTH or payload.plain_length(size - HEADER_BYTES) != length:
        raise PayloadError(Reason.PAYLOAD_TRUNCATED, f"{size} bytes do not hold {length}")
    return Header(key.hex(), length)
