"""Moving keys under a credential, what each custody says of itself, which keys reach updater and TLS library."""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import os
import shutil
import ssl
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent.daemon import custody, keys
from agent.daemon.enroll import Enrolment
from agent.daemon.keys import CredentialKeys, FileKeys, OpenKeys, open_keys, provider
from agent.daemon.lifecycle import _Line
from agent.daemon.rotation import Rotation
from agent.errors import ControlError, CustodyError, Reason
from ota.client import keyring, memfd
from ota.client.fsops import Fs
from ota.client.keyring import Ring, TlsIdentity
from ota.client.store import Store
from ota.errors import OtaError, StoreError
from ota.errors import Reason as OtaReason
from ota.mqtt import Tls
from ota.payload import key_id


class Kept:
    """A state directory with the keys of an enrolment, and what happened to them."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.fs = Fs(state)
        self.enrolled = FileKeys(state / "keys").create()
        self.secrets = {name: (state / "keys" / name).read_bytes() for name in keys.SECRETS}
        (state / "enrolment").mkdir()
        (state / "enrolment" / "device.crt").write_bytes(b"-----BEGIN CERTIFICATE-----\n")
        folder = state / "enrolment"
        self.enrolment = Enrolment(
            "cam-1", "edge", "b", 1, folder / "device.crt", folder / "ca.crt", b"root", renewal="https://r:1"
        )
        self.events: list[Mapping[str, Any]] = []

    def hand_over(self, *names: str) -> Path:
        """What systemd does: credentials in a folder of their own."""
        folder = self.state.parent / "credentials"
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).write_bytes(self.secrets[name])
            (folder / name).chmod(0o400)
        return folder

    def opened(self, folder: Path | None = None) -> tuple[keys.KeyProvider, OpenKeys]:
        """As a daemon does that got this credentials folder."""
        source = provider(self.state, {"CREDENTIALS_DIRECTORY": str(folder)} if folder else {})
        return source, open_keys(source, self.fs)

    def rotation(
        self, folder: Path | None = None, *, source: keys.KeyProvider | None = None, opened: OpenKeys | None = None
    ) -> Rotation:
        """Over what `opened` gave before, or gives now."""
        if source is None or opened is None:
            source, opened = self.opened(folder)
        store = Store(self.fs, opened.device.storage, 0, opened.device.retired_storage)

        def report(kind: str, facts: Mapping[str, Any], *, alarm: bool = False) -> None:
            self.events.append({"kind": kind, "alarm": alarm, **facts})

        return Rotation(source, opened, self.fs, store, self.enrolment, report)

    @property
    def files(self) -> list[str]:
        return sorted(os.listdir(self.state / "keys"))


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    (tmp_path / "state").mkdir(mode=0o700)
    return Kept(tmp_path / "state")


# -- opening -----------------------------------------------------------------------------------------------------------


def test_models_are_never_sealed_under_the_root_secret_once_a_daemon_ran(kept: Kept) -> None:
    opened = kept.opened()[1]
    assert opened.device.storage != kept.secrets["storage.key"]
    assert opened.device.retired_storage == (kept.secrets["storage.key"],)
    assert opened.keyring is not None
    asyncio.run(kept.rotation().resume())
    assert kept.opened()[1].device.retired_storage == ()


def test_enrolments_keys_are_in_force_until_the_ring_has_others(kept: Kept) -> None:
    opened = kept.opened()[1]
    kid = key_id(kept.enrolled.hpke.public_key().public_bytes_raw())
    assert list(opened.device.hpke) == [kid]
    assert opened.tls == keys.TlsFiles(str(kept.state / "keys" / "device.key"), None)
    assert opened.troubles == ()
    assert opened.keyring is not None
    newer = X25519PrivateKey.generate()
    opened.keyring.update(lambda ring: ring.with_hpke_key(newer.private_bytes_raw()))
    assert list(kept.opened()[1].device.hpke) == [key_id(newer.public_key().public_bytes_raw()), kid]


def test_an_identity_of_the_ring_reaches_the_tls_library_without_a_file(kept: Kept) -> None:
    opened = kept.opened()[1]
    assert opened.keyring is not None
    pem = kept.secrets["device.key"]
    certificate = _self_signed(pem)
    opened.keyring.update(lambda ring: Ring(ring.storage, ring.hpke, TlsIdentity(pem, certificate)))
    tls = kept.opened()[1].tls
    assert tls is not None
    assert tls.certificate is not None
    assert all(path.startswith("/proc/self/fd/") for path in (tls.key, tls.certificate))
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(tls.certificate, tls.key)


def _self_signed(pem: bytes) -> bytes:
    key = serialization.load_pem_private_key(pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cam-1")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_an_identity_that_is_tried_again_and_again_costs_no_descriptors(kept: Kept) -> None:
    tried: list[Tls] = []

    class Away:
        tls = Tls("ca", "", "")

        async def try_tls(self, tls: Tls) -> None:
            tried.append(tls)

    line = _Line(Away())  # type: ignore[arg-type]
    identity = TlsIdentity(kept.secrets["device.key"], b"certificate")
    asyncio.run(line.try_identity(identity))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        asyncio.run(line.try_identity(identity))
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(set(tried)) == 1
    assert Path(tried[0].key).read_bytes() == kept.secrets["device.key"]
    asyncio.run(line.try_identity(TlsIdentity(b"another", b"certificate")))
    assert Path(tried[-1].key).read_bytes() == b"another"


@pytest.mark.parametrize("name", ["storage.key", "hpke.key", "device.key"])
def test_a_device_whose_keys_lie_in_files_does_not_start_without_one(kept: Kept, name: str) -> None:
    (kept.state / "keys" / name).unlink()
    with pytest.raises(CustodyError) as refused:
        kept.opened()
    assert refused.value.reason is Reason.KEY_MISSING


@pytest.mark.fault("F54")
@pytest.mark.parametrize(
    ("sealed", "handed", "troubles", "has"),
    [
        (("storage.key", "hpke.key", "device.key"), (), 2, ()),
        (("storage.key", "hpke.key"), (), 1, ("tls",)),
        (("storage.key", "hpke.key", "device.key"), ("device.key",), 1, ("tls",)),
        (("storage.key", "hpke.key", "device.key"), ("storage.key",), 0, ("tls", "storage", "hpke")),
    ],
)
def test_what_still_works_without_a_credential(
    kept: Kept, sealed: tuple[str, ...], handed: tuple[str, ...], troubles: int, has: tuple[str, ...]
) -> None:
    everything = kept.hand_over(*keys.SECRETS)
    asyncio.run(kept.rotation(everything).seal(keep_tls="device.key" not in sealed))
    shutil.rmtree(everything)
    opened = kept.opened(kept.hand_over(*handed) if handed else None)[1]
    assert [t.reason for t in opened.troubles] == ["sealed_key_unavailable"] * troubles
    assert (opened.tls is not None, bool(opened.device.storage), bool(opened.device.hpke)) == tuple(
        part in has for part in ("tls", "storage", "hpke")
    )


# -- sealing -----------------------------------------------------------------------------------------------------------


def test_sealing_moves_all_keys_into_the_ring_and_leaves_no_file_and_no_byte_of_them(kept: Kept) -> None:
    before = kept.opened()[1].device
    handed = kept.hand_over("storage.key")
    answer = asyncio.run(kept.rotation(handed).seal(keep_tls=False))
    assert sorted(answer["destroyed"]) == sorted(keys.SECRETS)
    assert kept.files == ["ring.cbs", "ring.copy.cbs", "sealed"]
    for path in (kept.state / "keys").iterdir():
        assert not any(secret in path.read_bytes() for secret in kept.secrets.values())
    after = kept.opened(handed)[1]
    assert after.device.storage == before.storage
    assert after.device.hpke.keys() == before.hpke.keys()
    assert after.tls is not None
    assert Path(after.tls.key).read_bytes() == kept.secrets["device.key"]
    assert asyncio.run(kept.rotation(handed).seal(keep_tls=False))["destroyed"] == []


def test_without_its_certificate_no_tls_key_is_sealed_and_so_none_lost(kept: Kept) -> None:
    rotation = kept.rotation(kept.hand_over("storage.key"))
    (kept.state / "enrolment" / "device.crt").unlink()
    with pytest.raises(ControlError) as caught:
        asyncio.run(rotation.seal(keep_tls=False))
    assert (caught.value.reason, bool(caught.value.hint)) == (Reason.NOT_ENROLLED, True)
    assert (kept.state / "keys" / "device.key").read_bytes() == kept.secrets["device.key"]


def test_a_cut_after_the_first_file_was_overwritten_is_made_good_at_the_next_start(kept: Kept) -> None:
    handed = kept.hand_over("storage.key")
    asyncio.run(kept.rotation(handed).seal(keep_tls=False))
    for name in ("hpke.key", "storage.key"):  # names that the cut brought back, with nothing behind them
        (kept.state / "keys" / name).write_bytes(bytes(32))
        (kept.state / "keys" / name).chmod(0o600)
    rotation = kept.rotation(handed)
    asyncio.run(rotation.resume())
    assert kept.files == ["ring.cbs", "ring.copy.cbs", "sealed"]


def test_sealing_needs_a_credential_and_a_sealed_device_takes_no_new_key_files(kept: Kept) -> None:
    with pytest.raises(ControlError) as refused:
        asyncio.run(kept.rotation().seal(keep_tls=False))
    assert refused.value.reason is Reason.BAD_USAGE
    assert kept.files == ["device.key", "hpke.key", "ring.cbs", "ring.copy.cbs", "storage.key"]
    asyncio.run(kept.rotation(kept.hand_over("storage.key")).seal(keep_tls=False))
    files = FileKeys(kept.state / "keys")
    for take in (files.create, files.load):  # for a request, and for a bundle
        with pytest.raises(CustodyError) as unsafe:
            take()
        assert (unsafe.value.reason, "reset" in unsafe.value.hint) == (Reason.KEY_UNSAFE, True)


def test_a_wiped_device_opens_nothing_whatever_the_service_manager_hands_over(kept: Kept) -> None:
    handed = kept.hand_over(*keys.SECRETS)
    asyncio.run(kept.rotation(handed).resume())
    plain = os.urandom(1000)
    name = hashlib.sha256(plain).hexdigest()
    fd = memfd.write_sealed("test", 1000, lambda view: view.__setitem__(slice(None), plain))
    Store(kept.fs, kept.opened(handed)[1].device.storage, 0).put(fd, name, 1000)
    os.close(fd)
    keyring.wipe(kept.fs)
    with pytest.raises(StoreError) as refused:
        kept.opened(handed)
    assert refused.value.reason is OtaReason.KEYS_WIPED
    assert kept.files == ["wiped"]
    # and with the mark removed by hand, the root secret that root can still unseal opens no model
    (kept.state / "keys" / "wiped").unlink()
    device = kept.opened(handed)[1].device
    with pytest.raises(StoreError) as corrupt:
        Store(kept.fs, device.storage, 0, device.retired_storage).open(name)
    assert corrupt.value.reason is OtaReason.PAYLOAD_CORRUPT


# -- rotating ----------------------------------------------------------------------------------------------------------


def test_a_rotated_hpke_key_is_the_updaters_at_once_and_the_oldest_is_forgotten(kept: Kept) -> None:
    source, opened = kept.opened()
    rotation = kept.rotation(source=source, opened=opened)
    made = []
    for _ in range(3):
        made.append(asyncio.run(rotation.rotate(storage=False, hpke=True))["hpke"])
        assert made[-1] in opened.device.hpke
        told(opened)
    assert set(opened.device.hpke) == set(made)
    assert asyncio.run(rotation.show())["hpke"] == made[::-1]


def told(opened: OpenKeys) -> None:
    """What a renewal leaves that went through."""
    assert opened.keyring is not None
    opened.keyring.update(lambda ring: replace(ring, tls=ring.tls_trial, tls_trial=None))


def test_the_key_that_the_server_knows_is_kept_however_often_it_is_rotated_meanwhile(kept: Kept) -> None:
    source, opened = kept.opened()
    enrolled = key_id(kept.enrolled.hpke.public_key().public_bytes_raw())
    rotation = kept.rotation(source=source, opened=opened)
    first = asyncio.run(rotation.rotate(storage=False, hpke=True))["hpke"]
    for _ in range(3):
        with pytest.raises(OtaError) as refused:
            asyncio.run(rotation.rotate(storage=False, hpke=True))
        assert (refused.value.reason, refused.value.retry, bool(refused.value.hint)) == (OtaReason.BUSY, True, True)
    assert list(kept.opened()[1].device.hpke) == [first, enrolled]
    # answered, and the certificate waits for its trial: still none more
    assert opened.keyring is not None
    certificate = TlsIdentity(b"key", b"-----BEGIN CERTIFICATE-----")
    opened.keyring.update(lambda ring: replace(ring, tls_trial=certificate))
    with pytest.raises(OtaError):
        asyncio.run(rotation.rotate(storage=False, hpke=True))


def test_without_a_server_that_learns_of_it_no_hpke_key_is_rotated(kept: Kept) -> None:
    kept.enrolment = replace(kept.enrolment, renewal="")
    before = list(kept.opened()[1].device.hpke)
    with pytest.raises(ControlError) as refused:
        asyncio.run(kept.rotation().rotate(storage=True, hpke=True))
    assert (refused.value.reason, bool(refused.value.hint)) == (Reason.BAD_USAGE, True)
    assert list(kept.opened()[1].device.hpke) == before


def test_a_connection_after_sealing_still_has_its_key_although_the_file_is_gone(kept: Kept) -> None:
    (kept.state / "enrolment" / "device.crt").write_bytes(_self_signed(kept.secrets["device.key"]))
    handed = kept.hand_over("storage.key")
    source, opened = kept.opened(handed)
    assert opened.tls is not None
    asyncio.run(kept.rotation(source=source, opened=opened).seal(keep_tls=False))
    assert "device.key" not in kept.files
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(kept.enrolment.certificate, opened.tls.key)


def test_what_is_missing_is_an_alarm_and_a_rotation_impossible(kept: Kept) -> None:
    handed = kept.hand_over(*keys.SECRETS)
    asyncio.run(kept.rotation(handed).seal(keep_tls=True))
    kept.events.clear()
    rotation = kept.rotation()
    asyncio.run(rotation.resume())
    assert [(e["kind"], e["alarm"], e["reason"]) for e in kept.events] == [("keys", True, "sealed_key_unavailable")]
    with pytest.raises(ControlError) as refused:
        asyncio.run(rotation.rotate(storage=True, hpke=False))
    assert refused.value.reason is Reason.SEALED_KEY_UNAVAILABLE
    assert asyncio.run(rotation.show())["storage"] == {}


# -- what custody is worth ---------------------------------------------------------------------------------------------

HEADS = {
    "host": "5a1c6a86df9d4096b1d5a65e0862f19a",
    "tpm2": "0c7cc07b117645919c4b0bea08bc20fe",
    "host+tpm2": "93a894094874449090caf2fc93cab553",
    "null": "058469daf6f54324800549da0f8ea2fb",
    "unknown": "00" * 16,
}


@pytest.mark.parametrize("kind", HEADS)
def test_what_a_credential_was_sealed_to_is_read_off_its_file(tmp_path: Path, kind: str) -> None:
    sealed = base64.encodebytes(bytes.fromhex(HEADS[kind]) + os.urandom(90))
    (tmp_path / "storage.key.cred").write_bytes(sealed)
    worth = custody.of_credential(tmp_path / "storage.key.cred")
    assert worth.sealed_to == kind
    assert ("opens no model" in worth.text) is (kind in ("tpm2", "host+tpm2"))


@pytest.mark.parametrize("content", [None, b"", b"not base64 \xff", b"AAAA"])
def test_what_cannot_be_read_is_unknown_and_not_guessed(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "c").write_bytes(content)
    assert custody.of_credential(tmp_path / "c").sealed_to == "unknown"


def test_a_key_file_beside_the_credential_is_what_custody_is_worth(kept: Kept) -> None:
    handed = kept.hand_over("storage.key")
    source = provider(kept.state, {"CREDENTIALS_DIRECTORY": str(handed)})
    assert isinstance(source, CredentialKeys)
    assert source.worth.startswith("nothing yet")
    asyncio.run(kept.rotation(handed).seal(keep_tls=False))
    assert not provider(kept.state, {"CREDENTIALS_DIRECTORY": str(handed)}).worth.startswith("nothing")
