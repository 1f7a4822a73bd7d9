"""The key ring: what was saved comes back, nothing else does, and nothing shows a key."""

from __future__ import annotations

import base64
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota import payload
from ota.client import keyring, sealed
from ota.client.fsops import Disk, Fs
from ota.client.keyring import COPY, RING, Keyring, Ring, TlsIdentity
from ota.errors import OtaError, PayloadError, Reason, StoreError
from tests.ota.client.conftest import QuickDisk

CUSTODY = b"c" * 32
IDENTITY = TlsIdentity(b"-----BEGIN PRIVATE KEY-----secret", b"-----BEGIN CERTIFICATE-----")
RINGED = Ring((b"1" * 32, b"2" * 32), (b"3" * 32,), IDENTITY, None)

_keys = st.binary(min_size=32, max_size=32)
_pems = st.binary(min_size=1, max_size=200)
_identities = st.none() | st.builds(TlsIdentity, _pems, _pems)
rings = st.builds(
    Ring,
    st.lists(_keys, min_size=1, max_size=4, unique=True).map(tuple),
    st.lists(_keys, max_size=3, unique=True).map(tuple),
    _identities,
    _identities,
)


@pytest.fixture
def fs(tmp_path: Path) -> Fs:
    return Fs(QuickDisk(tmp_path))  # type: ignore[arg-type]


@given(rings)
def test_a_ring_read_back_is_the_ring_written(ring: Ring) -> None:
    assert keyring.decode(keyring.encode(ring)) == ring


@given(rings, st.data())
@settings(max_examples=200)
def test_no_other_text_is_read_as_a_ring_and_no_message_shows_a_key(ring: Ring, data: st.DataObject) -> None:
    text = keyring.encode(ring)
    position = data.draw(st.integers(0, len(text) - 1))
    changed = text[:position] + data.draw(st.binary(max_size=3)) + text[position + data.draw(st.integers(0, 3)) :]
    refusal = None
    try:
        assert keyring.encode(keyring.decode(changed)) == changed
    except OtaError as e:
        refusal = e
    if refusal is not None:
        assert refusal.reason is Reason.BAD_JSON
        shown = [base64.b64encode(key).decode()[:20] in refusal.message for key in (*ring.storage, *ring.hpke)]
        assert not any(shown)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": True},
        {"storage": []},
        {"storage": ["AAAA"]},
        {"storage": [base64.b64encode(bytes([i]) * 32).decode() for i in range(5)]},
        {"storage": [base64.b64encode(b"1" * 32).decode()] * 2},
        {"storage": [base64.b64encode(b"1" * 32).decode() + "\n"]},
        {"hpke": "x"},
        {"hpke": [7]},
        {"tls": {"key": "AAAA"}},
        {"tls": {"key": "", "certificate": "AAAA"}},
        {"tls": []},
        {"more": 1},
    ],
    ids=str,
)
def test_a_ring_with_a_wrong_field_is_refused(change: dict[str, object]) -> None:
    body = {**json.loads(keyring.encode(RINGED)), **change}
    with pytest.raises(OtaError) as refused:
        keyring.decode(json.dumps(body).encode())
    assert refused.value.reason is Reason.BAD_JSON


def test_no_repr_shows_a_key() -> None:
    shown = repr(RINGED) + repr(RINGED.tls)
    assert not any(secret in shown for secret in ("111", "222", "333", "secret"))


def test_without_a_ring_enrolments_own_keys_are_in_force(fs: Fs) -> None:
    opened = Keyring(fs, CUSTODY, (b"h" * 32,))
    assert opened.ring == Ring((CUSTODY,), (b"h" * 32,))
    assert not opened.exists
    assert opened.damage is None


def test_a_saved_ring_is_there_at_the_next_start_and_shows_no_key_on_the_disk(fs: Fs, tmp_path: Path) -> None:
    Keyring(fs, CUSTODY).save(RINGED)
    again = Keyring(fs, CUSTODY)
    assert again.ring == RINGED
    assert again.exists
    for path in (RING, COPY):
        data = (tmp_path / path).read_bytes()
        assert (tmp_path / path).stat().st_mode & 0o777 == 0o600
        assert not any(key in data for key in (CUSTODY, *RINGED.storage, *RINGED.hpke, b"secret"))
        assert payload.SUITE.encode() in data[: sealed.HEADER_BYTES]
        assert sealed.parse(data[:48], keyring.MAGIC, len(data)).key_id == sealed.key_id(CUSTODY)


