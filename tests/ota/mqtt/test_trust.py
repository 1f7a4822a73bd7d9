"""Whom the client talks to: mutual TLS, and what each kind of refusal is called."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import pytest

from ota.errors import Reason
from ota.mqtt import Limits, Lost, Message, ReconnectPolicy, Sent
from tests.fakes.broker import Authority, Broker, Identity
from tests.fakes.impostor import Impostor
from tests.fakes.ports import free_port

from .conftest import MakeClient


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def test_a_device_with_its_own_certificate_is_let_in(shared_broker: Broker, make_client: MakeClient) -> None:
    client = make_client(shared_broker, "cam-1")
    connected = client.ready()
    assert connected.number == 1
    assert connected.max_packet_bytes == 131072, "as packaging/mosquitto/mosquitto.conf says"
    assert client.mqtt.connected
    assert client.mqtt.alive


@pytest.mark.fault("F78")
def test_a_broker_of_another_authority_is_refused(
    tmp_path: Path, authority: Authority, make_client: MakeClient
) -> None:
    other = Authority(tmp_path / "other").issue("broker", hosts=["127.0.0.1"])
    with Impostor(other) as impostor:
        lost = make_client(("127.0.0.1", impostor.port), "cam-1").expect(Lost)
        assert lost.error.reason is Reason.BROKER_UNTRUSTED
        assert impostor.heard[0] == b"", "nothing was said to it"


@pytest.mark.fault("F78")
def test_a_broker_with_a_certificate_for_another_name_is_refused(authority: Authority, make_client: MakeClient) -> None:
    with Impostor(authority.issue("broker", hosts=["elsewhere.example", "192.0.2.7"])) as impostor:
        for host in ("127.0.0.1", "localhost"):
            lost = make_client((host, impostor.port), "cam-1").expect(Lost)
            assert lost.error.reason is Reason.BROKER_WRONG_NAME
        assert set(impostor.heard) == {b""}


@pytest.mark.fault("F78")
def test_a_broker_whose_certificate_expired_is_refused(authority: Authority, make_client: MakeClient) -> None:
    expired = authority.issue("broker", hosts=["127.0.0.1"], starts=_now() - datetime.timedelta(days=9), days=8)
    with Impostor(expired) as impostor:
        lost = make_client(("127.0.0.1", impostor.port), "cam-1").expect(Lost)
        assert lost.error.reason is Reason.BROKER_EXPIRED
        assert impostor.heard[0] == b""


def test_a_certificate_that_is_not_valid_yet_points_at_this_devices_clock(
    authority: Authority, make_client: MakeClient
) -> None:
    early = authority.issue("broker", hosts=["127.0.0.1"], starts=_now() + datetime.timedelta(days=2))
    with Impostor(early) as impostor:
        lost = make_client(("127.0.0.1", impostor.port), "cam-1").expect(Lost)
        assert lost.error.reason is Reason.BROKER_NOT_YET_VALID
        assert "clock" in lost.error.hint


@pytest.mark.fault("F78")
def test_a_refused_broker_is_never_offered_a_plain_connection(
    tmp_path: Path, authority: Authority, make_client: MakeClient
) -> None:
    other = Authority(tmp_path / "other").issue("broker", hosts=["127.0.0.1"])
    with Impostor(other) as impostor:
        client = make_client(("127.0.0.1", impostor.port), "cam-1")
        for _ in range(4):
            assert client.expect(Lost).error.reason is Reason.BROKER_UNTRUSTED
    with Impostor(None) as plain:
        client = make_client(("127.0.0.1", plain.port), "cam-1", limits=Limits(connect_timeout_s=0.2))
        client.quiet(0.8)
        client.mqtt.close(0)
        assert plain.heard
        for said in plain.heard:
            assert said[:1] in (b"", b"\x16"), "a TLS handshake, not MQTT's CONNECT (0x10)"
            assert b"cam-1" not in said


def test_a_port_that_speaks_something_else_is_a_tls_fault(make_client: MakeClient) -> None:
    with Impostor(None, [b"220 mail.example ESMTP ready\r\n"]) as mail:
        lost = make_client(("127.0.0.1", mail.port), "cam-1").expect(Lost)
        assert lost.error.reason is Reason.BROKER_TLS
        assert "TLS port" in lost.error.hint


def test_a_broker_that_refuses_our_certificate_is_told_from_one_that_is_absent(
    tmp_path: Path, shared_broker: Broker, authority: Authority, make_client: MakeClient
) -> None:
    stranger = Authority(tmp_path / "stranger").issue("cam-1")
    ours = authority.issue("cam-1")
    mixed = Identity("cam-1", ours.ca, stranger.certificate, stranger.key)
    lost = make_client(shared_broker, "cam-1", identity=mixed).expect(Lost)
    assert lost.error.reason is Reason.BROKER_REFUSED
    expired = authority.issue("cam-1", starts=_now() - datetime.timedelta(days=9), days=8)
    lost = make_client(shared_broker, "cam-1", identity=expired).expect(Lost)
    assert lost.error.reason is Reason.BROKER_REFUSED
    assert "certificate" in lost.error.hint
    lost = make_client(("127.0.0.1", free_port()), "cam-1").expect(Lost)
    assert lost.error.reason is Reason.BROKER_UNREACHABLE


def test_an_unresolvable_name_is_unreachable_and_retried(make_client: MakeClient) -> None:
    client = make_client(("no-such-host.invalid", 8883), "cam-1")
    lost = client.expect(Lost, timeout_s=60)
    assert lost.error.reason is Reason.BROKER_UNREACHABLE
    assert lost.error.retry
    assert "no-such-host.invalid" in lost.error.message


def test_a_missing_key_file_is_named_and_the_client_goes_on_trying(
    shared_broker: Broker, authority: Authority, make_client: MakeClient
) -> None:
    ours = authority.issue("cam-1")
    key = Path(ours.key)
    content = key.read_bytes()
    key.unlink()
    client = make_client(shared_broker, "cam-1", identity=ours)
    lost = client.expect(Lost)
    assert lost.error.reason is Reason.BROKER_TLS
    assert str(key) in lost.error.message
    key.write_bytes(content)
    client.ready()


def test_a_renewed_certificate_is_used_by_the_next_connection(
    own_broker: Broker, authority: Authority, make_client: MakeClient
) -> None:
    old, new = authority.issue("cam-1"), authority.issue("cam-2")
    client = make_client(own_broker, "cam-1", identity=old)
    client.ready()
    Path(old.certificate).write_bytes(Path(new.certificate).read_bytes())
    Path(old.key).write_bytes(Path(new.key).read_bytes())
    own_broker.restart()
    client.ready()
    # mosquitto writes its log a moment later
    deadline = time.monotonic() + 60
    while "u'cam-2'" not in own_broker.log() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "u'cam-2'" in own_broker.log()


@pytest.mark.fault("F80")
def test_a_client_that_names_another_id_is_still_only_its_certificate(
    own_broker: Broker, authority: Authority, make_client: MakeClient
) -> None:
    victim = make_client(own_broker, "cam-1")
    victim.ready()
    # its own valid certificate, the victim's client id
    thief = make_client(own_broker, "cam-1", identity=authority.issue("cam-9"))
    thief.ready()
    assert victim.quiet() == []
    assert victim.mqtt.publish(Message("edge/v1/edge/cam-1/evt", b"still here")) is Sent.QUEUED
    assert "as cam-9 " in own_broker.log()


@pytest.mark.fault("F80")
def test_being_told_that_the_session_was_taken_over_is_named_and_waits_longer(
    server_identity: Identity, make_client: MakeClient
) -> None:
    # MQTT 5.0: CONNACK, then DISCONNECT with reason 0x8E
    script = [bytes([0x20, 3, 0, 0, 0, 0xE0, 1, 0x8E])]
    with Impostor(server_identity, script) as impostor:
        client = make_client(("127.0.0.1", impostor.port), "cam-1")
        for _ in range(2):
            lost = client.expect(Lost)
            assert lost.error.reason is Reason.SESSION_TAKEN_OVER
            assert "revoke" in lost.error.hint
            assert lost.retry_in_s >= 0.1, "another first loss waits 0.05 s at most"
        assert client.mqtt.counters.takeovers == 2


def test_two_holders_of_one_identity_do_not_kick_each_other_for_ever(
    own_broker: Broker, authority: Authority, make_client: MakeClient
) -> None:
    # Mosquitto 2.0.11 closes the older connection without a DISCONNECT packet, later ones send 0x8E.
    shared = authority.issue("cam-1")
    policy = ReconnectPolicy(first_s=0.05, longest_s=60, takeover_s=0.4)
    holders = [make_client(own_broker, "cam-1", identity=shared, policy=policy) for _ in range(2)]
    time.sleep(2.5)
    losses = [event for holder in holders for event in holder.quiet(0.1) if isinstance(event, Lost)]
    assert losses, "they did collide"
    assert {event.error.reason for event in losses} <= {Reason.BROKER_LOST, Reason.SESSION_TAKEN_OVER}
    assert len(losses) <= 16, "each collision doubles the wait"


@pytest.mark.parametrize("host", ["no..such.invalid", "n" * 70 + ".invalid", "bücher.invalid"])
def test_a_name_that_is_none_is_unreachable_like_any_other(make_client: MakeClient, host: str) -> None:
    lost = make_client((host, 8883), "cam-1").expect(Lost, timeout_s=60)
    assert lost.error.reason is Reason.BROKER_UNREACHABLE
    assert host in lost.error.message
