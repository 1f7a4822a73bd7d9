"""A device's life with real processes: publisher, listener, Mosquitto with its list of revoked certificates, daemon."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from ota.publisher import revocation
from ota.publisher.enroll import load_device
from ota.publisher.repository import Repository
from tests.demo.fleet import BIN, Fleet
from tests.fakes.broker import Broker
from tests.fakes.ports import free_port
from tests.integration.console import QUICK, Device, did, refused, run, until, watching

# A publisher whose clock is DAYS behind: what it issues is as old as that, and ends as much earlier.
_BEHIND = """
import datetime, sys
from ota.publisher import cli
behind = datetime.timedelta(seconds=float(sys.argv[1]))
raise SystemExit(cli.main(sys.argv[2:], now=lambda: datetime.datetime.now(datetime.UTC) - behind))
"""
DAY_S = 86_400.0
LIFE_S = 825 * DAY_S


class Operator:
    """The operator's side of one fleet in `folder`."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.port = free_port()
        self._listener: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def listen(self, *, behind_s: float = 0.0) -> None:
        """`edge-ota listen`, by a clock that is `behind_s` behind."""
        assert self.fleet.broker is not None
        here, broker = f"127.0.0.1:{self.port}", f"127.0.0.1:{self.fleet.broker.port}"
        words = ["listen", "repo", "--bind", here, "--broker", broker]
        log = (self.fleet.folder / "listener.log").open("ab")
        listener = self._listener = subprocess.Popen(
            [sys.executable, "-c", _BEHIND, str(behind_s), *words], cwd=self.fleet.folder, stdout=log, stderr=log
        )
        until("the listener", lambda: "listening on" in self.log() or listener.poll() is not None)
        assert listener.poll() is None, self.log()

    def log(self) -> str:
        path = self.fleet.folder / "listener.log"
        return path.read_text() if path.exists() else ""

    def stop(self) -> None:
        if self._listener is not None:
            self._listener.terminate()
            self._listener.wait(10)
            (self.fleet.folder / "listener.log").unlink()
            self._listener = None

    def token(self, *words: str, device: str = "belt-01") -> str:
        data = json.loads(did("edge-ota", "token", "repo", device, *words, "--json", folder=self.fleet.folder))
        return str(data["token"])

    def enroll(self, token: str) -> dict[str, Any]:
        words = ("enroll", "--config", "agent.toml", "--server", self.url, "--token", token, "--json")
        answer: dict[str, Any] = json.loads(did("edge-agent", *words, folder=self.fleet.folder))
        return answer

    def enroll_by_file(self, *, behind_s: float) -> None:
        """Request, answer and bundle as files, answered by a clock that is `behind_s` behind."""
        folder = self.fleet.folder
        assert self.fleet.broker is not None
        did("edge-agent", "enroll", "--config", "agent.toml", "--device", "belt-01", "--out", "r.json", folder=folder)
        words = ["enroll", "repo", "r.json", "--broker", f"127.0.0.1:{self.fleet.broker.port}"]
        words += ["--renewal", self.url, "--out", "bundle.json"]
        subprocess.run([sys.executable, "-c", _BEHIND, str(behind_s), *words], cwd=folder, check=True)
        did("edge-agent", "enroll", "--config", "agent.toml", "--bundle", "bundle.json", folder=folder)

    def record(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.fleet.folder / "repo/devices/belt-01/device.json").read_text())
        return data

    def audit(self) -> list[str]:
        path = self.fleet.folder / "repo" / "audit.jsonl"
        return [json.loads(line)["action"] for line in path.read_text().splitlines()]


@pytest.fixture
def site(tmp_path: Path, repository: Path, clip: Path) -> Iterator[tuple[Fleet, Device, Operator]]:
    """parts 1.0.0 published; broker and block server up; a device with its agent.toml, not enrolled."""
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    shutil.copytree(repository, tmp_path, dirs_exist_ok=True)
    fleet = Fleet(tmp_path)
    device, operator = Device(fleet, clip), Operator(fleet)
    try:
        fleet.start_broker()
        fleet.start_server()
        device.configure(QUICK)
        yield fleet, device, operator
    finally:
        operator.stop()
        fleet.stop()


