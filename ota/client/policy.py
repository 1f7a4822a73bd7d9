"""When payloads may be fetched, what of them on a network that costs, and how fast: pure decisions, and one gate.

Metadata is always asked for: it is small, and only it can say that a key was revoked. What a person brings (a stick)
is exempt. Waiting is no failure: it is raised as `Postponed`, which says when to look again.
Not here: clocks and sleeping (`fetch` waits), where the settings come from (agent.toml), which release is due.
Invariants: a moment inside any window is open; a window may cross midnight, one of equal ends is refused; the rate
holds over all lines and transports together, because they share one `Gate`, and those that share it take turns.
"""

from __future__ import annotations

import datetime
import enum
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ota.client.window import SIZES
from ota.errors import Postponed, Reason
from ota.pace import TokenBucket

_WINDOW = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]|24):([0-5][0-9])")
_DAY_MINUTES = 24 * 60
# rounding must not make anybody ask a million times for the last trillionth of a token
_SHORTEST_WAIT_S = 0.001
# what a transfer is promised at a time
_SHARE_BYTES = SIZES[0]
BY_HAND = frozenset({"directory", "zip"})
"""Transports whose bytes a person brought: exempt from every policy."""
LocalClock = Callable[[], datetime.datetime]
"""Local wall-clock time; its time zone decides what `02:00` means."""


class Metered(enum.Enum):
    """What may be fetched over a network that costs: nothing, deltas alone, or full payloads too."""

    NEVER = "never"
    DELTAS = "deltas"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class DayWindow:
    """From `start` to `end`, minutes after local midnight; `end` before `start` is on the next day."""

    start: int
    end: int

    def holds(self, minute: float) -> bool:
        """Whether `minute` of the day lies inside; the start does, the end does not."""
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


def parse_window(text: str) -> DayWindow:
    """Parse `HH:MM-HH:MM`; `24:00` is allowed as an end.

    Raises:
        ValueError: saying what is wrong.
    """
    match = _WINDOW.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a time of day from 00:00-00:01 to 23:59-24:00, such as 02:00-05:00")
    hour, minute, end_hour, end_minute = (int(part) for part in match.groups())
    start, end = 60 * hour + minute, 60 * end_hour + end_minute
    if end > _DAY_MINUTES:
        raise ValueError(f"{text!r} ends after 24:00")
    if start == end % _DAY_MINUTES and end != _DAY_MINUTES:
        raise ValueError(f"{text!r} is empty; leave windows out to allow the whole day")
    return DayWindow(start, end)


@dataclass(frozen=True, slots=True)
class Policy:
    """What agent.toml says about fetching.

    Attributes:
        windows: local times of day in which payloads are fetched; none allows every time.
        metered: whether the network costs.
        on_metered: what is fetched then.
        rate_bytes_per_s: most bytes of payload a second, over everything together; 0 for no limit.
    """

    windows: tuple[DayWindow, ...] = ()
    metered: bool = False
    on_metered: Metered = Metered.FULL
    rate_bytes_per_s: float = 0.0

    def opens_in_s(self, now: datetime.datetime) -> float:
        """Seconds until a window is open; 0 inside one, or without windows."""
        second = now.hour * 3600 + now.minute * 60 + now.second + now.microsecond / 1e6
        if not self.windows or any(window.holds(second / 60) for window in self.windows):
            return 0.0
        return min((window.start * 60 - second) % (_DAY_MINUTES * 60) for window in self.windows)

    def check(self, now: datetime.datetime, *, delta: bool) -> None:
        """Whether a payload may be fetched at local time `now`.

        Args:
            delta: whether it is a delta, not a full payload.

        Raises:
            Postponed: `metered` or `outside_window`.
        """
        if self.metered and (self.on_metered is Metered.NEVER or (self.on_metered is Metered.DELTAS and not delta)):
            raise Postponed(
                Reason.METERED,
                f"a {'delta' if delta else 'full payload'} waits: the network is metered",
                hint="connect another network, set update.on_metered, or install from a stick",
                retry_in_s=None,
            )
        wait_s = self.opens_in_s(now)
        if wait_s > 0:
            opens = (now + datetime.timedelta(seconds=wait_s)).strftime("%H:%M")
            raise Postponed(
                Reason.OUTSIDE_WINDOW,
                f"payloads wait for {opens}, when the next update window opens",
                hint="set update.windows, or install from a stick",
                retry_in_s=wait_s,
            )


class Gate:
    """One policy at work, for all transfers of a device.

    Args:
        clock: local wall-clock time.
        seconds: monotonic seconds.
    """

    def __init__(self, policy: Policy, clock: LocalClock, seconds: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._seconds = seconds
        rate = policy.rate_bytes_per_s
        # a second's worth may come at once, and always one block of any size
        self._bucket = TokenBucket(rate, max(rate, float(SIZES[-1]))) if rate else None

    @property
    def policy(self) -> Policy:
        """What it enforces."""
        return self._policy

    def check(self, *, delta: bool) -> None:
        """See `Policy.check`, now.

        Raises:
            Postponed: as there.
        """
        self._policy.check(self._clock(), delta=delta)

    def turn(self) -> Turn:
        """A place in the rate, for one transfer."""
        return Turn(self._bucket, self._seconds)


class Turn:
    """One transfer's place in a rate that several share: tokens are promised in the order of asking and few at a time,
    so that each gets as many bytes as the others, however small or quick its blocks are."""

    def __init__(self, bucket: TokenBucket | None, seconds: Callable[[], float]) -> None:
        self._bucket = bucket
        self._seconds = seconds
        self._promised = 0
        self._due_s = -math.inf

    def take(self, length: int) -> float:
        """0 when `length` bytes may be asked for now; else seconds after which it is worth asking again."""
        if self._bucket is None:
            return 0.0
        now_s = self._seconds()
        while self._due_s <= now_s:
            if self._promised >= length:
                # blocks may have become smaller meanwhile
                self._bucket.owe(length - self._promised, now_s)
                self._promised = 0
                return 0.0
            share = min(_SHARE_BYTES, length - self._promised)
            self._promised += share
            self._due_s = now_s + self._bucket.owe(share, now_s)
        return max(_SHORTEST_WAIT_S, self._due_s - now_s)

    def leave(self) -> None:
        """Give back what was promised and not used."""
        if self._bucket is not None:
            self._bucket.owe(-self._promised, self._seconds())
            self._promised, self._due_s = 0, -math.inf


def windows(texts: Sequence[str]) -> tuple[DayWindow, ...]:
    """Parse every window of a setting.

    Raises:
        ValueError: as `parse_window`.
    """
    return tuple(parse_window(text) for text in texts)
