"""The governor on recorded and simulated heat: it acts in time, gives back in time, and does not swing."""

from __future__ import annotations

import asyncio
import csv
import os
import signal
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import profile
from agent.configtable import Table
from agent.daemon import metrics
from agent.daemon.governor import LOOK_EVERY_TICKS, MAX_PATIENCE, Governor, Stand, acts_on, decide, governor_of, strain
from agent.daemon.vitals import Vitals, VitalsReader
from agent.errors import ConfigError
from agent.governorconfig import DEFAULT, GovernorConfig, divisor, merged, parse_governor
from ota.client.ports import Candidate
from tests.agent.daemon.rig import Rig, run

ROOT = Path(__file__).resolve().parents[3]
PI = merged(profile.load_all()["raspberry-pi-4"].governor, GovernorConfig())
PAUSED_S = 1.0
HOT = replace(DEFAULT, hot_c=80.0, cool_c=70.0)


def recorded(name: str) -> list[tuple[float, float]]:
    lines = (ROOT / "tests" / "vectors" / "thermal" / name).read_text().splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return [(float(row["t_s"]), float(row["temperature_c"])) for row in rows]


@dataclass
class Board:
    """Simulated: a first-order thermal model. The board nears `ambient_c` + `idle_k`, and `load_k` for full frame rate,
    with the time constant `tau_s`."""

    ambient_c: float = 25.0
    idle_k: float = 20.0
    load_k: float = 50.0
    tau_s: float = 120.0
    temperature_c: float = 45.0

    def step(self, share: float, seconds: float = 1.0) -> float:
        target = self.ambient_c + self.idle_k + self.load_k * share
        self.temperature_c += (target - self.temperature_c) * min(1.0, seconds / self.tau_s)
        return self.temperature_c


@dataclass
class Run:
    """What a simulated board went through: temperatures, and the (time, level) of every change."""

    temperatures: list[float] = field(default_factory=list)
    changes: list[tuple[float, int]] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


def simulate(config: GovernorConfig, board: Board, seconds: int, noise: Any = lambda t: 0.0) -> Run:
    """Second by second, the board in the governor's hands."""
    stand, seen = Stand(), Run()
    for now in range(seconds):
        share = 1 / divisor(config.ladder[stand.level - 1]) if stand.level else 1.0
        seen.shares.append(share)
        seen.temperatures.append(board.step(share))
        after = decide(config, stand, Vitals(temperature_c=board.temperature_c + noise(now)), float(now))
        if after.level != stand.level:
            seen.changes.append((now, after.level))
        stand = after
    return seen


# --- heat ------------------------------------------------------------------------------------------------------------


def test_on_a_recorded_raspberry_pi_nothing_happens_before_it_is_hot_and_each_rung_has_its_time() -> None:
    stand, changes = Stand(), []
    for t_s, temperature_c in recorded("raspberry-pi-4.csv"):
        after = decide(PI, stand, Vitals(temperature_c=temperature_c), t_s)
        if after.level != stand.level:
            changes.append((t_s, temperature_c, after.level))
        stand = after
    # the record is of a board that nobody relieved: it stays hot, and rung follows rung
    assert changes == [(810, 78.9, 1), (832, 78.9, 2), (852, 81.8, 3)]
    assert stand.cause == "81.8 °C, 78 allowed"


def test_a_board_that_gets_too_hot_is_kept_below_its_limit_and_keeps_working() -> None:
    seen = simulate(HOT, Board(), 2 * 3600)
    assert max(simulate(replace(HOT, ladder=()), Board(), 2 * 3600).temperatures) > 90
    assert max(seen.temperatures) < 82
    assert min(seen.shares) > 0
    assert sum(seen.shares) / len(seen.shares) > 0.4


def test_a_board_that_is_only_cool_because_of_the_rung_does_not_swing() -> None:
    """At half rate it settles at 70 °C, at full rate at 95: by hysteresis alone it would go up and down every 4 min."""
    board = Board(load_k=50.0, tau_s=60.0)
    seen = simulate(replace(HOT, cool_c=72.0), board, 12 * 3600)
    assert seen.changes
    assert len(seen.changes) <= 2 * MAX_PATIENCE + 2 * 12
    waits = [b[0] - a[0] for a, b in pairwise(seen.changes) if b[1] < a[1]]
    assert waits[MAX_PATIENCE] >= 2**MAX_PATIENCE * HOT.recover_s
    assert all(b >= 1.5 * a for a, b in pairwise(waits[: MAX_PATIENCE + 1])), waits


