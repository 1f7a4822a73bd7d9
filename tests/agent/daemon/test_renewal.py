"""When a certificate is renewed, what is kept before anybody is asked, and what a failure leaves."""

from __future__ import annotations

import asyncio
import datetime
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent.daemon.certificate import validity
from agent.daemon.enroll import Enrolment
from agent.daemon.registrar import Expelled, Wanted
from agent.daemon.renewal import Orders, Policy, Renewal, requested
from ota.client.fsops import Fs
from ota.client.keyring import COPY, Keyring, TlsIdentity
from ota.errors import BrokerError, OtaError, Reason, StoreError

BEGIN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
CUSTODY = bytes(range(32))


class Authority:
    """Issues certificates for the name cam-1, valid 90 days from whenever it is told."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fleet")])
        self.pem = self.issue(self.key.public_key(), BEGIN, self.name)

    def issue(self, key: ec.EllipticCurvePublicKey, begins: datetime.datetime, name: x509.Name | None = None) -> str:
        cam = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cam-1")])
        builder = x509.CertificateBuilder().subject_name(name or cam).issuer_name(self.name).public_key(key)
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(begins).not_valid_after(begins + 90 * DAY)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


class Device:
    """A renewal with a clock, a server and a link that do as the test says."""

    def __init__(self, state: Path) -> None:
        self.now = BEGIN
        self.mono = 0.0
        self.authority = Authority()
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.asked: list[Wanted] = []
        self.tried: list[bytes] = []
        self.told: list[tuple[str, Mapping[str, Any]]] = []
        self.accused: list[Mapping[str, bytes]] = []
        self.added: list[X25519PrivateKey] = []
        self.hurried = 0
        self.link_reason: str | None = None
        self.server: Callable[[Wanted], str] = self.grant
        self.broker: BrokerError | None = None
        (state / "ca.crt").write_text(self.authority.pem)
        self.state = state
        self.enrolment = Enrolment(
            "cam-1", "edge", "b", 1, state / "device.crt", state / "ca.crt", b"root", renewal="https://r:1"
        )
        pem = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self.own = TlsIdentity(pem, self.authority.issue(self.key.public_key(), BEGIN).encode())
        self.hpke = X25519PrivateKey.generate()
        self.boot()

    def boot(self) -> None:
        self.ring = Keyring(Fs(self.state), CUSTODY, (self.hpke.private_bytes_raw(),))
        orders = Orders(
            self.ask, self.accuse, self.added.append, lambda kind, facts, _: self.told.append((kind, facts))
        )
        self.renewal = Renewal(
            self.enrolment, self.ring, self.own, self, orders,
            clock=lambda: self.now, monotonic=lambda: self.mono, rng=random.Random(1), policy=Policy(),
        )  # fmt: skip

    def grant(self, wanted: Wanted) -> str:
        csr = x509.load_pem_x509_csr(wanted.csr.encode())
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return self.authority.issue(key, self.now)

    def ask(self, url: str, ca: str, wanted: Wanted) -> str:
        assert (url, ca) == ("https://r:1", self.authority.pem)
        self.asked.append(wanted)
        return self.server(wanted)

    async def accuse(self, evidence: Mapping[str, bytes]) -> None:
        self.accused.append(evidence)

    # the link
    def status(self) -> dict[str, Any]:
        return {"reason": self.link_reason}

    async def try_identity(self, identity: TlsIdentity) -> BrokerError | None:
        self.tried.append(identity.certificate_pem)
        return self.broker

    def retry_now(self) -> None:
        self.hurried += 1

    def step(self, times: int = 1) -> float:
        async def steps() -> float:
            for _ in range(times):
                delay_s = await self.renewal.step()
            return delay_s

        return asyncio.run(steps())


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def failing(reason: Reason, *, retry: bool = True) -> Callable[[Wanted], str]:
    def refuse(_: Wanted) -> str:
        raise OtaError(reason, "no", hint="do this", retry=retry)

    return refuse


def test_nothing_is_asked_before_two_thirds_of_the_life(device: Device) -> None:
    device.now = BEGIN + 59 * DAY
    assert device.step() > 0
    assert device.asked == []
    due = datetime.datetime.fromisoformat(device.renewal.status()["renewal"])
    assert BEGIN + 60 * DAY <= due <= BEGIN + 62 * DAY
    device.now = BEGIN + 62 * DAY
    device.step()
    assert len(device.asked) == 1


def test_a_renewed_certificate_is_in_force_only_after_it_worked(device: Device) -> None:
    device.now = BEGIN + 62 * DAY
    device.step()
    ring = device.ring.ring
    assert ring.tls is None
    assert ring.tls_trial is not None
    assert validity(ring.tls_trial.certificate_pem).ends == BEGIN + 152 * DAY
    device.step()
    assert device.tried == [ring.tls_trial.certificate_pem]
    assert (device.ring.ring.tls, device.ring.ring.tls_trial) == (ring.tls_trial, None)
    assert device.told[-1][0] == "certificate_renewed"
    assert device.renewal.conditions() == []


def test_the_new_keys_are_on_the_disk_before_the_server_hears_of_them(device: Device) -> None:
    device.now = BEGIN + 62 * DAY
    seen: list[bool] = []

    def look(wanted: Wanted) -> str:
        kept = Keyring(Fs(device.state), CUSTODY).ring
        seen.append(kept.tls_trial is not None and kept.tls_trial.certificate_pem == wanted.csr.encode())
        private = X25519PrivateKey.from_private_bytes(kept.hpke[0])
        seen.append(private.public_key().public_bytes_raw() == wanted.hpke_public)
        seen.append(device.hpke.private_bytes_raw() in kept.hpke)
        raise OtaError(Reason.SERVER_UNREACHABLE, "the power went", retry=True)

    device.server = look
    device.step()
    assert seen == [True, True, True]
    assert [key.private_bytes_raw() for key in device.added] == [Keyring(Fs(device.state), CUSTODY).ring.hpke[0]]
    # after the cut: the same request, no further keys
    device.boot()
    device.server = device.grant
    device.step()
    assert (device.asked[0].csr, device.asked[0].hpke_public) == (device.asked[1].csr, device.asked[1].hpke_public)
    assert len(device.ring.ring.hpke) == 2


def test_a_key_that_the_server_hears_of_opens_grants_although_its_copy_met_a_full_disk(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Fs.write_atomic

    def full(fs: Fs, path: str, data: bytes) -> None:
        if path == COPY and not device.asked:
            raise StoreError(Reason.NO_SPACE, "full", hint="free space", retry=True)
        real(fs, path, data)

    monkeypatch.setattr(Fs, "write_atomic", full)
    device.now = BEGIN + 62 * DAY
    device.step(2)
    assert len(device.asked) == 1
    assert device.asked[0].hpke_public in [key.public_key().public_bytes_raw() for key in device.added]


@pytest.mark.fault("F93")
def test_a_refused_certificate_leaves_the_old_one_in_force_and_another_is_asked_for(device: Device) -> None:
    device.now = BEGIN + 62 * DAY
    device.step()
    device.broker = BrokerError(Reason.BROKER_REFUSED, "refused our certificate", retry=True)
    for _ in range(3):
        assert device.step() > 0
    assert device.ring.ring.tls is None
    assert device.ring.ring.tls_trial is None
    assert device.renewal.status()["reason"] == "broker_refused"
    assert [kind for kind, _ in device.told] == ["renewal_failed"]
    device.step()
    assert len(device.asked) == 2
    assert device.asked[0].csr != device.asked[1].csr


def test_a_broker_that_refuses_for_long_costs_no_key_that_grants_were_made_for(device: Device) -> None:
    device.now = BEGIN + 62 * DAY
    device.broker = BrokerError(Reason.BROKER_REFUSED, "refused our certificate", retry=True)
    device.step(24)
    assert len(device.asked) == 6
    assert len({wanted.csr for wanted in device.asked}) == 6
    assert device.hpke.private_bytes_raw() in device.ring.ring.hpke
    # the next renewal has a new one again
    device.broker = None
    device.step(2)
    first = device.ring.ring.hpke[0]
    device.now += 62 * DAY
    device.mono += 62 * DAY.total_seconds()
    device.step(2)
    assert device.ring.ring.hpke[0] != first


def test_a_request_that_a_rotation_began_is_sent_long_before_the_certificate_is_due(device: Device) -> None:
    device.step()
    assert device.asked == []
    before = device.ring.ring.hpke[0]
    device.ring.update(lambda ring: requested(ring, "cam-1", hpke=True))
    device.server = failing(Reason.SERVER_UNREACHABLE)
    assert device.step() > 0
    device.boot()
    device.server = device.grant
    device.step(2)
    private = X25519PrivateKey.from_private_bytes(device.ring.ring.hpke[0])
    assert [wanted.hpke_public for wanted in device.asked] == [private.public_key().public_bytes_raw()] * 2
    assert device.ring.ring.hpke[1] == before
    assert (device.ring.ring.tls is not None, device.ring.ring.tls_trial) == (True, None)
    device.step(3)
    assert len(device.asked) == 2


def test_a_clock_that_is_far_ahead_does_not_renew_without_end(device: Device) -> None:
    """By it every new certificate is due at once, and each costs a take-over and a key that grants were made for."""
    real = BEGIN + 5 * DAY

    def grant(wanted: Wanted) -> str:
        key = x509.load_pem_x509_csr(wanted.csr.encode()).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return device.authority.issue(key, real)

    device.server = grant
    device.now = real + 70 * DAY
    device.step(20)
    assert len(device.asked) == 1
    assert device.ring.ring.tls is not None
    device.mono += 46 * DAY.total_seconds()
    device.step()
    assert len(device.asked) == 2


def test_a_broker_that_is_away_says_nothing_against_a_certificate(device: Device) -> None:
    device.now = BEGIN + 62 * DAY
    device.step()
    device.broker = BrokerError(Reason.BROKER_UNREACHABLE, "away", retry=True)
    device.step(10)
    assert len(device.asked) == 1
    assert device.ring.ring.tls_trial is not None
    device.broker = None
    device.step()
    assert device.ring.ring.tls is not None


def test_failures_are_repeated_ever_more_slowly_and_faster_towards_the_end(device: Device) -> None:
    device.server = failing(Reason.SERVER_UNREACHABLE)
    device.now = BEGIN + 62 * DAY
    delays = [device.step() for _ in range(14)]
    assert 15 <= delays[0] <= 30
    assert max(delays) <= 6 * 3600
    assert delays[-1] >= 3 * 3600
    device.now = BEGIN + 90 * DAY - datetime.timedelta(minutes=10)
    assert device.step() <= 60
    assert [condition["type"] for condition in device.renewal.conditions()] == ["CertificateExpiring"]
    assert device.renewal.conditions()[0]["reason"] == "server_unreachable"


@pytest.mark.parametrize("where", ["link", "server"])
def test_a_clock_that_is_behind_is_waited_for(device: Device, where: str) -> None:
    device.now = BEGIN + 62 * DAY
    if where == "link":
        device.link_reason = "broker_not_yet_valid"
        device.now = BEGIN - 300 * DAY
    else:
        device.server = failing(Reason.SERVER_NOT_YET_VALID)
    delays = [device.step() for _ in range(5)]
    assert max(delays) <= 30
    assert "ClockWait" in [condition["type"] for condition in device.renewal.conditions()]


def test_when_the_clock_is_set_the_link_is_tried_at_once(device: Device) -> None:
    device.link_reason = "broker_not_yet_valid"
    device.now = BEGIN - 300 * DAY

    async def main() -> None:
        task = asyncio.create_task(device.renewal.run())
        await asyncio.sleep(0.01)
        assert device.hurried == 0
        device.now = BEGIN + 10 * DAY
        device.renewal.poke()
        await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(main())
    assert device.hurried == 1


def test_without_a_server_a_person_is_told_in_time(device: Device) -> None:
    device.enrolment = Enrolment("cam-1", "edge", "b", 1, device.state / "device.crt", device.state / "ca.crt", b"root")
    device.boot()
    device.now = BEGIN + 65 * DAY
    device.step()
    assert device.renewal.conditions() == []
    device.now = BEGIN + 75 * DAY
    device.step()
    assert device.asked == []
    assert device.renewal.conditions()[0]["reason"] == "no_server"


def test_of_an_answer_nothing_but_the_certificate_is_kept(device: Device) -> None:
    device.server = lambda wanted: "a comment\n" + device.grant(wanted) + device.authority.pem + "# " + "x" * 20_000
    device.now = BEGIN + 62 * DAY
    device.step()
    kept = device.ring.ring.tls_trial
    assert kept is not None
    assert kept.certificate_pem.count(b"BEGIN") == 1
    assert len(kept.certificate_pem) < 1500


@pytest.mark.parametrize("kind", ["another authority", "another key"])
def test_a_wrong_answer_of_the_server_is_not_kept(device: Device, kind: str) -> None:
    other = ec.generate_private_key(ec.SECP256R1()).public_key()

    def answer(wanted: Wanted) -> str:
        return (
            device.authority.issue(other, device.now) if kind == "another key" else Authority().issue(other, device.now)
        )

    device.server = answer
    device.now = BEGIN + 62 * DAY
    device.step()
    assert device.renewal.status()["reason"] == "bad_proof"
    kept = device.ring.ring.tls_trial
    assert kept is not None
    assert b"REQUEST" in kept.certificate_pem


def test_a_server_that_says_revoked_is_not_believed_but_its_documents_are_judged(device: Device) -> None:
    def expel(_: Wanted) -> str:
        raise Expelled("revoked", "ask", {"desired": b"{}"})

    device.server = expel
    device.now = BEGIN + 62 * DAY
    device.step()
    assert device.accused == [{"desired": b"{}"}]
    assert device.ring.ring.storage == (CUSTODY,)
    assert device.renewal.status()["reason"] == "device_revoked"


def test_a_device_that_is_refused_for_long_asks_the_server_why(device: Device) -> None:
    device.link_reason = "broker_refused"
    assert device.step() <= 30
    device.mono += 601
    device.step()
    assert len(device.asked) == 1


def test_the_dates_of_a_certificate_are_those_that_a_library_reads(device: Device) -> None:
    for begins in (BEGIN, datetime.datetime(2049, 12, 1, tzinfo=datetime.UTC)):
        pem = device.authority.issue(device.key.public_key(), begins).encode()
        known = x509.load_pem_x509_certificate(pem)
        assert validity(pem).begins == known.not_valid_before_utc
        assert validity(pem).ends == known.not_valid_after_utc


@pytest.mark.parametrize("cut", [0, 1, 30, 100, 200])
def test_what_is_no_certificate_has_no_dates(device: Device, cut: int) -> None:
    der = x509.load_pem_x509_certificate(device.own.certificate_pem).public_bytes(serialization.Encoding.DER)
    import base64

    body = base64.encodebytes(der[:cut]).decode()
    with pytest.raises(ValueError):
        validity(f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n".encode())
