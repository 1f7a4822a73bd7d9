"""The enrolment listener over real TLS: what it answers, and what it spends on strangers."""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import dataclasses
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from ota import enrolment
from ota.errors import OtaError, Reason
from ota.payload import key_id
from ota.publisher import renewal, revocation, tokens
from ota.publisher.arguments import listening_address, web_address
from ota.publisher.deviceverbs import start_listener
from ota.publisher.enroll import MAX_OLDER, Places, load_device, parse_request
from ota.publisher.listener import Bounds, Listener, Registrar, tls_context
from ota.publisher.repository import Repository
from tests.ota.publisher.conftest import FakeDevice, ManualClock

PLACES = Places("broker.example", 8883)


class Running:
    """A listener on a loopback port."""

    def __init__(self, repository: Repository, bounds: Bounds) -> None:
        self.said: list[str] = []
        self.registrar = Registrar(repository, PLACES, clock=time.monotonic, bounds=bounds)
        context = tls_context(repository, ("127.0.0.1",))
        self.listener = Listener(self.registrar, ("127.0.0.1", 0), context, self.said.append, bounds)
        self.port = self.listener.start()
        self.ca = (repository.path / "keys" / "ca.pem").read_text()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        context = ssl.create_default_context(cadata=self.ca)
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=20, context=context)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def connected(self) -> ssl.SSLSocket:
        """A connection on which nothing was said."""
        context = ssl.create_default_context(cadata=self.ca)
        return context.wrap_socket(socket.create_connection(("127.0.0.1", self.port)), server_hostname="127.0.0.1")

    def tell(self, raw: bytes) -> bytes:
        """Everything that is answered to `raw`."""
        heard = b""
        with self.connected() as secured:
            secured.settimeout(60)
            secured.sendall(raw)
            with contextlib.suppress(ConnectionResetError):
                while more := secured.recv(65536):
                    heard += more
        return heard


BOUNDS = Bounds(connections=4, read_timeout_s=0.5, total_s=1.5, address_burst=1000, address_per_s=100)


@pytest.fixture
def running(repository: Repository) -> Iterator[Running]:
    made = Running(repository, BOUNDS)
    yield made
    made.listener.close()


class Old:
    """A device with a certificate, and its next keys."""

    def __init__(self, repository: Repository, name: str = "cam-7") -> None:
        self.device = FakeDevice(name)
        self.certificate = json.loads(self.device.enroll(repository).bundle)["certificate"]
        self.next = FakeDevice(name)

    def later(self, renewed: renewal.Renewed | None) -> Old:
        """The same device when it uses its new certificate, or, without one, when it makes new keys once more."""
        self.next, used = FakeDevice(self.device.name), self.next
        if renewed is None:
            return self
        made = copy.copy(self)
        made.device, made.certificate, made.next = used, renewed.certificate, FakeDevice(self.device.name)
        return made

    def fields(self, nonce: str, **changes: Any) -> dict[str, Any]:
        made = {
            "version": 1, "device": self.device.name, "certificate": self.certificate, "nonce": nonce,
            "csr": self.next.csr(),
            "hpke_public": base64.b64encode(self.next.hpke.public_key().public_bytes_raw()).decode(),
        } | changes  # fmt: skip
        key = self.device.key
        signature = key.sign(enrolment.proof_input(made), ec.ECDSA(hashes.SHA256()))
        return {"signature": base64.b64encode(signature).decode(), **made}