def test_noise_around_the_threshold_does_not_make_it_swing() -> None:
    board = Board(load_k=30.0, tau_s=300.0)  # settles at 75 °C: between both thresholds
    seen = simulate(HOT, board, 6 * 3600, noise=lambda t: 1.5 * (-1) ** t)
    assert len(seen.changes) == 0
    board = Board(load_k=34.0, tau_s=300.0)  # settles at 79 °C: noise alone crosses the upper one
    seen = simulate(HOT, board, 6 * 3600, noise=lambda t: 1.5 * (-1) ** t)
    assert 1 <= len(seen.changes) <= 2 * MAX_PATIENCE + 12


def test_when_the_reason_for_the_heat_is_gone_the_full_rate_comes_back() -> None:
    board = Board()
    seen = simulate(HOT, board, 1800)
    assert seen.changes[-1][1] > 0
    board.load_k = 10.0
    stand = Stand(level=2, since_s=0.0, patience=0)
    for now in range(1, 3600):
        board.step(1.0)
        stand = decide(HOT, stand, Vitals(temperature_c=board.temperature_c), float(now))
    assert stand.level == 0
    assert decide(HOT, replace(stand, patience=4), Vitals(temperature_c=40.0), stand.since_s + 3600).patience == 0


@given(
    st.lists(st.floats(0, 120), min_size=1, max_size=60),
    st.floats(1, 60),
    st.floats(1, 300),
    st.sampled_from([("fps/2",), ("fps/2", "fps/4", "pause"), ("pause",), ("fps/3", "fps/9", "fps/27")]),
)
def test_one_rung_at_a_time_and_none_before_its_time(
    temperatures: list[float], hold_s: float, recover_s: float, ladder: tuple[str, ...]
) -> None:
    config = replace(HOT, hold_s=hold_s, recover_s=recover_s, ladder=ladder)
    stand, changed_at = Stand(), float("-inf")
    for now, temperature_c in enumerate(temperatures):
        after = decide(config, stand, Vitals(temperature_c=temperature_c), now * 5.0)
        assert 0 <= after.level <= len(ladder)
        assert abs(after.level - stand.level) <= 1
        if after.level != stand.level:
            assert now * 5.0 - changed_at >= hold_s
            assert (temperature_c >= 80) if after.level > stand.level else (temperature_c <= 70)
            changed_at = now * 5.0
        stand = after


def test_between_the_thresholds_nothing_changes() -> None:
    stand = Stand(level=1, since_s=0.0, calm_since_s=5.0)
    after = decide(HOT, stand, Vitals(temperature_c=75.0), 10_000.0)
    assert (after.level, after.calm_since_s) == (1, None)


# --- everything else that strains a board ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "vitals", "cause", "calm"),
    [
        (DEFAULT, Vitals(), None, True),
        (DEFAULT, Vitals(temperature_c=99.0), None, True),
        (DEFAULT, Vitals(temperature_c=99.0, headroom_k=6.0), "6.0 °C below", False),
        (DEFAULT, Vitals(temperature_c=90.0, headroom_k=15.0), None, False),
        (DEFAULT, Vitals(temperature_c=80.0, headroom_k=25.0), None, True),
        (HOT, Vitals(temperature_c=79.0, headroom_k=2.0), None, False),
        (DEFAULT, Vitals(throttled=("under_voltage",)), "slowed down: under_voltage", False),
        (DEFAULT, Vitals(throttled=("cooling",)), "slowed down: cooling", False),
        (DEFAULT, Vitals(pressure_percent=99.0), None, True),
        (replace(DEFAULT, pressure_percent=50.0), Vitals(pressure_percent=60.0), "pressure 60 %", False),
        (replace(DEFAULT, pressure_percent=50.0), Vitals(pressure_percent=40.0), None, False),
        (replace(DEFAULT, pressure_percent=50.0), Vitals(pressure_percent=30.0), None, True),
        (replace(DEFAULT, power_w=15.0), Vitals(power_w=15.2), "15.2 W, 15 allowed", False),
        (replace(DEFAULT, power_w=15.0), Vitals(power_w=12.0), None, True),
        (replace(DEFAULT, battery_percent=20.0), Vitals(battery_percent=19.0), "battery at 19 %", False),
        (replace(DEFAULT, battery_percent=20.0), Vitals(battery_percent=22.0), None, False),
        (replace(DEFAULT, battery_percent=20.0), Vitals(), None, True),
    ],
)
def test_what_strains_a_board(config: GovernorConfig, vitals: Vitals, cause: str | None, calm: bool) -> None:
    found = strain(config, vitals)
    assert found.calm == calm
    assert (cause is None) == (not found.causes)
    assert cause is None or cause in found.causes[0][0]