@pytest.mark.parametrize("path", [RING, COPY])
@pytest.mark.parametrize("spoil", ["gone", "flipped", "cut", "empty", "old"])
def test_one_of_the_two_files_is_enough_and_the_other_is_written_again(
    fs: Fs, tmp_path: Path, path: str, spoil: str
) -> None:
    ring = Keyring(fs, CUSTODY)
    ring.save(replace(RINGED, tls=None))
    older = (tmp_path / COPY).read_bytes()
    ring.save(RINGED)
    file = tmp_path / path
    data = file.read_bytes()
    if spoil == "gone":
        file.unlink()
    elif spoil == "old":
        (tmp_path / COPY).write_bytes(older)
    else:
        file.write_bytes({"flipped": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:60], "empty": b""}[spoil])
    again = Keyring(fs, CUSTODY)
    assert again.ring == RINGED
    assert again.damage is None
    assert (tmp_path / RING).read_bytes() == (tmp_path / COPY).read_bytes()


@pytest.mark.parametrize("position", range(0, 300, 7))
def test_a_ring_damaged_in_both_files_is_reported_and_says_what_is_lost(fs: Fs, tmp_path: Path, position: int) -> None:
    Keyring(fs, CUSTODY).save(RINGED)
    data = bytearray((tmp_path / RING).read_bytes())
    if 16 <= position < 40:
        position += 24  # the suite and the key id: another agent's or another custody's ring, see below
    data[position] ^= 1
    for path in (RING, COPY):
        (tmp_path / path).write_bytes(data)
    again = Keyring(fs, CUSTODY)
    assert again.damage is not None
    assert again.damage.reason is Reason.KEYRING_CORRUPT
    assert "lost" in again.damage.message
    assert again.ring == Ring((CUSTODY,))
    again.save(RINGED)
    assert Keyring(fs, CUSTODY).ring == RINGED


@pytest.mark.parametrize(("position", "value"), [(8, b"\x03"), (16, b"cobblestone-512\0")])
def test_a_ring_of_another_format_is_left_alone(fs: Fs, tmp_path: Path, position: int, value: bytes) -> None:
    """An agent that is rolled back must not end the life of the device it finds."""
    Keyring(fs, CUSTODY).save(RINGED)
    data = bytearray((tmp_path / RING).read_bytes())
    data[position : position + len(value)] = value
    for path in (RING, COPY):
        (tmp_path / path).write_bytes(data)
    with pytest.raises(StoreError) as caught:
        Keyring(fs, CUSTODY)
    assert caught.value.reason is Reason.SEALED_KEY_UNAVAILABLE
    assert caught.value.hint
    assert [(tmp_path / path).read_bytes() for path in (RING, COPY)] == [data, data]


