"""Sealing and opening of payloads, grants of their keys, and sealing at rest.

All cryptography of a release lives here, built from `cryptography` alone: Cobblestone-256 (C2SP chunked-encryption)
for bulk bytes and HPKE (RFC 9180, X25519 / HKDF-SHA256 / ChaCha20-Poly1305) for keys.
Invariants: contexts bind every sealed byte to what it is, so bytes that verify in one place verify nowhere else;
plaintext is handed out only after `finalize()` and the hash have both agreed; it is written into the caller's buffer
(the mapping of a memfd) and never into a file.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from ota.errors import PayloadError, Reason
from ota.release import LEAF_BYTES, Component, Payload

# names of what seals bytes and keys, part of every context: bytes of one suite never verify as another's
SUITE = "cobblestone-256"
WRAP_SUITE = "hpke-x25519-hkdf-sha256-chacha20-poly1305"
CEK_BYTES = 32
# C2SP chunked-encryption: 24 bytes of salt, 32 of commitment, a 16-byte tag for every 16 KiB chunk and the last one.
_CHUNK_BYTES = 16384
_FIXED_BYTES = 56
_TAG_BYTES = 16
_HPKE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)


def new_key() -> bytes:
    """32 random bytes."""
    return secrets.token_bytes(CEK_BYTES)


def payload_context(line: str, version: str, component: str, kind: str, plain_sha256: str, plain_length: int) -> bytes:
    """Context of a travelling payload. `kind` is `full`, or `delta:<base_sha256>`; the plaintext hash and length are
    those of the *component*, so a delta is bound to its result."""
    return "\0".join(
        ("edge-ota payload v1", SUITE, line, version, component, kind, plain_sha256, str(plain_length))
    ).encode()


def grant_info(device: str, line: str, version: str, cek_id: str) -> bytes:
    """HPKE `info` of a grant: which device may open which key of which release."""
    return "\0".join(("edge-ota grant v1", WRAP_SUITE, device, line, version, cek_id)).encode()


def key_id(public_key: bytes) -> str:
    """`kid` of an HPKE key: 16 hex digits of the hash of its raw public half."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def wrap_key(cek: bytes, public_key: bytes, info: bytes) -> bytes:
    """Encrypt a content key to the raw 32-byte X25519 `public_key`; 80 bytes."""
    return _HPKE.encrypt(cek, X25519PublicKey.from_public_bytes(public_key), info)


def unwrap_key(wrapped: bytes, private_key: X25519PrivateKey, info: bytes) -> bytes:
    """Open a grant.

    Raises:
        PayloadError: `not_for_this_device` when key, device, release or key id is another's.
    """
    try:
        cek = _HPKE.decrypt(wrapped, private_key, info)
    except (InvalidTag, ValueError) as e:
        raise PayloadError(
            Reason.NOT_FOR_THIS_DEVICE,
            "the grant was made for another device or another release",
            hint="ask the operator for a grant: edge-ota grant REPO DEVICE LINE VERSION",
        ) from e
    if len(cek) != CEK_BYTES:
        raise PayloadError(Reason.NOT_FOR_THIS_DEVICE, f"the grant holds {len(cek)} bytes, not {CEK_BYTES}")
    return cek


def seal(plain: bytes, key: bytes, context: bytes) -> bytes:
    """Encrypt `plain` whole."""
    encryptor = Cobblestone256Encryptor(key, context)
    return encryptor.update(plain) + encryptor.finalize()


def sealed_length(plain_length: int) -> int:
    """Ciphertext length of `plain_length` bytes."""
    return _FIXED_BYTES + plain_length + _TAG_BYTES * (plain_length // _CHUNK_BYTES + 1)


def open_into(chunks: Iterable[bytes], key: bytes, context: bytes, out: memoryview) -> int:
    """Decrypt `chunks` into `out` and return the number of bytes written.

    `out` holds unauthenticated bytes until this returns; on any error the caller throws it away unread.

    Raises:
        PayloadError: `payload_corrupt` for a wrong key, context or byte, a missing tail, or a plaintext longer than
            `out`.
    """
    position = 0
    for plain in open_chunks(chunks, key, context):
        end = position + len(plain)
        if end > len(out):
            raise PayloadError(Reason.PAYLOAD_CORRUPT, f"payload opens to more than {len(out)} bytes")
        out[position:end] = plain
        position = end
    return position


def open_chunks(chunks: Iterable[bytes], key: bytes, context: bytes) -> Iterator[bytes]:
    """Decrypt `chunks` piece by piece. Each piece is authentic, but that none is missing is known only at the end:
    whoever uses pieces before must be able to take that back.

    Raises:
        PayloadError: `payload_corrupt` for a wrong key, context or byte, or a missing tail.
    """
    decryptor = Cobblestone256Decryptor(key, context)
    try:
        for chunk in chunks:
            yield decryptor.update(chunk)
        yield decryptor.finalize()
    except InvalidTag as e:
        raise PayloadError(
            Reason.PAYLOAD_CORRUPT,
            "payload does not authenticate",
            hint="it was damaged, cut short, or sealed for something else; fetch it again",
        ) from e


def plain_length(sealed: int) -> int:
    """Plaintext length inside `sealed` bytes of ciphertext.

    Raises:
        PayloadError: `payload_truncated` when no plaintext has that length.
    """
    body = sealed - _FIXED_BYTES
    full, rest = divmod(body, _CHUNK_BYTES + _TAG_BYTES)
    if body < _TAG_BYTES or rest < _TAG_BYTES:
        raise PayloadError(Reason.PAYLOAD_TRUNCATED, f"{sealed} bytes are not a whole sealed payload")
    return full * _CHUNK_BYTES + rest - _TAG_BYTES


def leaves(data: bytes | memoryview) -> tuple[str, ...]:
    """SHA-256 of every 64 KiB of `data`."""
    view = memoryview(data)
    return tuple(hashlib.sha256(view[i : i + LEAF_BYTES]).hexdigest() for i in range(0, len(view), LEAF_BYTES))


def context_of(line: str, version: str, component: Component, payload: Payload) -> bytes:
    """Context of `payload`, which is the full payload or one of the deltas of `component`."""
    kind = "full"
    for delta in component.deltas:
        if delta.payload.sha256 == payload.sha256:
            kind = f"delta:{delta.base_sha256}"
    return payload_context(line, version, component.name, kind, component.plain_sha256, component.plain_length)


def seal_chunks(chunks: Iterable[bytes], key: bytes, context: bytes) -> Iterator[bytes]:
    """Encrypt `chunks` one after the other, so that a large plaintext is never held twice."""
    encryptor = Cobblestone256Encryptor(key, context)
    for chunk in chunks:
        yield encryptor.update(chunk)
    yield encryptor.finalize()