def test_a_device_enrols_over_https_and_an_error_has_its_status_reason_and_hint(
    running: Running, repository: Repository
) -> None:
    made = tokens.make(repository, "cam-7")
    device = FakeDevice("cam-7")
    request = {**json.loads(device.request()), "token": made.text}
    status, answer = running.ask("POST", "/enroll", request)
    assert status == 200
    assert json.loads(answer["bundle"])["device"] == "cam-7"
    status, answer = running.ask("POST", "/enroll", {**json.loads(FakeDevice("cam-7").request()), "token": made.text})
    assert (status, answer["error"], bool(answer["hint"])) == (403, "token_used", True)
    assert "token_used" in running.said[-1]
    assert made.text.split(".")[2] not in "".join(running.said)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason"),
    [
        ("POST", "/enroll", b"{" * 200, 400, "bad_json"),
        ("POST", "/enroll", b"[]", 400, "bad_request"),
        ("POST", "/enroll", {"version": 2}, 400, "bad_request"),
        ("POST", "/enroll", b"x" * 40_000, 400, "bad_request"),
        ("POST", "/renew", {"version": 1}, 400, "bad_request"),
        ("GET", "/../repo.toml", None, 404, "not_found"),
        ("GET", "/enroll", None, 404, "not_found"),
        ("PUT", "/enroll", None, 400, "bad_request"),
    ],
)
def test_what_is_no_request_is_refused(
    running: Running, method: str, path: str, body: Any, status: int, reason: str
) -> None:
    answered, told = running.ask(method, path, body)
    assert (answered, told["error"]) == (status, reason)


@settings(max_examples=60, deadline=None)
@given(body=st.binary(max_size=300) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["version", "token", "device", "csr", "hpke_public", "nonce", "certificate", "signature"]), inner, max_size=8),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_whatever_is_posted_is_answered_with_a_reason(body: bytes) -> None:
    class NoRepository:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was touched before the request was checked")

    registrar = Registrar(NoRepository(), PLACES, clock=lambda: 0.0)  # type: ignore[arg-type]
    for path in ("/enroll", "/renew"):
        with pytest.raises(OtaError) as caught:
            registrar.answer("a", "POST", path, body)
        assert caught.value.reason in (Reason.BAD_JSON, Reason.BAD_REQUEST, Reason.UNKNOWN_DEVICE)


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"GET /ca HTTP/9\r\n\r\n",
        b"\x1b[1E192.0.2.1 /ca HTTP/1.0\r\n\r\n",  # which moves a terminal to a new line
        b"A" * 9000 + b" /ca HTTP/1.0\r\n\r\n",
    ],
    ids=["words", "version", "escape", "long"],
)
def test_what_is_no_http_is_answered_with_a_reason_too(repository: Repository, raw: bytes) -> None:
    running = Running(repository, dataclasses.replace(BOUNDS, read_timeout_s=60, total_s=120))
    try:
        head, _, body = running.tell(raw).partition(b"\r\n\r\n")
    finally:
        running.listener.close()
    assert head.startswith(b"HTTP/1.0 400 ")
    assert json.loads(body)["error"] == "bad_request"
    assert len(running.said) == 1
    assert running.said[0].isprintable()
    assert len(running.said[0]) < 200


def test_a_head_without_end_is_not_read_to_its_end(repository: Repository) -> None:
    running = Running(repository, dataclasses.replace(BOUNDS, read_timeout_s=60, total_s=120))
    begun = b"GET /nonce HTTP/1.0\r\nX-a: "
    try:
        # no more than is read: on bytes that nobody reads the answer would be lost
        answer = running.tell(begun + b"b" * (16 * 1024 - len(begun)))
    finally:
        running.listener.close()
    assert (answer[:13], b"too long" in answer) == (b"HTTP/1.0 400 ", True)


def test_addresses_of_one_subscriber_count_as_one(repository: Repository) -> None:
    registrar = Registrar(
        repository, PLACES, clock=lambda: 0.0, bounds=dataclasses.replace(BOUNDS, address_burst=2, address_per_s=0)
    )
    for address in ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", "2001:db8:1:3::1", "192.0.2.1", "::ffff:192.0.2.1"):
        registrar.answer(address, "GET", "/nonce", b"")
    for address in ("2001:db8:1:2::3", "192.0.2.1"):
        with pytest.raises(OtaError) as caught:
            registrar.answer(address, "GET", "/nonce", b"")
        assert caught.value.reason is Reason.TOO_MANY_ATTEMPTS
    registrar.answer("2001:db8:1:3::2", "GET", "/nonce", b"")
    registrar.answer("192.0.2.2", "GET", "/nonce", b"")