# --- the reader ------------------------------------------------------------------------------------------------------


def put(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_a_board_without_any_sensor_tells_nothing(tmp_path: Path) -> None:
    assert VitalsReader(tmp_path).read() == Vitals()


def test_the_hottest_zone_and_the_least_headroom_are_told(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", "61500\n")
    put(tmp_path, "sys/class/thermal/thermal_zone0/trip_point_0_temp", "110000\n")
    put(tmp_path, "sys/class/thermal/thermal_zone0/trip_point_0_type", "critical\n")
    put(tmp_path, "sys/class/thermal/thermal_zone1/temp", "48000\n")
    put(tmp_path, "sys/class/thermal/thermal_zone1/trip_point_0_temp", "60000\n")
    put(tmp_path, "sys/class/thermal/thermal_zone1/trip_point_0_type", "passive\n")
    put(tmp_path, "sys/class/thermal/thermal_zone1/trip_point_1_temp", "90000\n")
    put(tmp_path, "sys/class/thermal/thermal_zone1/trip_point_1_type", "hot\n")
    put(tmp_path, "sys/class/thermal/thermal_zone2/trip_point_0_temp", "-274000\n")
    put(tmp_path, "sys/class/thermal/thermal_zone2/trip_point_0_type", "critical\n")
    put(tmp_path, "sys/class/thermal/thermal_zone2/temp", "no number\n")
    told = VitalsReader(tmp_path).read()
    assert (told.temperature_c, told.headroom_k) == (61.5, 42.0)


@pytest.mark.parametrize(
    "path",
    [
        "sys/devices/platform/soc/soc:firmware/get_throttled",
        "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled",
    ],
)
def test_a_raspberry_pi_tells_why_it_is_slow_now_and_not_why_it_once_was(tmp_path: Path, path: str) -> None:
    put(tmp_path, path, "50005\n")
    assert VitalsReader(tmp_path).read().throttled == ("under_voltage", "throttled")
    put(tmp_path, path, "50000\n")
    assert VitalsReader(tmp_path).read().throttled == ()


def test_a_processor_that_the_kernel_cools_is_slowed_down_and_a_fan_is_not(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/thermal/cooling_device0/type", "pwm-fan\n")
    put(tmp_path, "sys/class/thermal/cooling_device0/cur_state", "3\n")
    put(tmp_path, "sys/class/thermal/cooling_device1/type", "thermal-cpufreq-0\n")
    put(tmp_path, "sys/class/thermal/cooling_device1/cur_state", "0\n")
    reader = VitalsReader(tmp_path)
    assert reader.read().throttled == ()
    put(tmp_path, "sys/class/thermal/cooling_device1/cur_state", "2\n")
    assert reader.read().throttled == ("cooling",)


def test_power_battery_pressure_and_clock_are_read(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/hwmon/hwmon0/name", "nvme\n")
    put(tmp_path, "sys/class/hwmon/hwmon1/name", "ina3221\n")
    put(tmp_path, "sys/class/hwmon/hwmon1/in1_input", "4980\n")
    put(tmp_path, "sys/class/hwmon/hwmon1/curr1_input", "1290\n")
    put(tmp_path, "sys/class/power_supply/BAT0/type", "Battery\n")
    put(tmp_path, "sys/class/power_supply/BAT0/status", "Discharging\n")
    put(tmp_path, "sys/class/power_supply/BAT0/capacity", "37\n")
    put(tmp_path, "proc/pressure/cpu", "some avg10=12.34 avg60=5.00 avg300=1.00 total=99\nfull avg10=0.00\n")
    put(tmp_path, "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq", "1800000\n")
    put(tmp_path, "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq", "2400000\n")
    told = VitalsReader(tmp_path).read()
    assert told.power_w == pytest.approx(6.4242)
    assert (told.battery_percent, told.pressure_percent, told.processor_mhz) == (37.0, 12.34, 2400.0)
    put(tmp_path, "sys/class/power_supply/AC/type", "Mains\n")
    put(tmp_path, "sys/class/power_supply/AC/online", "1\n")
    assert VitalsReader(tmp_path).read().battery_percent is None


@pytest.mark.parametrize("nonsense", ["-274000", "-256000", "1000000000", "1e6", "9" * 400, "", "\0" * 9])
def test_a_thermometer_that_reads_nonsense_is_no_reason_to_slow_down(tmp_path: Path, nonsense: str) -> None:
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", nonsense)
    put(tmp_path, "sys/class/thermal/thermal_zone0/trip_point_0_temp", "110000\n")
    put(tmp_path, "sys/class/thermal/thermal_zone0/trip_point_0_type", "critical\n")
    told = VitalsReader(tmp_path).read()
    assert (told.temperature_c, told.headroom_k) == (None, None)
    put(tmp_path, "sys/class/thermal/thermal_zone1/temp", "61500\n")
    assert VitalsReader(tmp_path).read().temperature_c == 61.5


def test_a_thermometer_that_is_gone_counts_for_nothing_and_the_full_rate_comes_back(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", "85000\n")
    reader, stand = VitalsReader(tmp_path), Stand()
    stand = decide(HOT, stand, reader.read(), 0.0)
    (tmp_path / "sys/class/thermal/thermal_zone0/temp").unlink()
    for now in range(2, 300, 2):
        before, stand = stand, decide(HOT, stand, reader.read(), float(now))
        if stand.level != before.level:
            assert now >= HOT.recover_s
    assert stand.level == 0


def test_the_battery_of_a_mouse_is_not_the_boards(tmp_path: Path) -> None:
    for key, text in {"type": "Battery", "scope": "Device", "status": "Discharging", "capacity": "5"}.items():
        put(tmp_path, f"sys/class/power_supply/hidpp_battery_0/{key}", f"{text}\n")
    reader = VitalsReader(tmp_path)
    assert (reader.read().battery_percent, reader.tells) == (None, ())


def test_what_it_can_act_on_is_what_the_board_tells_and_the_settings_ask_for(tmp_path: Path) -> None:
    assert VitalsReader(tmp_path).tells == ()
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", "61500\n")
    put(tmp_path, "proc/pressure/cpu", "some avg10=0.00\n")
    tells = VitalsReader(tmp_path).tells
    assert tells == ("temperature", "pressure")
    assert acts_on(DEFAULT, tells) == []
    assert acts_on(HOT, tells) == ["temperature"]
    assert acts_on(replace(HOT, pressure_percent=50.0), tells) == ["temperature", "pressure"]


def test_a_board_without_a_sensor_that_matters_is_said_to_have_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for tells, said in (("pressure",), True), (("throttling",), False):
        caplog.clear()
        monkeypatch.setattr(VitalsReader, "tells", tells)
        governor_of(DEFAULT, [], lambda _: None)
        assert ("never acts" in caplog.text) == said


def test_this_machine_is_read_without_harm() -> None:
    told = VitalsReader().read()
    assert told.pressure_percent is None or 0 <= told.pressure_percent <= 100


# --- settings --------------------------------------------------------------------------------------------------------


def parsed(**keys: Any) -> GovernorConfig:
    return parse_governor(Table(keys, "agent.toml: [governor]", Path()))


def test_the_devices_own_settings_go_before_the_profiles_and_those_before_the_defaults() -> None:
    assert merged(GovernorConfig(), GovernorConfig()) == DEFAULT
    assert (PI.hot_c, PI.cool_c, PI.ladder) == (78.0, 70.0, DEFAULT.ladder)
    own = merged(GovernorConfig(hot_c=78.0, cool_c=70.0), parsed(hot_c=75, hold_s=1, ladder=["pause"]))
    assert own == replace(DEFAULT, hot_c=75.0, cool_c=70.0, hold_s=1.0, ladder=("pause",))
    assert not merged(GovernorConfig(), parsed(enabled=False)).enabled


@pytest.mark.parametrize("own", [{"hot_c": 65}, {"cool_c": 80}])
def test_thresholds_of_two_layers_leave_room_between_hot_and_cool(own: dict[str, Any]) -> None:
    config = merged(GovernorConfig(hot_c=78.0, cool_c=70.0), parsed(**own))
    assert strain(config, Vitals(temperature_c=config.hot_c)).causes
    assert not strain(config, Vitals(temperature_c=config.hot_c - 1)).calm
    assert strain(config, Vitals(temperature_c=config.hot_c - 8)).calm


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"ladder": ["fps/1"]}, "fps/1"),
        ({"ladder": ["fps/101"]}, "fps/101"),
        ({"ladder": ["fps/4", "fps/2"]}, "no more than the one before it"),
        ({"ladder": ["pause", "pause"]}, "no more than the one before it"),
        ({"hot_c": 70, "cool_c": 70}, "not below"),
        ({"hot_c": 900}, "hot_c"),
        ({"cold_c": 1}, "unknown key"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parsed(**keys)


# --- effects ---------------------------------------------------------------------------------------------------------


class Source:
    def __init__(self) -> None:
        self.paces: list[int] = []

    def set_pace(self, divisor: int) -> None:
        self.paces.append(divisor)


class Script:
    """A board whose temperatures are given, one a look, two seconds apart."""

    def __init__(self, *temperatures: float, config: GovernorConfig = HOT) -> None:
        self.told: list[dict[str, Any]] = []
        self.source, self._left, self._now = Source(), list(temperatures), 0.0
        self.governor = Governor(config, self._read, [self.source], tell=self.told.append, clock=lambda: self._now)

    def _read(self) -> Vitals:
        return Vitals(temperature_c=self._left.pop(0))

    def play(self) -> Governor:
        while self._left:
            for _ in range(LOOK_EVERY_TICKS):
                self._now += 1.0
                self.governor.tick()
        return self.governor


def test_every_source_is_slowed_rung_by_rung_and_told_of_once_each() -> None:
    script = Script(*[85.0] * 20)
    governor = script.play()
    assert script.source.paces == [2, 4, 0]
    assert [(t["rung"], t["level"]) for t in script.told] == [("fps/2", 1), ("fps/4", 2), ("pause", 3)]
    assert all(t["temperature_c"] == 85.0 and "throttled" not in t for t in script.told)
    (condition,) = governor.conditions()
    assert condition["type"] == "FullRate"
    assert "all sources are paused: 85.0 °C, 80 allowed" in condition["message"]
    assert governor.status()["rung"] == "pause"


@pytest.mark.parametrize(
    ("vitals", "config", "remedy"),
    [
        (Vitals(temperature_c=85.0), HOT, "cool the board"),
        (Vitals(throttled=("under_voltage",)), DEFAULT, "give it a stronger supply"),
        (Vitals(pressure_percent=90.0), replace(DEFAULT, pressure_percent=50.0), "give it less to do"),
        (Vitals(battery_percent=5.0), replace(DEFAULT, battery_percent=20.0), "charge it"),
    ],
)
def test_a_person_is_told_what_helps_against_the_cause(vitals: Vitals, config: GovernorConfig, remedy: str) -> None:
    governor = Governor(config, lambda: vitals, [], tell=lambda _: None, clock=lambda: 0.0)
    for _ in range(LOOK_EVERY_TICKS):
        governor.tick()
    (condition,) = governor.conditions()
    assert condition["message"].startswith("sources give one of 2 frames: ")
    assert condition["message"].endswith(f"; {remedy}, or see [governor] in agent.toml")


def test_the_way_back_ends_with_each_source_at_its_own_pace_and_without_a_condition() -> None:
    script = Script(85.0, *[60.0] * 200)
    governor = script.play()
    assert script.source.paces == [2, 1]
    assert [t["rung"] for t in script.told] == ["fps/2", ""]
    assert governor.conditions() == []


def test_switched_off_it_reads_and_does_nothing() -> None:
    script = Script(*[99.0] * 20, config=replace(HOT, enabled=False))
    governor = script.play()
    assert (script.source.paces, script.told, governor.rung) == ([], [], "")
    assert governor.status()["vitals"]["temperature_c"] == 99.0


def test_metrics_show_rung_and_temperature() -> None:
    governor = Script(*[85.0] * 3).play()
    status = {
        "process": {"rss_bytes": 1}, "link": {"state": "connected", "bytes": {}}, "sources": {}, "lines": {},
        "governor": governor.status(),
    }  # fmt: skip
    text = metrics.render(status)
    assert "edge_governor_level 1\n" in text
    assert "edge_temperature_celsius 85\n" in text


@pytest.mark.parametrize("fused", [False, True])
def test_a_paused_source_stays_paused_when_its_process_is_replaced(clip: Path, parts: Candidate, fused: bool) -> None:
    async def body(rig: Rig) -> None:
        await rig.serve(parts)
        await rig.frames()
        rig.source.set_pace(0)
        victim = rig.source.pid
        os.kill(victim, signal.SIGKILL)
        await rig.until(lambda: rig.source.pid not in (0, victim) and rig.source.opened is not None)
        await asyncio.sleep(PAUSED_S)
        seen = len(rig.results)
        await asyncio.sleep(PAUSED_S)
        assert len(rig.results) == seen
        rig.source.set_pace(1)
        await rig.frames(10)

    run(body, clip, fused=fused)
