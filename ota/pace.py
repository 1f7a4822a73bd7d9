"""When to try again and how much is too much: reconnect delays and token buckets.

Pure: clocks are numbers handed in, randomness is a generator handed in. It is not a scheduler; nobody waits in here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReconnectPolicy:
    """Bounds of the delay before the next connection.

    Attributes:
        first_s: upper end of the first delay's range; it doubles with every failure.
        longest_s: the range never grows beyond this.
        stable_s: only a connection that held this long counts as success and resets the range.
        takeover_s: lower range after "session taken over"; somebody else uses this identity, hurrying helps nobody.
    """

    first_s: float = 2.0
    longest_s: float = 600.0
    stable_s: float = 300.0
    takeover_s: float = 60.0


class Reconnect:
    """Full-jitter exponential back-off that a broker which accepts and kicks at once cannot reset.

    The delay is uniform over 0 … min(longest, first * 2^failures) (the "full jitter" rule), so that ten thousand
    devices which lose one broker together come back spread out.
    """

    def __init__(self, policy: ReconnectPolicy, rng: random.Random) -> None:
        self._policy = policy
        self._rng = rng
        self._failures = 0
        self._takeovers = 0
        self._connected_at: float | None = None

    def connected(self, now_s: float) -> None:
        """The broker accepted a connection at `now_s`."""
        self._connected_at = now_s

    def lost(self, now_s: float, *, taken_over: bool = False) -> float:
        """A connection or an attempt ended at `now_s`; returns the seconds to wait before the next attempt."""
        policy = self._policy
        if self._connected_at is not None and now_s - self._connected_at >= policy.stable_s:
            self._failures = 0
            self._takeovers = 0
        self._connected_at = None
        window = self._window(policy.first_s, self._failures)
        self._failures += 1
        if not taken_over:
            return self._rng.uniform(0.0, window)
        window = self._window(policy.takeover_s, self._takeovers)
        self._takeovers += 1
        return self._rng.uniform(window / 2, window)

    def _window(self, first_s: float, doublings: int) -> float:
        # the exponent is capped because a device may fail for years
        return min(self._policy.longest_s, first_s * 2.0 ** min(doublings, 32))


class TokenBucket:
    """At most `burst` at once and `per_s` a second in the long run; times must not run backwards."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._level = burst
        self._at_s: float | None = None

    def take(self, cost: float, now_s: float) -> bool:
        """Take `cost` tokens at `now_s`; False, and nothing taken, when fewer are there."""
        self._fill(now_s)
        if cost > self._level:
            return False
        self._level -= cost
        return True

    def owe(self, cost: float, now_s: float) -> float:
        """Take `cost` tokens at `now_s` although they may have to be waited for; returns the seconds until they are
        there, and all that were promised before. A negative cost gives back what was not used."""
        self._fill(now_s)
        self._level -= cost
        return max(0.0, -self._level / self._per_s)

    def _fill(self, now_s: float) -> None:
        if self._at_s is not None:
            self._level = min(self._burst, self._level + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
