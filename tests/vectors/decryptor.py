"""A second reader of everything this project seals, written from the specifications and sharing no code with the first.

Cobblestone-256 is C2SP chunked-encryption with HKDF-Expand-SHA-512 and AES-256-GCM; grants are HPKE (RFC 9180) in base
mode with DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and ChaCha20-Poly1305; formats are ota/FORMAT.md's. Only primitives of
`cryptography` are used, nothing of `ota`. Whoever wants to write an agent in another language can start here.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

CHUNK_BYTES = 16 * 1024
TAG_BYTES = 16
SALT_BYTES = 24
COMMITMENT_BYTES = 32


class Refused(Exception):
    """The bytes are not what the key, the context and the format say."""


# -- Cobblestone-256 ---------------------------------------------------------------------------------------------------


def cobblestone_256(sealed: bytes, key: bytes, context: bytes) -> bytes:
    """The plaintext of a whole message."""
    salt, rest = sealed[:SALT_BYTES], sealed[SALT_BYTES:]
    commitment, body = rest[:COMMITMENT_BYTES], rest[COMMITMENT_BYTES:]
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + context
    derived = hkdf_expand("sha512", key, info, 32 + 12 + COMMITMENT_BYTES)
    if not hmac.compare_digest(commitment, derived[44:]):
        raise Refused("the commitment is another key's or another context's")
    cipher, base_nonce = AESGCM(derived[:32]), int.from_bytes(derived[32:44], "big")
    plain = bytearray()
    number = 0
    while True:
        chunk, body = body[: CHUNK_BYTES + TAG_BYTES], body[CHUNK_BYTES + TAG_BYTES :]
        try:
            plain += cipher.decrypt((base_nonce ^ number).to_bytes(12, "big"), bytes(chunk), None)
        except (InvalidTag, ValueError) as e:
            raise Refused(f"chunk {number} does not authenticate") from e
        if len(chunk) < CHUNK_BYTES + TAG_BYTES:
            return bytes(plain)
        number += 1


def hkdf_expand(digest: str, prk: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand, RFC 5869 2.3."""
    out, block = b"", b""
    for counter in range(1, 256):
        if len(out) >= length:
            break
        block = hmac.digest(prk, block + info + bytes([counter]), digest)
        out += block
    return out[:length]


# -- HPKE --------------------------------------------------------------------------------------------------------------

_KEM = b"KEM" + struct.pack(">H", 0x0020)
_HPKE = b"HPKE" + struct.pack(">HHH", 0x0020, 0x0001, 0x0003)


def hpke_open(wrapped: bytes, private: bytes, info: bytes) -> bytes:
    """RFC 9180 base mode, one message, no associated data; the encapsulated key comes first."""
    encapsulated, sealed = wrapped[:32], wrapped[32:]
    own = X25519PrivateKey.from_private_bytes(private)
    try:
        shared = own.exchange(X25519PublicKey.from_public_bytes(encapsulated))
    except ValueError as e:
        raise Refused("not an encapsulated key") from e
    kem_context = encapsulated + own.public_key().public_bytes_raw()
    secret = _labeled_expand(_KEM, _labeled_extract(_KEM, b"", b"eae_prk", shared), b"shared_secret", kem_context, 32)
    schedule = (
        b"\0" + _labeled_extract(_HPKE, b"", b"psk_id_hash", b"") + _labeled_extract(_HPKE, b"", b"info_hash", info)
    )
    prk = _labeled_extract(_HPKE, secret, b"secret", b"")
    key = _labeled_expand(_HPKE, prk, b"key", schedule, 32)
    nonce = _labeled_expand(_HPKE, prk, b"base_nonce", schedule, 12)
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, sealed, b"")
    except (InvalidTag, ValueError) as e:
        raise Refused("made for another key, device or release") from e


def _labeled_extract(suite: bytes, salt: bytes, label: bytes, secret: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + secret, "sha256")


def _labeled_expand(suite: bytes, prk: bytes, label: bytes, info: bytes, length: int) -> bytes:
    return hkdf_expand("sha256", prk, struct.pack(">H", length) + b"HPKE-v1" + suite + label + info, length)


# -- FORMAT.md ---------------------------------------------------------------------------------------------------------

WRAP_SUITE = "hpke-x25519-hkdf-sha256-chacha20-poly1305"


def payload(
    sealed: bytes, key: bytes, line: str, version: str, component: str, kind: str, plain_sha256: str, plain_length: int
) -> bytes:
    """Section 4: what is inside a payload, before its codec is undone."""
    names = ("edge-ota payload v1", "cobblestone-256", line, version, component, kind, plain_sha256, str(plain_length))
    return cobblestone_256(sealed, key, "\0".join(names).encode())


def grant(wrapped: bytes, private: bytes, device: str, line: str, version: str, cek_id: str) -> bytes:
    """Section 6: a content key out of a device's desired.json."""
    names = ("edge-ota grant v1", WRAP_SUITE, device, line, version, cek_id)
    return hpke_open(wrapped, private, "\0".join(names).encode())


def vault_key(wrapped: bytes, private: bytes, line: str, version: str, cek_id: str) -> bytes:
    """Section 4: a content key out of the publisher's vault."""
    return hpke_open(wrapped, private, "\0".join(("edge-ota vault v1", WRAP_SUITE, line, version, cek_id)).encode())


def store_file(data: bytes, keys: list[bytes], plain_sha256: str) -> bytes:
    """Section 9: the plaintext of `store/<plain_sha256>.cbs`."""
    plain = _behind_header(data, b"EDGECBS\n", keys, b"edge-ota store v2", plain_sha256.encode())
    if hashlib.sha256(plain).hexdigest() != plain_sha256:
        raise Refused("another plaintext than the name says")
    return plain


def ring(data: bytes, custody_key: bytes) -> dict[str, object]:
    """Section 9: the fields of `keys/ring.cbs`."""
    fields = json.loads(_behind_header(data, b"EDGERNG\n", [custody_key], b"edge-ota ring v1", b""))
    if not isinstance(fields, dict):
        raise Refused("not a ring")
    return fields


def _behind_header(data: bytes, magic: bytes, keys: list[bytes], label: bytes, name: bytes) -> bytes:
    if len(data) < 48:
        raise Refused("shorter than its header")
    header = data[:48]
    found, version, suite = header[:8], header[8], header[16:32].rstrip(b"\0")
    if (found, version, suite, any(header[9:16])) != (magic, 2, b"cobblestone-256", False):
        raise Refused("another kind of file, version or suite")
    named = {hmac.digest(key, b"edge-ota key id v1", "sha256")[:8]: key for key in keys}
    if header[32:40] not in named:
        raise Refused("sealed under a key that is not here")
    plain = cobblestone_256(data[48:], named[header[32:40]], label + b"\0cobblestone-256\0" + header + name)
    if len(plain) != int.from_bytes(header[40:48], "little"):
        raise Refused("another length than its header says")
    return plain
