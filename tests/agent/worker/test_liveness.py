"""When a live source is stale, lost, hung or found again: decided on times that the test makes up."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import Reason, SourceError
from agent.worker.liveness import OPENING, RECONNECTING, RETRY_S, STALE, STREAMING, Liveness

S = 1_000_000_000


def lost() -> SourceError:
    return SourceError(Reason.SOURCE_LOST, "the cable is out")


@pytest.fixture
def live() -> Liveness:
    return Liveness(stale_s=2, hung_s=30, rng=random.Random(1))


def test_it_opens_until_the_first_frame_and_streams_from_then_on(live: Liveness) -> None:
    live.called(0, waits=True)
    assert live.looked(S)
    assert (live.state, live.last_ns) == (OPENING, 0)
    live.arrived(S)
    assert (live.state, live.last_ns, live.reconnects) == (STREAMING, S, 0)


def test_a_wait_that_is_too_long_is_stale_and_the_next_frame_ends_that(live: Liveness) -> None:
    live.arrived(0)
    live.called(0, waits=True)
    assert live.next_ns() == 2 * S
    assert live.looked(2 * S - 1)
    assert live.state == STREAMING
    assert live.looked(2 * S)
    assert (live.state, live.reason) == (STALE, Reason.SOURCE_STALE.value)
    assert live.next_ns() == 30 * S
    live.arrived(5 * S)
    assert (live.state, live.reason, live.reconnects) == (STREAMING, "", 0)


def test_nobody_waiting_is_no_fault(live: Liveness) -> None:
    """A reader of `every` that is busy for a minute."""
    live.arrived(0)
    assert live.next_ns() is None
    assert live.looked(60 * S)
    assert live.state == STREAMING
    live.called(60 * S, waits=True)
    assert live.looked(61 * S)
    assert live.state == STREAMING


def test_a_call_that_never_returns_gives_the_process_up(live: Liveness) -> None:
    live.called(0, waits=False)
    assert live.looked(30 * S - 1)
    assert not live.looked(30 * S)
    assert (live.state, live.reason) == (RECONNECTING, Reason.WORKER_HUNG.value)


def test_a_lost_source_counts_as_found_only_with_its_first_frame(live: Liveness) -> None:
    live.arrived(0)
    live.broke(lost(), S)
    assert (live.state, live.reason, live.detail) == (RECONNECTING, "source_lost", "the cable is out")
    assert live.retry_ns is not None
    live.called(live.retry_ns, waits=False)
    live.reopened()
    assert (live.retry_ns, live.reconnects, live.state) == (None, 0, RECONNECTING)
    live.called(3 * S, waits=True)
    assert live.looked(6 * S)
    assert live.state == STALE, "it opened and gives nothing"
    live.arrived(7 * S)
    assert live.reconnects == 1


@given(st.integers(0, 2**32), st.integers(1, 40))
def test_pauses_grow_with_jitter_and_never_pass_their_limit(seed: int, tries: int) -> None:
    live = Liveness(2, 30, random.Random(seed))
    now = 0
    for number in range(tries):
        live.broke(lost(), now)
        assert live.retry_ns is not None
        longest = min(RETRY_S[0] * 2**number, RETRY_S[1])
        assert longest / 2 <= (live.retry_ns - now) / S <= longest
        now = live.retry_ns
    live.arrived(now)
    live.broke(lost(), now)
    assert live.retry_ns is not None
    assert (live.retry_ns - now) / S <= RETRY_S[0]
