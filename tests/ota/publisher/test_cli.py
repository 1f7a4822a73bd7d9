"""`edge-ota` from end to end: what it prints, what it exits with, and what it leaves on disk."""

from __future__ import annotations

import io
import json
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ota.errors import OtaError, Reason
from ota.mqtt import (
    Connected,
    Inbox,
    Mqtt,
    Received,
    Reconnect,
    ReconnectPolicy,
    Settings,
    Subscribed,
    Subscription,
    Tls,
)
from ota.publisher.cli import _parser, main
from ota.publisher.repository import Repository
from tests.fakes.broker import Broker, Identity
from tests.ota.publisher.conftest import FakeDevice, FakeRecorder, StockClient, model_bytes

SPEC = """
line = "person"
version = "1.0.0"
task = "classification"
labels = ["no person", "person"]
licence = "Apache-2.0"
[preprocess]
mean = [0]
std = [255]
[golden]
images = ["image.png"]
"""


@dataclass
class Answer:
    status: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.out)
        return parsed


def run(*arguments: object) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    status = main([str(a) for a in arguments], recorder=FakeRecorder(), out=out, err=err)
    return Answer(status, out.getvalue(), err.getvalue())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A repository made by the command, with a spec, a model and an image beside it."""
    (tmp_path / "spec.toml").write_text(SPEC)
    (tmp_path / "image.png").write_bytes(b"picture")
    (tmp_path / "int8.tflite").write_bytes(model_bytes(1))
    assert run("init", tmp_path / "repo").status == 0
    return tmp_path


def release(place: Path, version: str, data: bytes | None = None) -> Answer:
    (place / "spec.toml").write_text(SPEC.replace("1.0.0", version))
    if data is not None:
        (place / "int8.tflite").write_bytes(data)
    return run("release", place / "repo", "--from", place / "int8.tflite", "--spec", place / "spec.toml")


def test_a_release_goes_from_a_file_to_a_device_and_to_a_stick(place: Path) -> None:
    repo, device = place / "repo", FakeDevice("cam-1")
    built = release(place, "1.0.0")
    assert built.status == 0, built.err
    assert "int8.tflite: 40000 bytes, full 40104 bytes raw (100.3 % of the file)" in built.out
    assert f"next: edge-ota publish {repo}" in built.out
    assert "person 1.0.0 signed, counter 1" in run("publish", repo).out

    changed = release(place, "1.1.0", b"x" + model_bytes(1)[1:])
    assert "from 1.0.0: " in changed.out
    assert run("publish", repo, "person", "1.1.0").status == 0
    shown = run("show", repo, "person", "1.1.0", "--json").data
    (delta,) = shown["components"][0]["deltas"]
    assert (shown["signed"], delta["base_version"], delta["codec"]) == (True, "1.0.0", "zstd-patch")
    assert delta["bytes"] < shown["components"][0]["full"]["bytes"] / 100

    (place / "request.json").write_bytes(device.request())
    enrolled = run("enroll", repo, place / "request.json", "--broker", "localhost", "--out", place / "bundle.json")
    assert enrolled.status == 0
    assert json.loads((place / "bundle.json").read_bytes())["broker"] == {"host": "localhost", "port": 8883}
    granted = run("grant", repo, "cam-1", "person", "1.1.0", "--json").data
    assert (granted["version"], granted["grants"]) == (1, 2)
    listed = run("devices", repo, "--json").data["devices"]
    assert [(d["device"], d["desired"]) for d in listed] == [("cam-1", [{"line": "person", "version": "1.1.0"}])]
    assert "cam-1  person 1.1.0  certificate until" in run("devices", repo).out

    written = run("bundle", repo, "cam-1", place / "stick")
    assert written.status == 0
    assert "usable until" in written.out
    assert StockClient(place / "stick", place / "state").fetch("person/1.1.0/release.json") is not None


def test_every_verb_answers_in_json(place: Path) -> None:
    repo = place / "repo"
    (place / "request.json").write_bytes(FakeDevice("cam-1").request())
    verbs: list[tuple[object, ...]] = [
        ("init", place / "second"),
        ("release", repo, "--spec", place / "spec.toml", "--from", place / "int8.tflite"),
        ("show", repo, "person", "1.0.0"),
        ("publish", repo),
        ("enroll", repo, place / "request.json", "--broker", "[::1]:1884", "--out", place / "b.json"),
        ("grant", repo, "cam-1", "person", "1.0.0"),
        ("devices", repo),
        ("bundle", repo, "cam-1", place / "stick"),
        ("broker-certificate", repo, "broker.example"),
        ("identity", repo, "ota_service_2"),
        ("rotate", repo, "timestamp"),
    ]
    for verb in verbs:
        answer = run(*verb, "--json")
        assert (answer.status, answer.err, bool(answer.data)) == (0, "", True), verb
    assert json.loads((place / "b.json").read_bytes())["broker"] == {"host": "::1", "port": 1884}
    assert Repository.open(repo).authority.broker_names() == ("broker.example",)
    assert Repository.open(repo).authority.client_tls("ota_service_2").key.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("arguments", "status", "error", "hint"),
    [
        (("publish", "{place}/absent"), 66, "there is no repository at", "edge-ota init"),
        (("init", "{place}/repo"), 77, "exists and is not an empty directory", "never overwritten"),
        (("grant", "{place}/repo", "cam-9", "person", "1.0.0"), 66, "device cam-9 is not enrolled", "edge-ota devices"),
        (("publish", "{place}/repo", "person", "1.0.0"), 66, "is not waiting to be signed", "edge-ota release"),
        (("publish", "{place}/repo", "person"), 65, "LINE VERSION pairs", "or name none"),
        (("show", "{place}/repo", "person", "9.9.9"), 66, "is not published", "edge-ota release"),
        (("release", "{place}/repo", "--spec", "{place}/no.toml"), 66, "there is no spec at", "check the path"),
        (("release", "{place}/repo", "--spec", "{place}/spec.toml"), 65, "component: missing", "--from|FORMAT.md"),
        (("enroll", "{place}/repo", "{place}/no", "--broker", "h", "--out", "o"), 66, "no request at", "check"),
        (("enroll", "{place}/repo", "{place}/image.png", "--broker", "h", "--out", "o"), 65, "request: ", "damaged"),
        (("identity", "{place}/repo", "cam-1"), 65, "identity 'cam-1' is not allowed", "ota_"),
        (("serve", "{place}/repo", "--broker", "h", "--as", "ota_x"), 66, "no identity ota_x", "edge-ota identity"),
        (("bundle", "{place}/repo", "cam-9", "{place}/o"), 66, "cam-9 is not enrolled", "edge-ota devices"),
        (("broker-certificate", "{place}/repo", "a b"), 65, "neither a host name nor", "as devices reach it"),
        (("grant", "{place}/repo"), 64, "arguments are required: DEVICE", "edge-ota grant --help"),
        (("frobnicate",), 64, "invalid choice: 'frobnicate'", "edge-ota --help"),
        (("serve", "{place}/repo", "--broker", "h:x"), 64, "is not HOST or HOST:PORT", "edge-ota serve --help"),
        (("publish", "{place}/repo", "--spread", "-1"), 64, "", "edge-ota publish --help"),
        ((), 64, "VERB", "edge-ota --help"),
    ],
)
def test_an_error_is_one_line_a_hint_and_the_exit_code_of_its_reason(
    place: Path, arguments: tuple[str, ...], status: int, error: str, hint: str
) -> None:
    answer = run(*(a.format(place=place) for a in arguments))
    lines = answer.err.splitlines()
    assert (answer.status, answer.out) == (status, "")
    assert lines[0].startswith("error: ")
    assert error in lines[0]
    if hint:
        assert lines[1].startswith("hint: ")
        assert any(part in lines[1] for part in hint.split("|"))
    assert len(lines) == 1 + bool(hint)


def test_keys_that_have_to_be_brought_are_named_in_a_warning(place: Path) -> None:
    release(place, "1.0.0")
    run("publish", place / "repo")
    (place / "repo/keys/targets.pem").rename(place / "targets.pem")
    out, err = io.StringIO(), io.StringIO()
    later = datetime.now(UTC) + timedelta(days=190)
    assert main(["publish", str(place / "repo")], out=out, err=err, now=lambda: later) == 0
    assert "timestamp 3 is valid until" in out.getvalue()
    assert err.getvalue().startswith("warning: targets expires on ")
    assert f" anew: bring {place / 'repo/keys/targets.pem'} and publish again\n" in err.getvalue()
    out, err = io.StringIO(), io.StringIO()
    later = datetime.now(UTC) + timedelta(days=3600)
    main(["publish", str(place / "repo")], out=out, err=err, now=lambda: later)
    assert "warning: root expires on " in err.getvalue()
    assert f"edge-ota rotate {place / 'repo'} root-1" in err.getvalue()


def test_certificates_that_end_are_named_in_time_with_what_to_do_about_each(place: Path) -> None:
    repo = place / "repo"
    run("identity", repo, "ota_service_2")

    def after(days: int, *words: object) -> Answer:
        out, err = io.StringIO(), io.StringIO()
        later = datetime.now(UTC) + timedelta(days=days)
        status = main([str(word) for word in words], out=out, err=err, now=lambda: later)
        return Answer(status, out.getvalue(), err.getvalue())

    assert after(0, "publish", repo).err == ""
    said = after(780, "publish", repo).err
    for stem, advice in (
        ("broker", "edge-ota broker-certificate"),
        ("ota_service", "edge-ota identity"),
        ("ota_service_2", f"edge-ota identity {repo} ota_service_2"),
    ):
        assert re.search(rf"^warning: {stem}\.pem ends on \d{{4}}-\d\d-\d\d: {re.escape(advice)}", said, re.MULTILINE)
    assert "ca.pem" not in said
    assert re.search(
        r"^warning: ca\.pem ends on .*edge-ota renew-ca", after(7300 - 800, "publish", repo).err, re.MULTILINE
    )
    renewed = after(7300 - 800, "renew-ca", repo, "--json")
    assert (renewed.status, "need a bundle by hand" in renewed.err) == (0, True)
    assert renewed.data["expires"] > renewed.data["former_expires"]
    assert Path(renewed.data["crl"]).is_file()
    assert "ca.pem" not in after(7300 - 800, "publish", repo).err
    assert after(0, "renew-ca", repo).status == 65


def test_a_release_that_waits_for_a_key_is_named_and_the_timestamp_is_signed(place: Path) -> None:
    release(place, "1.0.0")
    (place / "repo/keys/targets.pem").rename(place / "targets.pem")
    answer = run("publish", place / "repo")
    assert answer.status == 66
    assert "timestamp 2 is valid until" in answer.out
    bring = f"bring {place / 'repo/keys/targets.pem'} and publish again"
    assert answer.err == f"warning: person 1.0.0 is not signed: {bring}\n"


def test_a_damaged_record_of_a_device_is_a_warning_and_what_was_signed_is_told(place: Path) -> None:
    repository = Repository.open(place / "repo")
    FakeDevice("cam-1").enroll(repository)
    release(place, "1.0.0")
    run("publish", place / "repo")
    assert run("grant", place / "repo", "cam-1", "person", "1.0.0").status == 0
    (place / "repo/devices/cam-1/desired.json").write_bytes(b"{")
    answer = run("publish", place / "repo")
    assert answer.status == 74
    assert "timestamp 3 is valid until" in answer.out
    assert answer.err.startswith("warning: not every desired.json could be renewed: ")


@pytest.mark.parametrize("reason", [reason for reason in Reason if "edge-ota " in OtaError(reason, "").hint])
def test_a_command_that_a_hint_names_in_full_is_one_that_can_be_typed(reason: Reason) -> None:
    for command in re.findall(r"edge-ota ([a-z-]+(?: [A-Z][A-Za-z.]*)+)", OtaError(reason, "").hint):
        _parser().parse_args([word.strip(".") for word in command.split()])


def test_an_error_is_json_on_stdout_when_asked_for(place: Path) -> None:
    answer = run("show", place / "repo", "person", "1.0.0", "--json")
    assert answer.data["error"] == "unknown_release"
    assert answer.err.startswith("error: ")


def test_a_broker_name_outside_the_certificate_is_warned_about(place: Path) -> None:
    (place / "request.json").write_bytes(FakeDevice("cam-1").request())
    arguments = ("enroll", place / "repo", place / "request.json", "--broker", "broker.example", "--out", place / "b")
    answer = run(*arguments)
    assert answer.status == 0
    assert "warning: the broker's certificate is not valid for 'broker.example'" in answer.err
    run("broker-certificate", place / "repo", "broker.example", "localhost")
    assert run(*arguments).err == ""


@pytest.mark.skipif(not Broker.available(), reason="mosquitto is not installed")
def test_what_was_signed_stays_signed_when_the_broker_is_not_the_one_it_should_be(place: Path) -> None:
    release(place, "1.0.0")
    run("broker-certificate", place / "repo", "broker.example")
    tls = Repository.open(place / "repo").authority.broker_tls
    with Broker(place / "broker", Identity("b", str(tls.ca), str(tls.certificate), str(tls.key))) as broker:
        answer = run("publish", place / "repo", "--broker", f"127.0.0.1:{broker.port}")
    assert answer.status == 69
    assert "person 1.0.0 signed" in answer.out
    assert "warning: no hint was sent: " in answer.err
    assert "certificate is for another name" in answer.err


@pytest.mark.skipif(not Broker.available(), reason="mosquitto is not installed")
def test_a_device_enrolled_here_gets_the_hint_through_the_shipped_broker_configuration(place: Path) -> None:
    """The certificates of the repository and of the bundle carry mutual TLS with the ACL that is shipped."""
    repo, device = place / "repo", FakeDevice("cam-1")
    (place / "request.json").write_bytes(device.request())
    run("enroll", repo, place / "request.json", "--broker", "localhost", "--out", place / "bundle.json")
    bundle = json.loads((place / "bundle.json").read_bytes())
    for name, pem in (("ca", bundle["ca"]), ("certificate", bundle["certificate"]), ("key", device.key_pem())):
        (place / name).write_text(pem)
    tls = Repository.open(repo).authority.broker_tls
    server = Identity("broker", str(tls.ca), str(tls.certificate), str(tls.key))
    with Broker(place / "broker", server) as broker:
        inbox = Inbox()
        settings = Settings(
            "127.0.0.1",
            broker.port,
            Tls(*(str(place / name) for name in ("ca", "certificate", "key"))),
            "cam-1",
            subscriptions=(Subscription("edge/v1/edge/fleet/hint", qos=1),),
        )
        mqtt = Mqtt(settings, inbox, reconnect=Reconnect(ReconnectPolicy(), Random(1)), clock=time.monotonic)
        mqtt.start()
        try:
            assert isinstance(inbox.get(5), Connected)
            assert isinstance(inbox.get(5), Subscribed)
            release(place, "1.0.0")
            answer = run("publish", repo, "--broker", f"127.0.0.1:{broker.port}", "--spread", "30", "--json")
            assert (answer.status, answer.data["hinted"]) == (0, ["person"]), answer.err
            event = inbox.get(5)
            assert isinstance(event, Received)
            assert json.loads(event.payload) == {"v": 1, "line": "person", "spread_s": 30}
        finally:
            mqtt.close(0.5)


def test_a_certificate_that_cannot_be_read_is_named_and_hides_nothing_of_what_was_signed(place: Path) -> None:
    release(place, "1.0.0")
    (place / "repo" / "keys" / "broker.pem").write_bytes(b"no certificate")
    answer = run("publish", place / "repo")
    assert (answer.status, "person 1.0.0 signed" in answer.out) == (0, True)
    assert re.search(r"^warning: .*broker\.pem is not a certificate.*; .", answer.err, re.MULTILINE)


def test_version_and_help_end_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version").status == 0
    assert run("publish", "--help").status == 0
    assert "edge-ota" in capsys.readouterr().out