def test_a_slow_stranger_is_hung_up_and_others_are_served_meanwhile(running: Running) -> None:
    slow = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(3)]
    context = ssl.create_default_context(cadata=running.ca)
    drip = context.wrap_socket(slow[0], server_hostname="127.0.0.1")
    drip.send(b"POST /enroll HTTP/1.0\r\n")
    assert running.ask("GET", "/nonce")[0] == 200
    began = time.monotonic()
    drip.settimeout(10)
    with contextlib.suppress(OSError):
        while time.monotonic() - began < 8:
            drip.send(b"X-a: b\r\n")
            time.sleep(0.2)
    assert time.monotonic() - began < 6
    for sock in slow[1:]:
        sock.settimeout(5)
        assert sock.recv(1) == b""
        sock.close()


def test_more_connections_than_allowed_are_closed_unread(running: Running) -> None:
    held = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(BOUNDS.connections)]
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", running.port)) as extra:
        extra.settimeout(5)
        assert extra.recv(1) == b""
    for sock in held:
        sock.close()


def test_a_connection_for_which_there_is_no_thread_ends_and_the_next_is_served(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = threading.Thread.start
    short = iter([True])

    def start(thread: threading.Thread) -> None:
        if next(short, False):
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with socket.create_connection(("127.0.0.1", running.port)) as ended:
        ended.settimeout(60)
        assert ended.recv(1) == b""
    assert running.ask("GET", "/nonce")[0] == 200


def test_one_address_holds_so_many_connections_and_leaves_room_for_others(repository: Repository) -> None:
    running = Running(repository, dataclasses.replace(BOUNDS, read_timeout_s=5, total_s=10, address_connections=2))
    held = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(2)]
    try:
        time.sleep(0.2)
        with socket.create_connection(("127.0.0.1", running.port)) as extra:
            extra.settimeout(5)
            assert extra.recv(1) == b""
        context = ssl.create_default_context(cadata=running.ca)
        with socket.create_connection(("127.0.0.1", running.port), source_address=("127.0.0.2", 0)) as other:
            with context.wrap_socket(other, server_hostname="127.0.0.1") as secured:
                secured.sendall(b"GET /nonce HTTP/1.0\r\n\r\n")
                assert secured.recv(65536).startswith(b"HTTP/1.0 200")
    finally:
        for sock in held:
            sock.close()
        running.listener.close()


