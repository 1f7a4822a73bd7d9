"""Everything sealed is read by a second reader that shares no code with the first; kept vectors are read by both."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from ota import payload
from ota.client import keyring, memfd, sealed
from ota.client.fsops import Fs
from ota.client.keyring import Keyring, Ring
from ota.client.store import Store, path_of
from ota.errors import PayloadError, Reason, StoreError
from tests.ota.client.conftest import DEVICE, LINE, Device, QuickDisk, model
from tests.ota.client.simulator import sha256
from tests.vectors import decryptor
from tests.vectors.decryptor import Refused
from tests.vectors.make_sealing import plaintext

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "vectors" / "sealing.json").read_text())
CHUNK = 16384 + 16
NAMES = ("line", "version", "component", "kind", "plain_sha256", "plain_length")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)


# -- kept vectors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS["payloads"], ids=lambda v: str(v["length"]))
def test_both_readers_open_the_payload_vectors(vector: dict[str, Any]) -> None:
    plain, data, key = plaintext(vector["length"]), _bytes(vector["sealed"]), bytes.fromhex(vector["key"])
    names = {name: vector[name] for name in NAMES}
    assert payload.payload_context(**names) == _bytes(vector["context"])
    assert len(data) == payload.sealed_length(len(plain))
    out = bytearray(len(plain))
    assert payload.open_into([data], key, _bytes(vector["context"]), memoryview(out)) == len(plain)
    assert out == plain
    assert decryptor.payload(data, key, **names) == plain


def test_both_readers_open_the_store_vector(tmp_path: Path) -> None:
    vector = VECTORS["store"]
    data, key, name = _bytes(vector["file"]), bytes.fromhex(vector["key"]), vector["plain_sha256"]
    assert decryptor.store_file(data, [key], name) == plaintext(vector["length"])
    store = Store(Fs(QuickDisk(tmp_path)), key, 0)  # type: ignore[arg-type]
    (tmp_path / path_of(name)).write_bytes(data)
    fd = store.open(name)
    assert b"".join(memfd.chunks(fd)) == plaintext(vector["length"])
    os.close(fd)


def test_both_readers_open_the_ring_vector(tmp_path: Path) -> None:
    vector = VECTORS["ring"]
    data, key = _bytes(vector["file"]), bytes.fromhex(vector["custody_key"])
    assert decryptor.ring(data, key) == json.loads(vector["plain"])
    (tmp_path / "keys").mkdir()
    (tmp_path / keyring.RING).write_bytes(data)
    opened = Keyring(Fs(QuickDisk(tmp_path)), key)  # type: ignore[arg-type]
    assert keyring.encode(opened.ring).decode() == vector["plain"]
    assert sealed.parse(data[:48], keyring.MAGIC, len(data)).key_id == sealed.key_id(key)


def test_both_readers_open_the_grant_and_the_vault_vector() -> None:
    for vector, names in (
        (VECTORS["grant"], ("device", "line", "version", "cek_id")),
        (VECTORS["vault"], ("line", "version", "cek_id")),
    ):
        private = X25519PrivateKey.from_private_bytes(bytes.fromhex(vector["private"]))
        wrapped, info = _bytes(vector["wrapped"]), _bytes(vector["info"])
        assert payload.key_id(private.public_key().public_bytes_raw()) == vector["kid"]
        assert payload.unwrap_key(wrapped, private, info).hex() == vector["content_key"]
        second = decryptor.grant if "device" in names else decryptor.vault_key
        opened = second(wrapped, private.private_bytes_raw(), *(vector[name] for name in names))
        assert opened.hex() == vector["content_key"]
    assert payload.grant_info(*(VECTORS["grant"][n] for n in ("device", "line", "version", "cek_id"))) == _bytes(
        VECTORS["grant"]["info"]
    )


def test_every_context_and_header_names_its_suite() -> None:
    assert b"\0cobblestone-256\0" in _bytes(VECTORS["payloads"][0]["context"])
    assert b"\0" + decryptor.WRAP_SUITE.encode() + b"\0" in _bytes(VECTORS["grant"]["info"])
    assert b"\0" + decryptor.WRAP_SUITE.encode() + b"\0" in _bytes(VECTORS["vault"]["info"])
    for kind in ("store", "ring"):
        assert b"cobblestone-256\0" in _bytes(VECTORS[kind]["file"])[:48]


# -- what the product makes, read by the second reader -----------------------------------------------------------------


@given(st.integers(0, 40_000), st.binary(min_size=32, max_size=32), st.binary(max_size=300))
@settings(max_examples=40, deadline=None)
def test_the_second_reader_opens_what_the_first_seals(length: int, key: bytes, context: bytes) -> None:
    plain = plaintext(length)
    pieces = (plain[i : i + 5000] for i in range(0, length, 5000))
    assert decryptor.cobblestone_256(b"".join(payload.seal_chunks(pieces, key, context)), key, context) == plain


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=200))
@settings(max_examples=40, deadline=None)
def test_the_second_reader_opens_what_the_first_wraps(cek: bytes, info: bytes) -> None:
    private = X25519PrivateKey.generate()
    wrapped = payload.wrap_key(cek, private.public_key().public_bytes_raw(), info)
    assert decryptor.hpke_open(wrapped, private.private_bytes_raw(), info) == cek
    with pytest.raises(Refused):
        decryptor.hpke_open(wrapped, X25519PrivateKey.generate().private_bytes_raw(), info)


def test_the_second_reader_opens_the_files_and_the_ring_of_a_device(tmp_path: Path) -> None:
    fs, plain = Fs(QuickDisk(tmp_path)), model(1, 70_000)  # type: ignore[arg-type]
    ring = Ring((b"n" * 32, b"o" * 32), (b"h" * 32,))
    Keyring(fs, b"c" * 32).save(ring)
    store = Store(fs, *(b"o" * 32, 0))
    fd = memfd.write_sealed("test", len(plain), lambda view: view.__setitem__(slice(None), plain))
    store.put(fd, sha256(plain), len(plain))
    os.close(fd)
    fields = decryptor.ring((tmp_path / keyring.COPY).read_bytes(), b"c" * 32)
    assert isinstance(fields["storage"], list)
    keys = [_bytes(text) for text in fields["storage"]]
    assert keys == list(ring.storage)
    assert decryptor.store_file((tmp_path / path_of(sha256(plain))).read_bytes(), keys, sha256(plain)) == plain


def test_the_second_reader_follows_a_real_release_from_the_grant_to_the_plaintext(device: Device) -> None:
    built = device.release("1.0.0", codec="raw")
    component = next(part for part in json.loads(built.data)["components"] if part["name"] == "int8")
    desired = json.loads(device.repository.desired[DEVICE])["signed"]
    cek_id = component["full"]["cek_id"]
    wrapped = _bytes(desired["grants"][cek_id]["wrapped"])
    cek = decryptor.grant(wrapped, device.key.private_bytes_raw(), DEVICE, LINE, "1.0.0", cek_id)
    facts = (component["plain_sha256"], component["plain_length"])
    fetched = device.repository.payloads[component["full"]["sha256"]]
    assert decryptor.payload(fetched, cek, LINE, "1.0.0", "int8", "full", *facts) == built.plain["int8"]
    for wrong in (
        lambda: decryptor.payload(fetched, cek, LINE, "1.0.1", "int8", "full", *facts),
        lambda: decryptor.grant(wrapped, device.key.private_bytes_raw(), "cam-2", LINE, "1.0.0", cek_id),
    ):
        with pytest.raises(Refused):
            wrong()


# -- damage, refused by both -------------------------------------------------------------------------------------------

_KEY = b"k" * 32
_PLAIN = plaintext(3 * 16384 + 100)
_SEALED = payload.seal(_PLAIN, _KEY, b"context")
_CHUNKS = [_SEALED[56 + i * CHUNK : 56 + (i + 1) * CHUNK] for i in range(4)]
_DAMAGED = {
    "cut at a chunk": _SEALED[: 56 + 3 * CHUNK],
    "cut before the last": _SEALED[: 56 + 2 * CHUNK],
    "cut to the header": _SEALED[:56],
    "cut inside": _SEALED[:-1],
    "cut in the commitment": _SEALED[:40],
    "swapped": _SEALED[:56] + _CHUNKS[1] + _CHUNKS[0] + _CHUNKS[2] + _CHUNKS[3],
    "repeated": _SEALED[:56] + _CHUNKS[0] + _CHUNKS[0] + _CHUNKS[1] + _CHUNKS[2] + _CHUNKS[3],
    "missing": _SEALED[:56] + _CHUNKS[0] + _CHUNKS[2] + _CHUNKS[3],
    "last first": _SEALED[:56] + _CHUNKS[3],
    "extra byte": _SEALED + b"\0",
    "of another message": _SEALED[:56] + payload.seal(_PLAIN, _KEY, b"context")[56:],
    "empty": b"",
}


@pytest.mark.fault("F49")
@pytest.mark.parametrize("name", _DAMAGED)
def test_cut_reordered_and_prolonged_ciphertext_is_refused_by_both_readers(name: str) -> None:
    with pytest.raises(Refused):
        decryptor.cobblestone_256(_DAMAGED[name], _KEY, b"context")
    with pytest.raises(PayloadError) as refused:
        payload.open_into([_DAMAGED[name]], _KEY, b"context", memoryview(bytearray(len(_PLAIN) + CHUNK)))
    assert refused.value.reason is Reason.PAYLOAD_CORRUPT


@pytest.mark.parametrize("change", ["key", "context", "salt", "commitment"])
def test_another_key_context_salt_or_commitment_is_refused_by_both_readers(change: str) -> None:
    data = bytearray(_SEALED)
    key, context = (b"x" * 32 if change == "key" else _KEY), (b"contexts" if change == "context" else b"context")
    if change in ("salt", "commitment"):
        data[0 if change == "salt" else 30] ^= 1
    with pytest.raises(Refused):
        decryptor.cobblestone_256(bytes(data), key, context)
    with pytest.raises(PayloadError):
        payload.open_into([bytes(data)], key, context, memoryview(bytearray(len(_PLAIN))))


@pytest.mark.parametrize("position", [*range(48), 60, 90, 16500])
def test_a_store_file_changed_anywhere_is_refused_by_both_readers(tmp_path: Path, position: int) -> None:
    vector = VECTORS["store"]
    data, key, name = bytearray(_bytes(vector["file"])), bytes.fromhex(vector["key"]), vector["plain_sha256"]
    data[position] ^= 1
    with pytest.raises(Refused):
        decryptor.store_file(bytes(data), [key], name)
    store = Store(Fs(QuickDisk(tmp_path)), key, 0)  # type: ignore[arg-type]
    (tmp_path / path_of(name)).write_bytes(data)
    with pytest.raises(StoreError) as refused:
        store.open(name)
    assert refused.value.reason is Reason.PAYLOAD_CORRUPT