def test_a_file_that_is_no_ring_at_all_is_damage_whatever_its_size(fs: Fs, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    for size in (0, 1, 47, 48, 104, 1 << 20):
        (tmp_path / RING).write_bytes(b"x" * size)
        damage = Keyring(fs, CUSTODY).damage
        assert damage is not None
        assert damage.reason is Reason.KEYRING_CORRUPT


@pytest.mark.fault("F54")
def test_a_ring_of_another_root_secret_is_left_alone(fs: Fs, tmp_path: Path) -> None:
    Keyring(fs, CUSTODY).save(RINGED)
    before = (tmp_path / RING).read_bytes()
    with pytest.raises(StoreError) as refused:
        Keyring(fs, b"x" * 32)
    assert refused.value.reason is Reason.SEALED_KEY_UNAVAILABLE
    assert (tmp_path / RING).read_bytes() == before
    assert Keyring(fs, CUSTODY).ring == RINGED


def test_a_disk_that_cannot_be_read_is_not_taken_for_damage(tmp_path: Path) -> None:
    class Failing(Disk):
        def read(self, path: str, offset: int, length: int) -> bytes:
            raise OSError(5, "error")

    Keyring(Fs(tmp_path), CUSTODY).save(RINGED)
    with pytest.raises(StoreError) as refused:
        Keyring(Fs(Failing(tmp_path)), CUSTODY)  # type: ignore[arg-type]
    assert refused.value.reason is Reason.IO_ERROR


def test_changes_from_several_threads_are_all_kept(fs: Fs) -> None:
    ring = Keyring(fs, CUSTODY)
    keys = [bytes([n]) * 32 for n in range(3)]
    threads = [threading.Thread(target=ring.update, args=(lambda r, key=key: r.with_hpke_key(key),)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(Keyring(fs, CUSTODY).ring.hpke) == set(keys)


def test_the_oldest_hpke_key_is_forgotten_after_three() -> None:
    ring = RINGED
    for n in range(4):
        ring = ring.with_hpke_key(bytes([n]) * 32)
    assert ring.hpke == tuple(bytes([n]) * 32 for n in (3, 2, 1))


def test_a_ring_with_too_many_or_short_keys_cannot_be_made() -> None:
    for wrong in ((), (b"1" * 31,), (b"1" * 32, b"1" * 32), tuple(bytes([n]) * 32 for n in range(5))):
        with pytest.raises(ValueError, match="storage key"):
            Ring(wrong)


# -- wiping ------------------------------------------------------------------------------------------------------------


def test_after_wiping_no_key_is_on_the_disk_and_no_ring_opens(fs: Fs, tmp_path: Path) -> None:
    ring = Keyring(fs, CUSTODY)
    ring.save(RINGED)
    fs.write_atomic("keys/storage.key", CUSTODY)
    ring.wipe()
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["wiped"]
    with pytest.raises(StoreError) as refused:
        Keyring(fs, CUSTODY)
    assert refused.value.reason is Reason.KEYS_WIPED
    with pytest.raises(StoreError):
        ring.save(RINGED)


def test_wiping_overwrites_the_bytes_before_it_unlinks_the_names(tmp_path: Path) -> None:
    written: list[tuple[str, bytes]] = []

    class Watched(Disk):
        def unlink(self, path: str) -> None:
            if self._at(path).exists():
                written.append((path, self._at(path).read_bytes()))
            super().unlink(path)

    fs = Fs(Watched(tmp_path))  # type: ignore[arg-type]
    Keyring(fs, CUSTODY).save(RINGED)
    written.clear()
    keyring.wipe(fs)
    assert {path for path, _ in written} == {RING, COPY}
    assert all(not any(data) and len(data) > 100 for _, data in written)


def test_wiping_goes_on_with_the_others_when_one_file_cannot_be_removed(fs: Fs, tmp_path: Path) -> None:
    Keyring(fs, CUSTODY).save(RINGED)
    (tmp_path / "keys" / "a-folder").mkdir()
    with pytest.raises(StoreError) as failed:
        keyring.wipe(fs)
    assert failed.value.reason is Reason.IO_ERROR
    assert not (tmp_path / RING).exists()
    assert not (tmp_path / COPY).exists()


def test_enrolment_may_begin_a_new_life_after_a_wipe(fs: Fs, tmp_path: Path) -> None:
    Keyring(fs, CUSTODY).save(RINGED)
    keyring.wipe(fs)
    (tmp_path / RING).write_bytes(b"a cut brought the name back")
    keyring.forget_wipe(fs)
    assert not list((tmp_path / "keys").iterdir())
    assert Keyring(fs, CUSTODY).ring == Ring((CUSTODY,))


# -- the header --------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32), st.integers(0, 1 << 30))
def test_a_header_reads_back(key: bytes, length: int) -> None:
    header = sealed.Header(sealed.key_id(key), length)
    packed = header.pack(b"EDGECBS\n")
    size = sealed.HEADER_BYTES + 56 + length + 16 * (length // 16384 + 1)
    assert sealed.parse(packed, b"EDGECBS\n", size) == header
    with pytest.raises(PayloadError):
        sealed.parse(packed, b"EDGECBS\n", size - 1)


@pytest.mark.fault("F45")
@pytest.mark.parametrize(("position", "value"), [(8, 1), (8, 3), (16, ord("x")), (31, ord("x"))])
def test_an_unknown_suite_or_version_of_a_sealed_file_is_refused_by_name(position: int, value: int) -> None:
    packed = bytearray(sealed.Header("00" * 8, 0).pack(b"EDGECBS\n"))
    packed[position] = value
    with pytest.raises(PayloadError) as refused:
        sealed.parse(bytes(packed), b"EDGECBS\n", 48 + 72)
    assert refused.value.reason is Reason.UNSUPPORTED


@given(st.binary(max_size=120), st.integers(0, 1 << 20))
def test_no_bytes_make_the_header_reader_fail_otherwise(data: bytes, size: int) -> None:
    for head in (data, b"EDGECBS\n" + data, b"EDGECBS\n\x02" + bytes(7) + b"cobblestone-256\0" + data):
        reason = None
        try:
            sealed.parse(head, b"EDGECBS\n", size)
        except PayloadError as e:
            reason = e.reason
        assert reason in (None, Reason.PAYLOAD_CORRUPT, Reason.PAYLOAD_TRUNCATED, Reason.UNSUPPORTED)
