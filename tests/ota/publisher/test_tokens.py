"""Tokens: one enrolment each, whoever comes first, and the same answer for whoever asks again."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from cryptography import x509

from ota import enrolment
from ota.errors import OtaError
from ota.publisher import audit, tokens
from ota.publisher.certificates import certificate_pem
from ota.publisher.enroll import Places, load_device, parse_request
from ota.publisher.repository import Repository
from ota.publisher.revocation import revoke
from tests.ota.publisher.conftest import Build, FakeDevice, ManualClock

PLACES = Places("broker.example", 8883, "https://enrol.example:8884")


def redeem(repository: Repository, text: str, device: FakeDevice) -> bytes:
    return tokens.redeem(repository, text, parse_request(device.request()), PLACES)


def refused(repository: Repository, text: str, device: FakeDevice) -> str:
    with pytest.raises(OtaError) as caught:
        redeem(repository, text, device)
    assert caught.value.hint
    return caught.value.reason.value


def test_a_token_enrols_its_device_and_says_where_to_renew(repository: Repository) -> None:
    made = tokens.make(repository, "cam-7")
    device = FakeDevice("cam-7")
    bundle = json.loads(redeem(repository, made.text, device))
    assert bundle["renewal"] == "https://enrol.example:8884"
    assert x509.load_pem_x509_certificate(bundle["certificate"].encode()).public_key() == device.key.public_key()
    assert load_device(repository, "cam-7").hpke_public == device.hpke.public_key().public_bytes_raw()


def test_a_token_carries_the_fingerprint_of_the_authority_and_is_kept_as_a_hash_only(repository: Repository) -> None:
    made = tokens.make(repository, "cam-7")
    token = enrolment.parse_token(made.text)
    pem = certificate_pem(repository.authority.certificate())
    assert token.ca_sha256 == enrolment.ca_fingerprint(pem)
    kept = b"".join(path.read_bytes() for path in repository.path.rglob("*") if path.is_file())
    assert made.text.split(".")[2].encode() not in kept
    assert token.secret not in kept
    assert [path.stat().st_mode & 0o077 for path in (repository.path / "tokens").iterdir()] == [0]
    assert repr(token).find(repr(token.secret)) == -1


def test_the_same_board_gets_the_same_bundle_again_and_another_one_none(repository: Repository) -> None:
    made = tokens.make(repository, "cam-7")
    device = FakeDevice("cam-7")
    first = redeem(repository, made.text, device)
    assert redeem(repository, made.text, device) == first
    assert refused(repository, made.text, FakeDevice("cam-7")) == "token_used"
    assert refused(repository, made.text, FakeDevice("cam-7", key=device.key)) == "token_used"


@pytest.mark.fault("F47")
def test_each_wrong_token_has_its_own_reason(repository: Repository, clock: ManualClock) -> None:
    made = tokens.make(repository, "cam-7", hours=2)
    assert refused(repository, made.text, FakeDevice("cam-8")) == "token_other_device"
    assert refused(repository, made.text.replace("cam-7", "cam-8"), FakeDevice("cam-8")) == "token_unknown"
    assert refused(repository, "edge1.cam-7.short", FakeDevice("cam-7")) == "token_unknown"
    clock.advance(3 / 24)
    assert refused(repository, made.text, FakeDevice("cam-7")) == "token_expired"
    assert list(repository.devices()) == []


def test_another_token_takes_the_place_of_one_that_was_not_used_and_of_no_other(repository: Repository) -> None:
    lost, other = tokens.make(repository, "cam-1").text, tokens.make(repository, "cam-2").text
    second = tokens.make(repository, "cam-1").text
    assert refused(repository, lost, FakeDevice("cam-1")) == "token_unknown"
    board = FakeDevice("cam-1")
    bundle = redeem(repository, second, board)
    third = tokens.make(repository, "cam-1", replace=True).text
    # the board that enrolled with it may still repeat its request
    assert redeem(repository, second, board) == bundle
    fourth = tokens.make(repository, "cam-1", replace=True).text
    assert refused(repository, third, FakeDevice("cam-1")) == "token_unknown"
    assert redeem(repository, other, FakeDevice("cam-2"))
    assert redeem(repository, fourth, FakeDevice("cam-1"))


def test_of_two_boards_at_once_one_wins(repository: Repository) -> None:
    made = tokens.make(repository, "cam-7")
    boards = [FakeDevice("cam-7") for _ in range(6)]
    start = threading.Barrier(len(boards))
    won: list[int] = []
    reasons: list[str] = []

    def use(number: int) -> None:
        start.wait()
        while True:
            try:
                redeem(repository, made.text, boards[number])
                won.append(number)
                return
            except OtaError as e:
                if e.reason.value != "busy":
                    reasons.append(e.reason.value)
                    return

    threads = [threading.Thread(target=use, args=(number,)) for number in range(len(boards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert reasons == ["token_used"] * 5
    assert load_device(repository, "cam-7").hpke_public == boards[won[0]].hpke.public_key().public_bytes_raw()


@pytest.mark.parametrize("cut", ["store_device", "write_bundle"])
def test_a_cut_while_a_token_is_used_leaves_it_to_the_same_board(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    made = tokens.make(repository, "cam-7")
    device = FakeDevice("cam-7")

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if cut == "store_device":
            patched.setattr("ota.publisher.enroll.store_device", dies)
        else:
            patched.setattr("ota.publisher.tokens.audit.record", dies)
        with pytest.raises(KeyboardInterrupt):
            redeem(repository, made.text, device)
    assert refused(repository, made.text, FakeDevice("cam-7")) == "token_used"
    bundle = redeem(repository, made.text, device)
    assert redeem(repository, made.text, device) == bundle


def test_a_known_device_needs_a_token_of_its_own_kind(repository: Repository) -> None:
    FakeDevice("cam-7").enroll(repository)
    with pytest.raises(OtaError) as caught:
        tokens.make(repository, "cam-7")
    assert (caught.value.reason.value, "replace" in caught.value.hint) == ("device_exists", True)
    revoke(repository, "cam-7")
    with pytest.raises(OtaError) as caught:
        tokens.make(repository, "cam-7")
    assert caught.value.reason.value == "device_revoked"
    with pytest.raises(OtaError) as caught:
        tokens.make(repository, "cam-8", replace=True)
    assert caught.value.reason.value == "unknown_device"


def test_a_replacement_revokes_the_old_board_and_grants_to_the_new_one(repository: Repository, build: Build) -> None:
    from ota.publisher.director import grant
    from ota.publisher.publish import publish

    old = FakeDevice("cam-7")
    serial = old.enroll(repository).device.certificate_serial
    build()
    publish(repository)
    grant(repository, "cam-7", "person", "1.0.0")
    made = tokens.make(repository, "cam-7", replace=True)
    new = FakeDevice("cam-7")
    redeem(repository, made.text, new)
    known = load_device(repository, "cam-7")
    assert (known.older, known.revoked) == ((), "")
    revoked = x509.load_pem_x509_crl((repository.path / "revoked.pem").read_bytes())
    assert [entry.serial_number for entry in revoked] == [serial]
    signed = json.loads((repository.path / "devices/cam-7/desired.json").read_text())["signed"]
    assert {grant["kid"] for grant in signed["grants"].values()} == {known.kid}
    assert list(signed["targets"]) == ["person/1.0.0/release.json"]


@pytest.mark.parametrize(
    "cut", ["revocation.revoke_certificates", "revocation.write_list", "enroll.store_device", "director.resign"]
)
def test_a_cut_while_a_board_is_replaced_leaves_no_certificate_of_the_old_one(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    serial = FakeDevice("cam-7").enroll(repository).device.certificate_serial
    made = tokens.make(repository, "cam-7", replace=True)
    new = FakeDevice("cam-7")

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"ota.publisher.{cut}", dies)
        with pytest.raises(KeyboardInterrupt):
            redeem(repository, made.text, new)
    redeem(repository, made.text, new)
    assert load_device(repository, "cam-7").certificate_key == parse_request(new.request()).certificate_key
    revoked = x509.load_pem_x509_crl((repository.path / "revoked.pem").read_bytes())
    assert [entry.serial_number for entry in revoked] == [serial]


def test_a_board_that_takes_the_place_of_a_decommissioned_one_is_not_told_that_it_is_revoked(
    repository: Repository,
) -> None:
    FakeDevice("cam-7").enroll(repository)
    revoke(repository, "cam-7", decommission=True)
    path = repository.path / "devices/cam-7/desired.json"
    told = json.loads(path.read_text())["signed"]
    assert (told["revoked"], told["revoked_keys"]) == (True, [load_device(repository, "cam-7").kid])
    redeem(repository, tokens.make(repository, "cam-7", replace=True).text, FakeDevice("cam-7"))
    assert "revoked" not in json.loads(path.read_text())["signed"]
    assert load_device(repository, "cam-7").revoked == ""


def test_a_token_has_one_spelling(repository: Repository) -> None:
    text = tokens.make(repository, "cam-7").text
    spelled = [text[:-1] + last for last in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"]
    accepted = []
    for one in spelled:
        try:
            accepted.append(enrolment.parse_token(one).ca_sha256)
        except OtaError as e:
            assert e.reason.value == "token_unknown"  # noqa: PT017
    assert len(accepted) == len(set(accepted)) == 16


def test_tokens_long_past_their_end_are_forgotten(repository: Repository, clock: ManualClock) -> None:
    tokens.make(repository, "cam-7", hours=1)
    clock.advance(60)
    tokens.make(repository, "cam-8", hours=1)
    assert len(list((repository.path / "tokens").iterdir())) == 1


@pytest.mark.parametrize("text", ["", "edge1", "edge1.a.b.c", "x" * 5000, "edge1.cam-7." + "A" * 32 + "." + "A" * 42])
def test_no_other_text_is_a_token(text: str) -> None:
    with pytest.raises(OtaError) as caught:
        enrolment.parse_token(text)
    assert caught.value.reason.value == "token_unknown"


def test_the_audit_has_a_line_for_each_act(repository: Repository, tmp_path: Path) -> None:
    made = tokens.make(repository, "cam-7")
    redeem(repository, made.text, FakeDevice("cam-7"))
    revoke(repository, "cam-7", "lost\nin transit")
    lines = [json.loads(line) for line in (repository.path / "audit.jsonl").read_text().splitlines()]
    assert [line["action"] for line in lines] == ["token_made", "enrolled", "revoked"]
    assert all(line["by"] and line["time"] and line["device"] == "cam-7" for line in lines)
    assert (repository.path / "audit.jsonl").stat().st_mode & 0o077 == 0


def test_a_line_for_which_the_disk_has_no_room_leaves_no_half_of_it(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit.record(repository, "token_made", "cam-7")
    before = (repository.path / "audit.jsonl").read_bytes()
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:10]))
        with pytest.raises(OtaError) as caught:
            audit.record(repository, "token_made", "cam-8")
    assert (caught.value.reason.value, bool(caught.value.hint)) == ("io_error", True)
    assert (repository.path / "audit.jsonl").read_bytes() == before
