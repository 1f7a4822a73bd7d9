"""When, what and how fast payloads are fetched; waiting is told from failing."""

from __future__ import annotations

import asyncio
import datetime
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota.client.fetch import Inbox
from ota.client.fsops import Fs
from ota.client.policy import DayWindow, Gate, Metered, Policy, parse_window, windows
from ota.client.transfer import Counts
from ota.client.transports.directory import DirectoryTransport
from ota.errors import Postponed, Reason
from ota.pace import TokenBucket
from ota.release import LEAF_BYTES
from tests.ota.client.conftest import DEVICE, FAST, Device, QuickDisk, run
from tests.ota.client.simulator import SimulatedTransport, Simulator
from tests.ota.client.test_transfer import _payload

NIGHT = Policy(windows=windows(["02:00-05:00"]))


def _at(clock: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(f"2026-06-01T{clock}+02:00")


class Clock:
    """Local time and monotonic seconds that move only when told."""

    def __init__(self, now: str = "12:00:00") -> None:
        self.now = _at(now)
        self.seconds = 0.0

    def local(self) -> datetime.datetime:
        return self.now

    def monotonic(self) -> float:
        return self.seconds

    def gate(self, policy: Policy) -> Gate:
        return Gate(policy, self.local, self.monotonic)


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("02:00-05:00", DayWindow(120, 300)),
        ("22:30-00:30", DayWindow(1350, 30)),
        ("00:00-24:00", DayWindow(0, 1440)),
        ("23:59-00:00", DayWindow(1439, 0)),
    ],
)
def test_a_window_is_two_times_of_day(text: str, window: DayWindow) -> None:
    assert parse_window(text) == window


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2:00-5:00",
        "02:00",
        "02:00-02:00",
        "00:00-00:00",
        "25:00-26:00",
        "02:60-03:00",
        "02:00-24:01",
        "24:00-01:00",
        "02:00-05:00 ",
    ],
)
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_window(text)


@pytest.mark.parametrize(
    ("window", "clock", "opens_in_s"),
    [
        ("02:00-05:00", "01:59:30", 30),
        ("02:00-05:00", "02:00:00", 0),
        ("02:00-05:00", "04:59:59", 0),
        ("02:00-05:00", "05:00:00", 21 * 3600),
        ("22:30-00:30", "23:00:00", 0),
        ("22:30-00:30", "00:29:59", 0),
        ("22:30-00:30", "00:30:00", 22 * 3600),
        ("00:00-24:00", "23:59:59", 0),
    ],
)
def test_a_window_says_when_it_opens_also_across_midnight(window: str, clock: str, opens_in_s: float) -> None:
    assert Policy(windows=windows([window])).opens_in_s(_at(clock)) == opens_in_s


@given(
    st.lists(st.tuples(st.integers(0, 1439), st.integers(0, 1439)).filter(lambda w: w[0] != w[1]), max_size=4),
    st.integers(0, 86_399),
)
def test_the_wait_for_a_window_ends_at_its_first_moment(spans: list[tuple[int, int]], second: int) -> None:
    policy = Policy(windows=tuple(DayWindow(*span) for span in spans))
    now = _at("00:00:00") + datetime.timedelta(seconds=second)
    wait_s = policy.opens_in_s(now)
    assert 0 <= wait_s <= 86_400
    assert policy.opens_in_s(now + datetime.timedelta(seconds=wait_s)) == 0
    if wait_s > 1:
        assert policy.opens_in_s(now + datetime.timedelta(seconds=wait_s - 1)) > 0


@pytest.mark.parametrize(
    ("policy", "delta", "reason"),
    [
        (Policy(), False, None),
        (Policy(metered=True), False, None),
        (Policy(metered=False, on_metered=Metered.NEVER), False, None),
        (Policy(metered=True, on_metered=Metered.DELTAS), True, None),
        (Policy(metered=True, on_metered=Metered.DELTAS), False, Reason.METERED),
        (Policy(metered=True, on_metered=Metered.NEVER), True, Reason.METERED),
        (NIGHT, True, Reason.OUTSIDE_WINDOW),
    ],
)
def test_a_policy_lets_pass_or_says_why_not_and_when(policy: Policy, delta: bool, reason: Reason | None) -> None:
    if reason is None:
        policy.check(_at("12:00:00"), delta=delta)
        return
    with pytest.raises(Postponed) as caught:
        policy.check(_at("12:00:00"), delta=delta)
    assert caught.value.reason is reason
    assert caught.value.hint
    assert caught.value.retry_in_s == (14 * 3600 if reason is Reason.OUTSIDE_WINDOW else None)