def in_a_month() -> str:
    """Later than a certificate that is about to end, earlier than one that was just issued."""
    return (datetime.now(UTC) + timedelta(days=30)).isoformat()


def certificate(device: Device) -> dict[str, Any]:
    status = device.ask()
    return dict(status["certificate"]) if status and status["certificate"] else {}


def test_a_device_enrols_with_a_token_and_serves(site: tuple[Fleet, Device, Operator]) -> None:
    fleet, device, operator = site
    operator.listen()
    token = operator.token()
    done = operator.enroll(token)
    assert done["device"] == "belt-01"
    bundle = json.loads((device.state / "enrolment" / "bundle.json").read_text())
    assert bundle["renewal"] == operator.url
    # the answer was lost with the power: the same command again, the same bundle
    shutil.rmtree(device.state / "enrolment")
    operator.enroll(token)
    assert json.loads((device.state / "enrolment" / "bundle.json").read_text()) == bundle
    with watching(fleet) as observer:
        device.start()
        until("the link", lambda: device.ask()["link"]["state"] == "connected")
        assert device.grant(observer, "1.0.0")["outcome"] == "committed"
    assert certificate(device)["expires"] > "2028"
    assert operator.audit() == ["token_made", "enrolled"]
    assert token not in "".join(path.read_text(errors="replace") for path in (fleet.folder / "repo").rglob("*.json*"))


