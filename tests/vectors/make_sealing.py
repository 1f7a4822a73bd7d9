"""Writes sealing.json beside itself: one of everything that this project seals, with all keys.

Run when a format changes: `PYTHONPATH=. python tests/vectors/make_sealing.py`. The keys are nobody's; salts and
encapsulated keys differ from run to run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ota import payload
from ota.client import keyring, memfd
from ota.client.fsops import Fs
from ota.client.keyring import Keyring, Ring, TlsIdentity
from ota.client.store import Store, path_of

OUT = Path(__file__).with_name("sealing.json")


def plaintext(length: int) -> bytes:
    """The plaintext of every vector: byte i is (7 * i + 3) modulo 256."""
    return bytes((7 * i + 3) % 256 for i in range(length))


def _key(seed: int) -> bytes:
    return hashlib.sha256(f"edge-ota vector {seed}".encode()).digest()


def _payloads() -> list[dict[str, Any]]:
    vectors = []
    for length, kind in ((0, "full"), (1, "full"), (16383, f"delta:{'0' * 64}"), (16384, "full")):
        plain = plaintext(length)
        names = {
            "line": "parts", "version": "1.4.2", "component": "int8.tflite", "kind": kind,
            "plain_sha256": hashlib.sha256(plain).hexdigest(), "plain_length": length,
        }  # fmt: skip
        context = payload.payload_context(**names)
        sealed = payload.seal(plain, _key(1), context)
        vectors.append(
            {"length": length, "key": _key(1).hex(), **names, "context": _text(context), "sealed": _text(sealed)}
        )
    return vectors


def _at_rest(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    fs, plain = Fs(folder), plaintext(16390)
    ring = Ring((_key(2), _key(3)), (_key(4),), TlsIdentity(b"a private key\n", b"a certificate\n"), None)
    Keyring(fs, _key(5)).save(ring)
    fd = memfd.write_sealed("vector", len(plain), lambda view: view.__setitem__(slice(None), plain))
    sha256 = hashlib.sha256(plain).hexdigest()
    Store(fs, _key(2), 0).put(fd, sha256, len(plain))
    store = {"length": len(plain), "key": _key(2).hex(), "plain_sha256": sha256}
    return (
        {**store, "file": _text((folder / path_of(sha256)).read_bytes())},
        {
            "custody_key": _key(5).hex(),
            "plain": keyring.encode(ring).decode(),
            "file": _text((folder / keyring.RING).read_bytes()),
        },
    )


def _wrapped() -> tuple[dict[str, Any], dict[str, Any]]:
    private = X25519PrivateKey.from_private_bytes(_key(6))
    public = private.public_key().public_bytes_raw()
    names = {"line": "parts", "version": "1.4.2", "cek_id": "21747c36e4d5a6f28f1848d91b96c755"}
    common = {"private": _key(6).hex(), "kid": payload.key_id(public), "content_key": _key(1).hex(), **names}
    grant = payload.grant_info("cam-1", **names)
    vault = "\0".join(("edge-ota vault v1", payload.WRAP_SUITE, *names.values())).encode()
    return (
        {**common, "device": "cam-1", "info": _text(grant), "wrapped": _text(payload.wrap_key(_key(1), public, grant))},
        {**common, "info": _text(vault), "wrapped": _text(payload.wrap_key(_key(1), public, vault))},
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def main() -> int:
    """Write the file."""
    with TemporaryDirectory() as folder:
        store, ring = _at_rest(Path(folder))
    grant, vault = _wrapped()
    vectors = {"payloads": _payloads(), "store": store, "ring": ring, "grant": grant, "vault": vault}
    OUT.write_text(json.dumps(vectors, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