def test_the_rate_holds_over_everything_that_shares_the_gate() -> None:
    clock = Clock()
    gate = clock.gate(Policy(rate_bytes_per_s=100_000))
    taken = 0
    while clock.seconds < 10:
        wait_s = gate.take(16_384)
        if wait_s:
            clock.seconds += wait_s
        else:
            taken += 16_384
    assert 1_000_000 <= taken <= 1_100_000 + 16_384


def test_a_bucket_says_how_long_until_there_is_enough() -> None:
    bucket = TokenBucket(10, 100)
    assert bucket.take(100, 0.0)
    assert not bucket.take(50, 1.0)
    assert bucket.wait_s(50) == 4.0
    assert bucket.take(50, 5.0)
    assert bucket.wait_s(101) == float("inf")


class Scene:
    """Ten leaves at a source, a gate and an inbox."""

    def __init__(self, root: Path, policy: Policy, clock: Clock) -> None:
        self.data = random.Random(9).randbytes(10 * LEAF_BYTES)
        self.payload = _payload(self.data)
        repository = Simulator()
        repository.payloads[self.payload.sha256] = self.data
        self.source = SimulatedTransport(repository, DEVICE)
        self.counts = Counts()
        self.inbox = Inbox(Fs(QuickDisk(root)), FAST, random.Random(0), clock.gate(policy))

    def fetch(self, *, delta: bool = False) -> None:
        run(self.inbox.fetch(self.payload, [self.source], self.counts, delta=delta))


def test_a_transfer_stops_at_the_end_of_the_window_and_goes_on_in_the_next(tmp_path: Path) -> None:
    clock = Clock("04:59:00")
    scene = Scene(tmp_path, NIGHT, clock)

    def time_passes(digest: str, offset: int, data: bytes) -> bytes:
        clock.now += datetime.timedelta(seconds=10)
        return data

    scene.source.on_block = time_passes
    with pytest.raises(Postponed) as caught:
        scene.fetch()
    assert caught.value.reason is Reason.OUTSIDE_WINDOW
    before = scene.source.sent_bytes
    assert 0 < before < len(scene.data)
    clock.now = _at("02:00:00") + datetime.timedelta(days=1)
    scene.counts = Counts()
    scene.source.on_block = None
    scene.fetch()
    assert (tmp_path / "inbox" / f"{scene.payload.sha256}.part").read_bytes() == scene.data
    assert scene.counts.resumed_bytes > 0
    assert scene.source.sent_bytes - before == len(scene.data) - scene.counts.resumed_bytes


def test_nothing_is_asked_for_while_it_must_not_be(tmp_path: Path) -> None:
    scene = Scene(tmp_path, Policy(metered=True, on_metered=Metered.DELTAS), Clock())
    with pytest.raises(Postponed):
        scene.fetch()
    assert scene.source.asked == []
    scene.fetch(delta=True)
    assert scene.source.sent_bytes == len(scene.data)


def test_what_a_person_brings_is_never_held_back(tmp_path: Path) -> None:
    state, stick = tmp_path / "state", tmp_path / "stick"
    state.mkdir()
    closed = Policy((DayWindow(0, 1),), metered=True, on_metered=Metered.NEVER, rate_bytes_per_s=1.0)
    scene = Scene(state, closed, Clock())
    (stick / "payloads").mkdir(parents=True)
    (stick / "payloads" / scene.payload.sha256).write_bytes(scene.data)
    run(scene.inbox.fetch(scene.payload, [DirectoryTransport(stick, DEVICE)], scene.counts))
    assert scene.counts.fetched_bytes == len(scene.data)


def test_a_limited_rate_is_kept_and_the_source_not_blamed_for_it(tmp_path: Path) -> None:
    scene = Scene(tmp_path, Policy(), Clock())
    rate = 1_000_000.0

    async def main() -> float:
        loop = asyncio.get_running_loop()
        gate = Gate(Policy(rate_bytes_per_s=rate), datetime.datetime.now, loop.time)
        gate.take(int(rate))
        inbox = Inbox(Fs(QuickDisk(tmp_path)), FAST, random.Random(0), gate)
        began = loop.time()
        await inbox.fetch(scene.payload, [scene.source], scene.counts)
        return loop.time() - began

    took_s = run(main())
    assert took_s >= 0.9 * len(scene.data) / rate


def test_an_update_that_waits_for_its_window_is_no_failure_and_goes_on_when_it_opens(device: Device) -> None:
    device.release("1.0.0")
    clock = Clock("12:00:00")
    device.gate = clock.gate(NIGHT)
    event = device.check()
    assert (event.outcome, event.reason, event.state) == (None, Reason.OUTSIDE_WINDOW, "idle")
    assert device.transport.asked == []
    assert device.transport.documents_asked, "metadata is asked for at any time"
    clock.now = _at("02:30:00")
    assert device.check().outcome == "committed"