def test_the_block_server_can_run_the_listener_as_well(site: tuple[Fleet, Device, Operator]) -> None:
    fleet, _, operator = site
    assert fleet.broker is not None
    did("edge-ota", "identity", "repo", "ota_service_2", folder=fleet.folder)
    words = ["serve", "repo", "--broker", f"127.0.0.1:{fleet.broker.port}", "--as", "ota_service_2"]
    words += ["--enroll", f"127.0.0.1:{operator.port}"]
    server = subprocess.Popen([str(BIN / "edge-ota"), *words], cwd=fleet.folder, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = [server.stderr.readline(), server.stderr.readline()]
        assert any("listening on" in line for line in said)
        assert operator.enroll(operator.token())["device"] == "belt-01"
    finally:
        server.terminate()
        server.communicate(timeout=20)
    assert server.returncode == 0


def test_a_second_board_cannot_use_the_token_of_the_first(site: tuple[Fleet, Device, Operator], tmp_path: Path) -> None:
    _fleet, device, operator = site
    operator.listen()
    token = operator.token()
    operator.enroll(token)
    thief = tmp_path / "thief"
    thief.mkdir()
    shutil.copy(device.config, thief)
    words = ("enroll", "--config", "agent.toml", "--server", operator.url, "--token")
    told = refused("edge-agent", *words, token, folder=thief)
    assert (told.reason, "new one" in told.hint) == ("token_used", True)
    assert not (thief / "state" / "enrolment").exists()
    assert refused("edge-agent", *words, token.replace("belt-01", "belt-02"), folder=thief).reason == "token_unknown"
    fingerprint = token.rpartition(".")[2]
    other = token.replace(fingerprint, fingerprint[1:] + "A")
    assert refused("edge-agent", *words, other, folder=thief).reason in ("server_untrusted", "token_unknown")


@pytest.mark.fault("F93")
def test_a_certificate_past_two_thirds_of_its_life_is_renewed_under_a_live_connection(
    site: tuple[Fleet, Device, Operator],
) -> None:
    fleet, device, operator = site
    operator.listen(behind_s=LIFE_S - 120)  # two minutes are left of what it issues now
    operator.enroll(operator.token())
    operator.stop()
    old = operator.record()["certificate_serial"]
    with watching(fleet) as observer:
        device.start()
        until("the link", lambda: device.ask()["link"]["state"] == "connected")
        assert device.grant(observer, "1.0.0")["outcome"] == "committed"
        # nobody renews: it says so, and serves on
        until("the failure", lambda: certificate(device)["reason"] == "server_unreachable")
        assert device.condition("CertificateExpiring")["reason"] == "server_unreachable"
        before = len(observer.events)
        operator.listen()
        until("a new certificate", lambda: certificate(device)["expires"] > in_a_month(), 60)
        link = device.ask()["link"]
        assert (link["state"], link["counts"]["connections"], link["counts"]["takeovers"]) == ("connected", 2, 0)
        assert device.condition("CertificateExpiring") is None
        observer.wait("its event", lambda: "certificate_renewed" in [e["kind"] for e in observer.events[before:]], 60)
        assert "alarm" not in [event["kind"] for event in observer.events[before:]]
        record = operator.record()
        assert record["certificate_serial"] != old
        assert record["kid"] != record["former_kid"]
        assert device.serving()["version"] == "1.0.0"
        # the old certificate is revoked early; the new one comes back from a restart of the broker
        repository = Repository.open(fleet.folder / "repo")
        _revoke_one(repository, int(old, 16))
        assert fleet.broker is not None
        fleet.broker.restart()
        until("the link with the new certificate", lambda: device.ask()["link"]["counts"]["connections"] >= 3, 60)
        # a grant is for the new HPKE key, and opens
        device.fleet.publish("parts", "1.1.0")
        assert device.grant(observer, "1.1.0")["outcome"] == "committed"
    assert json.loads((fleet.folder / "repo/devices/belt-01/desired.json").read_text())["signed"]["grants"]
    assert device.stop() == 0
    device.start("1.1.0")
    until("the link after a restart", lambda: device.ask()["link"]["state"] == "connected")


def _revoke_one(repository: Repository, serial: int) -> None:
    with repository.locked():
        known = load_device(repository, "belt-01")
        [one] = [one for one in known.older if one.serial == serial]
        alone = replace(known, certificate_serial=one.serial, certificate_expires=one.expires, older=())
        revocation.revoke_certificates(repository, alone, "early")


def test_a_device_that_was_off_past_its_end_renews_first_and_connects_then(
    site: tuple[Fleet, Device, Operator],
) -> None:
    fleet, device, operator = site
    operator.enroll_by_file(behind_s=LIFE_S + 300 * DAY_S)  # ended 300 days ago
    did("edge-ota", "renew-ca", "repo", folder=fleet.folder)
    operator.listen()
    device.start()
    until("the link", lambda: device.ask()["link"]["state"] == "connected", 60)
    until("the new certificate in force", lambda: certificate(device)["expires"] > in_a_month())
    assert operator.audit()[-1] == "renewed"
    # the later certificate of the authority came with it, and is the one that the next connection trusts
    later = (fleet.folder / "repo/keys/ca.pem").read_text()
    assert (fleet.folder / "state/enrolment/ca.crt").read_text() == later
    assert json.loads((fleet.folder / "state/enrolment/bundle.json").read_text())["ca"] == later
    assert device.stop() == 0
    device.start()
    until("the link after a restart", lambda: device.ask()["link"]["state"] == "connected", 60)


def test_beyond_the_grace_a_device_is_told_what_helps(site: tuple[Fleet, Device, Operator]) -> None:
    _fleet, device, operator = site
    operator.enroll_by_file(behind_s=LIFE_S + 400 * DAY_S)
    operator.listen()
    device.start()
    until("the refusal", lambda: certificate(device)["reason"] == "certificate_expired", 60)
    shown = certificate(device)
    assert "365 days" in shown["message"]
    assert "edge-ota replace" in shown["hint"]
    assert device.condition("CertificateExpiring")["reason"] == "certificate_expired"


@pytest.mark.fault("F52")
def test_a_revoked_device_wipes_its_keys_and_does_not_come_back(site: tuple[Fleet, Device, Operator]) -> None:
    fleet, device, operator = site
    operator.listen()
    operator.enroll(operator.token())
    with watching(fleet) as observer:
        device.start()
        until("the link", lambda: device.ask()["link"]["state"] == "connected")
        assert device.grant(observer, "1.0.0")["outcome"] == "committed"
        told = did("edge-ota", "revoke", "repo", "belt-01", "--reason", "lost in transit", folder=fleet.folder)
        assert "revoked" in told
        device.look()
        until("the end", lambda: (device.ask() or {"link": {"state": ""}})["link"]["state"] == "revoked")
        status = device.ask()
        assert (status["lines"], status["conditions"][0]["reason"]) == ({}, "device_revoked")
        assert "condition  Revoked" in did("edge-agent", "status", "--config", "agent.toml", folder=fleet.folder)
        assert "edge_up 1" in did("edge-agent", "metrics", "--config", "agent.toml", folder=fleet.folder)
        observer.wait("the last word", lambda: [e for e in observer.events if e["kind"] == "revoked"], 60)
    assert [path.name for path in (device.state / "keys").iterdir()] == ["wiped"]
    assert list((device.state / "store").iterdir()) == []
    assert refused("edge-agent", "update", "--config", "agent.toml", folder=fleet.folder).reason == "device_revoked"
    assert fleet.agent is not None
    fleet.agent.kill()
    fleet.agent.wait()
    device.start()
    assert device.ask()["link"]["state"] == "revoked"
    assert device.stop() == 0
    assert refused("edge-ota", "grant", "repo", "belt-01", "parts", "1.0.0", folder=fleet.folder).reason == (
        "device_revoked"
    )
    told_again = refused("edge-agent", "enroll", "--config", "agent.toml", "--device", "belt-01", folder=fleet.folder)
    assert told_again.reason == "device_revoked"


@pytest.mark.fault("F52")
def test_a_revoked_device_that_the_broker_refuses_hears_it_from_the_listener(
    site: tuple[Fleet, Device, Operator],
) -> None:
    fleet, device, operator = site
    operator.listen(behind_s=LIFE_S - 100)
    operator.enroll(operator.token())
    operator.stop()
    did("edge-ota", "revoke", "repo", "belt-01", folder=fleet.folder)
    assert fleet.broker is not None
    fleet.broker.restart()
    operator.listen()
    device.start()
    until("the end", lambda: (device.ask() or {"link": {"state": ""}})["link"]["state"] == "revoked", 60)
    assert [path.name for path in (device.state / "keys").iterdir()] == ["wiped"]


def test_another_board_takes_over_an_id_with_everything_it_was_granted(
    site: tuple[Fleet, Device, Operator], tmp_path: Path
) -> None:
    fleet, device, operator = site
    operator.listen()
    operator.enroll(operator.token())
    with watching(fleet) as observer:
        device.start()
        until("the link", lambda: device.ask()["link"]["state"] == "connected")
        assert device.grant(observer, "1.0.0")["outcome"] == "committed"
        old = operator.record()
        assert device.stop() == 0
        shutil.move(device.state, tmp_path / "old-board")
        data = json.loads(did("edge-ota", "replace", "repo", "belt-01", "--token", "--json", folder=fleet.folder))
        seen = len(observer.events)
        operator.enroll(data["token"])
        assert fleet.broker is not None
        fleet.broker.restart()
        new = operator.record()
        assert (new["kid"] != old["kid"], "older" in new) == (True, False)
        device.start("1.0.0")
        assert observer.wait("its update", lambda: [e for e in observer.events[seen:] if e.get("outcome")], 60)
        assert device.stop() == 0
    listed = x509.load_pem_x509_crl((fleet.folder / "repo/revoked.pem").read_bytes())
    assert [entry.serial_number for entry in listed] == [int(old["certificate_serial"], 16)]
    assert operator.audit()[-2:] == ["replaced", "enrolled"]
    # the old board is refused by the broker from now on
    shutil.rmtree(device.state)
    shutil.move(tmp_path / "old-board", device.state)
    device.start()
    until("the refusal", lambda: device.ask()["link"]["reason"] == "broker_refused")


def test_a_decommissioned_device_is_out_for_good(site: tuple[Fleet, Device, Operator]) -> None:
    fleet, _device, operator = site
    operator.listen()
    operator.enroll(operator.token())
    did("edge-ota", "grant", "repo", "belt-01", "parts", "1.0.0", folder=fleet.folder)
    data = json.loads(did("edge-ota", "decommission", "repo", "belt-01", "--json", folder=fleet.folder))
    assert (data["decommissioned"], data["desired"]) == (True, [])
    signed = json.loads((fleet.folder / "repo/devices/belt-01/desired.json").read_text())["signed"]
    assert (signed["revoked"], signed["targets"], signed["grants"]) == (True, {}, {})
    assert operator.audit()[-1] == "decommissioned"
    assert refused("edge-ota", "token", "repo", "belt-01", folder=fleet.folder).reason == "device_revoked"
    assert re.search(r"belt-01 .* revoked 20", did("edge-ota", "devices", "repo", folder=fleet.folder))


def test_a_reset_beside_a_dead_daemon_keeps_a_record_of_whose_it_was(site: tuple[Fleet, Device, Operator]) -> None:
    fleet, device, operator = site
    operator.listen()
    operator.enroll(operator.token())
    did("edge-agent", "reset", "--config", "agent.toml", "--yes", folder=fleet.folder)
    assert {path.name for path in device.state.rglob("*")} == {"lock", "last-reset.json"}
    assert json.loads((device.state / "last-reset.json").read_bytes())["device"] == "belt-01"


def test_a_running_device_that_changes_hands_keeps_nothing_and_begins_anew(
    site: tuple[Fleet, Device, Operator],
) -> None:
    fleet, device, operator = site
    operator.listen()
    operator.enroll(operator.token())
    with watching(fleet) as observer:
        device.start()
        until("the link", lambda: device.ask()["link"]["state"] == "connected")
        assert device.grant(observer, "1.0.0")["outcome"] == "committed"
    reset = ("reset", "--config", "agent.toml")
    assert refused("edge-agent", *reset, folder=fleet.folder).reason == "bad_usage"
    did("edge-agent", *reset, "--owner", "--yes", folder=fleet.folder)
    left = {str(path.relative_to(device.state)) for path in device.state.rglob("*")}
    assert left == {"lock", "last-reset.json"}
    assert b"belt-01" not in (device.state / "last-reset.json").read_bytes()
    assert fleet.agent is not None
    assert fleet.agent.wait(20) == 0
    assert run("edge-agent", "run", "--config", "agent.toml", folder=fleet.folder).code == 78
    # and it begins a new life
    data = json.loads(did("edge-ota", "replace", "repo", "belt-01", "--token", "--json", folder=fleet.folder))
    operator.enroll(data["token"])
    with watching(fleet) as observer:
        device.start("1.0.0")
        observer.wait("the reset", lambda: [e for e in observer.events if e["kind"] == "reset"], 60)


def test_a_reset_that_was_cut_short_is_finished_by_the_next_start(site: tuple[Fleet, Device, Operator]) -> None:
    fleet, device, operator = site
    operator.listen()
    operator.enroll(operator.token())
    for number in (3, 6, 12):
        folder = fleet.folder / f"cut{number}"
        twin = device.twin(_made(folder))
        command = [
            "strace", "-f", "-qq", "-o", "/dev/null",
            "-e", f"inject=fsync:signal=KILL:when={number}",
            str(BIN / "edge-agent"), "reset", "--yes", "--config", "agent.toml",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        assert done.returncode == -9, done.stderr
        assert (twin.state / "reset.json").exists()
        after = run("edge-agent", "run", "--config", "agent.toml", folder=folder, timeout_s=60)
        assert after.code == 78, after.err
        # an unenrolled daemon makes its empty records anew
        assert {path.name for path in twin.state.iterdir()} <= {"lock", "last-reset.json", "config", "state"}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_another_operators_bundle_is_refused_until_the_device_was_wiped(
    site: tuple[Fleet, Device, Operator], tmp_path: Path
) -> None:
    fleet, device, operator = site
    operator.listen()
    operator.enroll(operator.token())
    other = tmp_path / "other"
    other.mkdir()
    did("edge-ota", "init", "repo", folder=other)
    words = ("enroll", "--config", device.config)
    did("edge-agent", *words, "--device", "belt-01", "--out", other / "request.json", folder=fleet.folder)
    did("edge-ota", "enroll", "repo", "request.json", "--broker", "127.0.0.1", "--out", "bundle.json", folder=other)
    told = refused("edge-agent", *words, "--bundle", other / "bundle.json", folder=fleet.folder)
    assert (told.reason, "reset --owner" in told.hint) == ("already_enrolled", True)
    did("edge-agent", "reset", "--owner", "--yes", "--config", "agent.toml", folder=fleet.folder)
    # the old request's keys are gone with the old owner
    assert refused("edge-agent", *words, "--bundle", other / "bundle.json", folder=fleet.folder).reason == "key_missing"
