"""Reconnect delays and token buckets."""

from __future__ import annotations

import random

import pytest

from ota.pace import Reconnect, ReconnectPolicy, TokenBucket

POLICY = ReconnectPolicy()


def _delays(reconnect: Reconnect, count: int) -> list[float]:
    return [reconnect.lost(0.0) for _ in range(count)]


def test_the_range_doubles_from_two_seconds_to_ten_minutes() -> None:
    highest = [0.0] * 14
    for seed in range(400):
        for index, delay in enumerate(_delays(Reconnect(POLICY, random.Random(seed)), 14)):
            highest[index] = max(highest[index], delay)
    expected = [min(600.0, 2.0 * 2**n) for n in range(14)]
    for seen, bound in zip(highest, expected, strict=True):
        assert 0.95 * bound < seen <= bound


@pytest.mark.fault("F88")
def test_ten_thousand_devices_that_lose_one_broker_come_back_spread_over_the_whole_range() -> None:
    first = sorted(Reconnect(POLICY, random.Random(seed)).lost(0.0) for seed in range(10_000))
    tenths = [sum(1 for delay in first if n * 0.2 <= delay < (n + 1) * 0.2) for n in range(10)]
    assert min(tenths) > 850
    assert max(tenths) < 1150


def test_a_broker_that_accepts_and_kicks_at_once_does_not_reset_the_range() -> None:
    reconnect = Reconnect(POLICY, random.Random(1))
    delays = []
    for second in range(0, 600, 10):
        reconnect.connected(float(second))
        delays.append(reconnect.lost(second + 1.0))
    assert max(delays) > 300


def test_five_stable_minutes_reset_the_range() -> None:
    reconnect = Reconnect(POLICY, random.Random(1))
    _delays(reconnect, 12)
    reconnect.connected(1000.0)
    assert reconnect.lost(1000.0 + POLICY.stable_s) <= 2.0


def test_a_connection_a_little_shorter_than_stable_does_not_reset_the_range() -> None:
    lengthy = []
    for seed in range(50):
        reconnect = Reconnect(POLICY, random.Random(seed))
        _delays(reconnect, 12)
        reconnect.connected(1000.0)
        lengthy.append(reconnect.lost(1000.0 + POLICY.stable_s - 1))
    assert max(lengthy) > 100


def test_a_takeover_waits_longer_every_time_and_never_less_than_half_a_minute() -> None:
    for seed in range(50):
        reconnect = Reconnect(POLICY, random.Random(seed))
        delays = [reconnect.lost(0.0, taken_over=True) for _ in range(6)]
        for index, delay in enumerate(delays):
            window = min(600.0, 60.0 * 2**index)
            assert window / 2 <= delay <= window


def test_years_of_failures_stay_within_the_longest_delay() -> None:
    assert max(_delays(Reconnect(POLICY, random.Random(3)), 5000)) <= POLICY.longest_s


def test_a_bucket_gives_its_burst_then_its_rate() -> None:
    bucket = TokenBucket(per_s=2.0, burst=3.0)
    assert [bucket.take(1, 10.0) for _ in range(4)] == [True, True, True, False]
    assert bucket.take(1, 10.4) is False
    assert bucket.take(1, 10.5) is True
    assert [bucket.take(1, 1000.0) for _ in range(4)] == [True, True, True, False]
