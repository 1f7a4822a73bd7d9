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
    turns = [gate.turn() for _ in range(3)]
    taken = 0
    while clock.seconds < 10:
        waits = [turn.take(16_384) for turn in turns]
        taken += 16_384 * waits.count(0.0)
        clock.seconds += min(waits)
    assert 1_000_000 <= taken <= 1_100_000 + 3 * 16_384


def test_of_lines_that_share_a_rate_each_gets_its_turn_however_small_or_quick_the_others_blocks_are() -> None:
    clock = Clock()
    gate = clock.gate(Policy(rate_bytes_per_s=20_000))
    sizes = (4096, 65_536, 16_384)
    turns = [gate.turn() for _ in sizes]
    taken, next_s = [0, 0, 0], [0.0, 0.0, 0.0]
    while clock.seconds < 600:
        for number, turn in enumerate(turns):
            if next_s[number] <= clock.seconds:
                wait_s = turn.take(sizes[number])
                taken[number] += 0 if wait_s else sizes[number]
                # the large one is never there the moment its tokens are
                next_s[number] = clock.seconds + (wait_s + 0.02 if wait_s and number == 1 else wait_s)
        clock.seconds = max(clock.seconds, min(next_s))
    assert max(taken) <= min(taken) * 1.1 + 65_536, taken
    assert 600 * 20_000 <= sum(taken) + 65_536 + 4096 <= 600 * 20_000 + 4 * 65_536


def test_what_a_transfer_was_promised_is_the_others_when_it_leaves() -> None:
    clock = Clock()
    gate = clock.gate(Policy(rate_bytes_per_s=65_536))
    gone, stays = gate.turn(), gate.turn()
    share_s = 4096 / 65_536
    assert gone.take(65_536) == 0.0, "the burst"
    assert gone.take(65_536) == share_s
    assert stays.take(65_536) == 2 * share_s
    gone.leave()
    while wait_s := stays.take(65_536):
        clock.seconds += wait_s
    assert clock.seconds == pytest.approx(1.0), "as if it had been alone"


def test_a_block_that_became_smaller_while_it_waited_for_the_rate_costs_less() -> None:
    clock = Clock()
    turn = clock.gate(Policy(rate_bytes_per_s=65_536)).turn()
    assert turn.take(65_536) == 0.0, "the burst"
    for _ in range(8):
        clock.seconds += turn.take(65_536)
    assert turn.take(4096) == 0.0
    assert turn.take(28_672) == 0.0, "the rest of what was promised"
    assert turn.take(4096) > 0.0


def test_a_bucket_that_promises_says_how_long_until_there_is_enough() -> None:
    bucket = TokenBucket(10, 100)
    assert bucket.owe(100, 0.0) == 0.0
    assert bucket.owe(50, 1.0) == 4.0
    assert bucket.owe(50, 2.0) == 8.0
    assert not bucket.take(1, 9.0)
    assert bucket.owe(-50, 9.0) == 0.0
    assert bucket.take(40, 9.0)


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
        gate.turn().take(int(rate))
        inbox = Inbox(Fs(QuickDisk(tmp_path)), FAST, random.Random(0), gate)
        began = loop.time()
        await inbox.fetch(scene.payload, [scene.source], scene.counts)
        return loop.time() - began

    took_s = run(main())
    assert took_s >= 0.9 * len(scene.data) / rate


def test_two_lines_that_share_a_rate_advance_side_by_side(tmp_path: Path) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        gate = Gate(Policy(rate_bytes_per_s=400_000.0), datetime.datetime.now, loop.time)
        gate.turn().take(400_000)
        both = []
        for number in range(2):
            scene = Scene(tmp_path / str(number), Policy(), Clock())
            inbox = Inbox(Fs(QuickDisk(tmp_path / str(number))), FAST, random.Random(number), gate)
            both.append((scene, loop.create_task(inbox.fetch(scene.payload, [scene.source], scene.counts))))
        await asyncio.wait([task for _, task in both], return_when=asyncio.FIRST_COMPLETED)
        fetched = [scene.counts.fetched_bytes for scene, _ in both]
        await asyncio.gather(*(task for _, task in both))
        return fetched

    for number in range(2):
        (tmp_path / str(number)).mkdir()
    fetched = run(main())
    assert min(fetched) >= 0.5 * max(fetched), fetched


def test_a_transfer_that_is_cancelled_while_it_waits_for_the_rate_leaves_its_turn_to_others(tmp_path: Path) -> None:
    clock = Clock()
    gate = clock.gate(Policy(rate_bytes_per_s=65_536))
    scene = Scene(tmp_path, Policy(), clock)
    inbox = Inbox(Fs(QuickDisk(tmp_path)), FAST, random.Random(0), gate)

    async def main() -> None:
        task = asyncio.create_task(inbox.fetch(scene.payload, [scene.source], scene.counts))
        while scene.counts.fetched_bytes < 32_768:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(main())
    turn, waited_s = gate.turn(), 0.0
    while wait_s := turn.take(16_384):
        clock.seconds += wait_s
        waited_s += wait_s
    assert waited_s <= 0.26


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