def test_a_connection_that_ends_leaves_the_next_one_alone(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one may get its descriptor before it has cleared up."""
    closed, taken = threading.Event(), threading.Event()

    class Late(ssl.SSLSocket):
        def __exit__(self, *caught: Any) -> None:
            super().__exit__(*caught)
            closed.set()
            taken.wait(5)

    died: list[object] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    running = Running(repository, BOUNDS)
    running.listener.context.sslsocket_class = Late
    try:
        assert running.ask("GET", "/nonce")[0] == 200
        assert closed.wait(5)
        with socket.create_connection(("127.0.0.1", running.port)) as slow:
            time.sleep(0.1)
            taken.set()
            slow.settimeout(10)
            assert slow.recv(1) == b""
        assert running.ask("GET", "/nonce")[0] == 200
    finally:
        running.listener.close()
    assert died == []


def test_one_address_may_try_so_often_and_no_more(repository: Repository) -> None:
    now = [0.0]
    registrar = Registrar(repository, PLACES, clock=lambda: now[0], bounds=Bounds(address_burst=3, address_per_s=1))
    for _ in range(3):
        registrar.answer("192.0.2.1", "GET", "/nonce", b"")
    with pytest.raises(OtaError) as caught:
        registrar.answer("192.0.2.1", "GET", "/nonce", b"")
    assert (caught.value.reason.value, caught.value.retry) == ("too_many_attempts", True)
    registrar.answer("192.0.2.2", "GET", "/nonce", b"")
    now[0] += 2
    registrar.answer("192.0.2.1", "GET", "/nonce", b"")


# --- renewal ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def nonces() -> renewal.Nonces:
    return renewal.Nonces(time.monotonic)


def attempt(repository: Repository, old: Old, nonces: renewal.Nonces, **changes: Any) -> renewal.Renewed:
    return renewal.renew(repository, old.fields(nonces.make(), **changes), nonces)


def why(repository: Repository, old: Old, nonces: renewal.Nonces, **changes: Any) -> str:
    with pytest.raises(OtaError) as caught:
        attempt(repository, old, nonces, **changes)
    assert caught.value.hint
    return caught.value.reason.value


def test_a_renewal_gives_a_certificate_for_the_new_key_and_keeps_both_hpke_keys_until_the_next_grant(
    repository: Repository, nonces: renewal.Nonces
) -> None:
    old = Old(repository)
    first = load_device(repository, "cam-7")
    renewed = attempt(repository, old, nonces)
    certificate = x509.load_pem_x509_certificate(renewed.certificate.encode())
    assert certificate.public_key() == old.next.key.public_key()
    known = load_device(repository, "cam-7")
    assert known.hpke_public == old.next.hpke.public_key().public_bytes_raw()
    assert known.former_hpke == first.hpke_public
    assert [one.serial for one in known.certificates] == [certificate.serial_number, first.certificate_serial]
    # the answer was lost: the same request gets the same certificate
    assert attempt(repository, old, nonces).certificate == renewed.certificate


def test_an_ended_certificate_renews_within_the_grace_and_not_beyond(
    repository: Repository, nonces: renewal.Nonces, clock: ManualClock
) -> None:
    old, late = Old(repository), Old(repository, "cam-8")
    clock.advance(825 + 360)
    assert attempt(repository, old, nonces).device.device == "cam-7"
    clock.advance(10)
    assert why(repository, late, nonces) == "certificate_expired"


def test_a_key_of_a_board_that_was_replaced_renews_nothing_although_its_certificate_had_left_the_record(
    repository: Repository, nonces: renewal.Nonces, clock: ManualClock
) -> None:
    first = Old(repository)
    clock.advance(560)
    second = first.later(attempt(repository, first, nonces))
    clock.advance(560)
    attempt(repository, second, nonces)
    with repository.locked():
        revocation.take_over(repository, parse_request(FakeDevice("cam-7").request()), PLACES)
    # it ended 295 days ago, within the grace, and was not known any longer when the board was replaced
    assert why(repository, first.later(None), nonces) == "device_revoked"
    assert why(repository, second, nonces) == "device_revoked"


def test_a_certificate_that_ended_renews_again_while_nothing_newer_was_used(
    repository: Repository, nonces: renewal.Nonces, clock: ManualClock
) -> None:
    old = Old(repository)
    clock.advance(825 + 10)
    for _ in range(3):  # the broker refused what it got, so it asks for another
        attempt(repository, old.later(None), nonces)


def test_every_certificate_that_a_stolen_key_got_is_revoked_with_the_device(
    repository: Repository, nonces: renewal.Nonces
) -> None:
    stolen = Old(repository)
    issued = {attempt(repository, stolen.later(None), nonces).device.certificate_serial for _ in range(MAX_OLDER + 3)}
    revocation.revoke(repository, "cam-7")
    listed = {entry.serial_number for entry in x509.load_pem_x509_crl((repository.path / "revoked.pem").read_bytes())}
    assert issued <= listed


def test_the_audit_shows_a_renewal_with_a_key_that_is_not_the_newest_as_a_copied_one_would_be(
    repository: Repository, nonces: renewal.Nonces, clock: ManualClock
) -> None:
    board = Old(repository)
    clock.advance(560)
    copied = copy.copy(board)
    copied.next = FakeDevice("cam-7")
    used = board.later(attempt(repository, board, nonces))
    attempt(repository, copied, nonces)
    attempt(repository, used, nonces)
    lines = [json.loads(line) for line in (repository.path / "audit.jsonl").read_text().splitlines()]
    renewed = [(line["superseded"], line["shown"]) for line in lines if line["action"] == "renewed"]
    first = f"{x509.load_pem_x509_certificate(board.certificate.encode()).serial_number:x}"
    assert [superseded for superseded, _ in renewed] == [False, True, True]
    assert [shown for _, shown in renewed][:2] == [first, first]


def test_a_device_that_is_revoked_again_and_again_is_named_by_each_key_that_it_may_have(
    repository: Repository, nonces: renewal.Nonces
) -> None:
    old = Old(repository)
    attempt(repository, old, nonces)
    keys = {key_id(device.hpke.public_key().public_bytes_raw()) for device in (old.device, old.next)}
    for decommission in (False, False, True):
        revocation.revoke(repository, "cam-7", decommission=decommission)
        desired = repository.read_desired("cam-7")
        assert desired is not None
        assert set(json.loads(desired)["signed"]["revoked_keys"]) == keys


def test_without_the_authoritys_key_a_device_is_told_all_the_same_that_it_is_revoked(repository: Repository) -> None:
    Old(repository)
    key = repository.path / "keys" / "ca.key"
    key.rename(repository.path / "drawer.key")
    with pytest.raises(OtaError) as caught:
        revocation.revoke(repository, "cam-7")
    assert caught.value.reason is Reason.KEY_MISSING
    desired = repository.read_desired("cam-7")
    assert desired is not None
    assert json.loads(desired)["signed"]["revoked"] is True
    assert '"action":"revoked"' in (repository.path / "audit.jsonl").read_text()
    (repository.path / "drawer.key").rename(key)
    assert revocation.revoke(repository, "cam-7").crl.is_file()


@pytest.mark.parametrize("damage", ["its document", "the key for it"])
def test_a_device_that_cannot_be_told_that_it_is_revoked_is_refused_by_the_broker_all_the_same(
    repository: Repository, damage: str
) -> None:
    serial = x509.load_pem_x509_certificate(Old(repository).certificate.encode()).serial_number
    if damage == "its document":
        repository.desired_path("cam-7").write_bytes(b"{")
    else:
        (repository.path / "keys" / "director.pem").unlink()
    with pytest.raises(OtaError) as caught:
        revocation.revoke(repository, "cam-7")
    assert caught.value.reason in (Reason.STATE_CORRUPT, Reason.KEY_MISSING)
    listed = x509.load_pem_x509_crl((repository.path / "revoked.pem").read_bytes())
    assert listed.get_revoked_certificate_by_serial_number(serial) is not None
    assert '"action":"revoked"' in (repository.path / "audit.jsonl").read_text()


def test_a_renewal_brings_the_later_certificate_of_the_authority_under_which_older_ones_stay_valid(
    running: Running, repository: Repository
) -> None:
    old = Old(repository)
    before = repository.authority.certificate()
    later = repository.authority.renew(repository.now().replace(microsecond=0) + timedelta(days=1), 7300)
    issued = x509.load_pem_x509_certificate(old.certificate.encode())
    for certificate in (before, later):
        issued.verify_directly_issued_by(certificate)
    nonce = running.ask("POST", "/nonce", {})[1]["nonce"]  # over a connection that trusts the former one alone
    status, answer = running.ask("POST", "/renew", old.fields(nonce))
    assert (status, x509.load_pem_x509_certificate(answer["ca"].encode())) == (200, later)
    assert enrolment.ca_fingerprint(answer["ca"]) == enrolment.ca_fingerprint(running.ca)
    with pytest.raises(OtaError) as caught:
        repository.authority.renew(repository.now(), 7299)
    assert caught.value.reason is Reason.BAD_SPEC
    assert repository.authority.certificate() == later


def test_no_certificate_outlives_the_authority_and_none_is_issued_after_its_end(
    repository: Repository, clock: ManualClock
) -> None:
    end = repository.authority.certificate().not_valid_after_utc
    clock.advance(7300 - 100)
    issued = json.loads(FakeDevice("cam-1").enroll(repository).bundle)["certificate"]
    assert x509.load_pem_x509_certificate(issued.encode()).not_valid_after_utc == end
    clock.advance(101)
    with pytest.raises(OtaError) as caught:
        FakeDevice("cam-2").enroll(repository)
    assert (caught.value.reason, "renew-ca" in caught.value.hint) == (Reason.CERTIFICATE_EXPIRED, True)


@pytest.mark.fault("F52")
def test_a_revoked_device_and_a_revoked_certificate_get_nothing(repository: Repository, nonces: renewal.Nonces) -> None:
    old, other = Old(repository), Old(repository, "cam-8")
    revocation.revoke(repository, "cam-7")
    assert why(repository, old, nonces) == "device_revoked"
    with repository.locked():
        revocation.revoke_certificates(repository, load_device(repository, "cam-8"), "early")
    assert why(repository, other, nonces) == "device_revoked"


def test_the_refusal_of_a_revoked_device_carries_what_proves_it(running: Running, repository: Repository) -> None:
    old = Old(repository)
    revocation.revoke(repository, "cam-7")
    nonce = running.ask("POST", "/nonce", {})[1]["nonce"]
    status, answer = running.ask("POST", "/renew", old.fields(nonce))
    assert (status, answer["error"]) == (403, "device_revoked")
    names = set(answer["evidence"])
    assert {"timestamp", "snapshot.1", "targets.1", "root.1", "desired"} <= names
    assert json.loads(base64.b64decode(answer["evidence"]["desired"]))["signed"]["revoked"] is True


@pytest.mark.fault("F47")
@pytest.mark.parametrize("what", ["device", "csr", "hpke_public", "nonce", "certificate"])
def test_no_part_of_a_request_can_be_exchanged(repository: Repository, nonces: renewal.Nonces, what: str) -> None:
    old, other = Old(repository), Old(repository, "cam-8")
    fields = old.fields(nonces.make())
    fields[what] = other.fields(nonces.make())[what]
    with pytest.raises(OtaError) as caught:
        renewal.renew(repository, fields, nonces)
    assert caught.value.reason in (Reason.BAD_PROOF, Reason.BAD_REQUEST)
    assert load_device(repository, "cam-7").older == ()


def test_a_nonce_counts_once_and_for_a_while(repository: Repository) -> None:
    now = [0.0]
    nonces = renewal.Nonces(lambda: now[0])
    old = Old(repository)
    fields = old.fields(nonces.make())
    renewal.renew(repository, fields, nonces)
    with pytest.raises(OtaError) as caught:
        renewal.renew(repository, fields, nonces)
    assert caught.value.reason is Reason.BAD_PROOF
    kept = nonces.make()
    now[0] = renewal.NONCE_LIFE_S + 1
    assert not nonces.use(kept)
    assert not nonces.use(renewal.Nonces(lambda: now[0]).make())
    assert not nonces.use("AAAA")


def test_a_certificate_of_another_authority_proves_nothing(
    repository: Repository, nonces: renewal.Nonces, tmp_path: Path
) -> None:
    from ota.publisher.create import create

    stranger = Old(create(tmp_path / "stranger"))
    FakeDevice("cam-7").enroll(repository)
    assert why(repository, stranger, nonces) == "bad_proof"


def test_one_device_gets_so_many_certificates_and_no_more(repository: Repository) -> None:
    bounds = Bounds(address_burst=1000, device_burst=2, device_per_s=0.001)
    registrar = Registrar(repository, PLACES, clock=lambda: 0.0, bounds=bounds)
    old = Old(repository)
    reasons = []
    for _ in range(3):
        old.next = FakeDevice("cam-7", hpke=X25519PrivateKey.generate())
        nonce = registrar.answer("a", "GET", "/nonce", b"")["nonce"]
        try:
            registrar.answer("a", "POST", "/renew", json.dumps(old.fields(nonce)).encode())
        except OtaError as e:
            reasons.append(e.reason.value)
    assert reasons == ["too_many_attempts"]


def test_the_listeners_own_certificate_is_made_renewed_and_made_again_when_its_key_is_another(
    repository: Repository, clock: ManualClock
) -> None:
    def serial() -> int:
        tls_context(repository, ("127.0.0.1",))
        return x509.load_pem_x509_certificate((repository.path / "keys/listener.pem").read_bytes()).serial_number

    first = serial()
    assert serial() == first
    clock.advance(500)
    second = serial()
    assert second != first
    # a power cut between key and certificate
    repository.authority.issue_client("ota_x", datetime.now().astimezone(), 1)
    (repository.path / "keys/listener.key").write_bytes((repository.path / "keys/ota_x.key").read_bytes())
    assert serial() != second


def test_the_revocation_list_names_every_certificate_and_forgets_what_nobody_accepts(
    repository: Repository, clock: ManualClock, nonces: renewal.Nonces
) -> None:
    old = Old(repository)
    first = load_device(repository, "cam-7").certificate_serial
    second = attempt(repository, old, nonces).device.certificate_serial
    revocation.revoke(repository, "cam-7")
    path = repository.path / "revoked.pem"

    def listed() -> set[int]:
        crl = x509.load_pem_x509_crl(path.read_bytes())
        assert crl.is_signature_valid(repository.authority.certificate().public_key())  # type: ignore[arg-type]
        assert crl.next_update_utc is not None
        assert crl.next_update_utc - repository.now() > timedelta(days=3000)
        return {entry.serial_number for entry in crl}

    assert listed() == {first, second}
    clock.advance(825 + 366)
    FakeDevice("cam-8").enroll(repository)
    revocation.revoke(repository, "cam-8")
    assert listed() == {load_device(repository, "cam-8").certificate_serial}


def test_revoking_twice_is_well_and_a_decommissioned_device_loses_its_releases(repository: Repository) -> None:
    FakeDevice("cam-7").enroll(repository)
    once = revocation.revoke(repository, "cam-7")
    again = revocation.revoke(repository, "cam-7", decommission=True)
    assert again.device.revoked == once.device.revoked
    assert dataclasses.replace(again.device, decommissioned=False, desired_version=0) == dataclasses.replace(
        once.device, desired_version=0
    )
    assert again.desired_version == once.desired_version + 1


def test_a_listener_without_an_address_that_devices_can_use_is_refused(repository: Repository) -> None:
    with pytest.raises(OtaError) as caught:
        start_listener(repository, ("0.0.0.0", 0), ("broker.example", 8883), "", "")
    assert (caught.value.reason.value, "--url" in caught.value.hint) == ("bad_usage", True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OtaError) as caught:
            start_listener(repository, taken.getsockname()[:2], ("broker.example", 8883), "", "")
    assert (caught.value.reason.value, "--bind" in caught.value.hint) == ("io_error", True)


@pytest.mark.parametrize(
    "text", ["http://a:1", "https://a:0", "https://a:99999", "https://u@a:1", "a:1", "https://a:1/?q"]
)
def test_what_is_no_web_address_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        web_address(text)


def test_a_web_address_is_written_one_way() -> None:
    assert web_address("https://a/") == "https://a:443"
    assert web_address("https://[::1]:8/x/") == "https://[::1]:8/x"
    assert listening_address("0.0.0.0") == ("0.0.0.0", enrolment.DEFAULT_PORT)
    assert listening_address("[::1]:99") == ("::1", 99)
