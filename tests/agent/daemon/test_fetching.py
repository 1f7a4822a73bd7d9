"""From where, when and how fast a device fetches, as agent.toml says it."""

from __future__ import annotations

import datetime
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from agent import config
from agent.daemon.fetching import Fetching
from agent.errors import ConfigError
from ota.brokertls import Tls
from ota.client.ports import UpdateEvent
from ota.client.transports.https import HttpsTransport
from ota.errors import Postponed, Reason

TLS = Tls("ca.pem", "certificate.pem", "key.pem")
NOON = datetime.datetime(2026, 6, 1, 12, 0, tzinfo=datetime.UTC)


def _config(update: str) -> config.UpdateConfig:
    return config.parse(tomllib.loads(f"[update]\n{update}"), Path("/etc/edge-agent/agent.toml")).update


def _fetching(update: str = "", tls: Any = lambda: TLS, enrolled: str = "") -> Fetching:
    return Fetching(_config(update), enrolled, "cam-1", tls, clock=lambda: NOON)


class Broker:
    """Stands for the MQTT transport: its place in the order, and whether it knows that it is not alone."""

    name = "mqtt"
    alone = True

    def beside_another(self) -> None:
        self.alone = False


def test_without_settings_payloads_come_over_the_broker_at_any_time() -> None:
    fetching, broker = _fetching(), Broker()
    assert [way.name for way in fetching.transports(broker)] == ["mqtt"]  # type: ignore[arg-type]
    assert broker.alone, "nobody else can be asked, so silence is borne to its end"
    assert not fetching.beside_broker
    fetching.gate.check(delta=False)
    assert fetching.gate.turn().take(1 << 30) == 0


def test_a_time_zone_set_while_the_daemon_runs_is_the_one_that_windows_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    now, hours = datetime.datetime.now(datetime.UTC), datetime.timedelta(hours=3)
    fetching = Fetching(_config(f'windows = ["{now - hours:%H:%M}-{now + hours:%H:%M}"]'), "", "cam-1", None)
    fetching.status()
    try:
        for zone, is_open in (("UTC0", True), ("XXX-12", False)):
            monkeypatch.setenv("TZ", zone)
            assert (fetching.status()["window_opens_in_s"] == 0) is is_open
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_web_server_comes_after_the_broker_and_alone_where_there_is_none() -> None:
    fetching, broker = _fetching('https = "https://files.example.org/edge"'), Broker()
    assert [way.name for way in fetching.transports(broker)] == ["mqtt", "https"]  # type: ignore[arg-type]
    assert not broker.alone
    assert [way.name for way in fetching.transports(None)] == ["https"]
    assert fetching.beside_broker
    assert fetching.status()["https"] == "https://files.example.org:443/edge"


def test_the_web_server_of_the_enrolment_serves_unless_the_settings_name_another() -> None:
    enrolled = "https://fleet.example.org/edge"
    assert _fetching(enrolled=enrolled).status()["https"] == "https://fleet.example.org:443/edge"
    chosen = _fetching('https = "https://files.example.org/edge"', enrolled=enrolled)
    assert chosen.status()["https"] == "https://files.example.org:443/edge"


def test_what_a_web_server_sent_counts_among_the_bytes_of_updates() -> None:
    flows = {"updates": {"in": 100, "out": 10}, "telemetry": {"in": 0, "out": 5}}
    assert _fetching().with_https(flows) == flows
    fetching = _fetching('https = "https://files.example.org/edge"')
    [https] = fetching.transports(None)
    assert isinstance(https, HttpsTransport)
    https.counts.body_bytes = 900
    assert fetching.with_https(flows) == {**flows, "updates": {"in": 1000, "out": 10}}
    assert fetching.with_https({}) == {"updates": {"in": 900, "out": 0}}


def test_a_device_without_a_key_has_no_web_server() -> None:
    assert _fetching('https = "https://files.example.org/edge"', tls=None).transports(None) == []


def test_windows_rate_and_metered_reach_the_gate() -> None:
    fetching = _fetching('windows = ["02:00-05:00"]\nrate_kbit_s = 800\nmetered = true\non_metered = "deltas"')
    assert fetching.gate.policy.rate_bytes_per_s == 100_000
    with pytest.raises(Postponed) as caught:
        fetching.gate.check(delta=False)
    assert caught.value.reason is Reason.METERED
    with pytest.raises(Postponed) as caught:
        fetching.gate.check(delta=True)
    assert caught.value.reason is Reason.OUTSIDE_WINDOW
    assert fetching.status()["window_opens_in_s"] == 14 * 3600


def test_a_look_is_wished_for_when_the_window_opens_and_only_then() -> None:
    fetching = _fetching('windows = ["12:30-13:00"]')
    wishes: list[float] = []
    fetching.note([UpdateEvent("person", "1.0.0", "idle", reason=Reason.METERED)], wishes.append)
    assert wishes == []
    fetching.note([UpdateEvent("person", "1.0.0", "idle", reason=Reason.OUTSIDE_WINDOW)], wishes.append)
    assert [1800 < wish < 1810 for wish in wishes] == [True]


@pytest.mark.parametrize(
    "update",
    [
        'windows = ["2-5"]',
        'windows = ["02:00-02:00"]',
        'windows = "02:00-05:00"',
        "windows = [5]",
        "rate_kbit_s = 1",
        'on_metered = "some"',
        'https = "http://files.example.org"',
        'https = "https://user:pw@files.example.org"',
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(update: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(update)
    assert update.split(" =")[0] in caught.value.message
