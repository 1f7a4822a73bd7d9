"""In which state a live source is, and when it is tried again: decided without a thread, a clock or a device.

Rules:
1. `opening` until the first frame, `streaming` from each frame on.
2. A wait for a frame that lasts longer than `stale_s` makes it `stale`, whatever the source says of itself; the wait
   goes on. Nobody waits while a reader of `every` is busy, so that is no fault. A picture that never changes is none.
3. A source that broke is `reconnecting`: it is opened again after a jittered back-off between `RETRY_S`, for ever. The
   longest pause bounds how long a camera that is back may wait to be noticed.
4. A call that lasts longer than `hung_s` never returns, and frames of another shape do not fit into the ring: either
   ends the process, and a new one begins.
"""

from __future__ import annotations

import random

from agent.errors import AgentError, Reason

OPENING, STREAMING, STALE, RECONNECTING, ENDED = STATES = ("opening", "streaming", "stale", "reconnecting", "ended")
RETRY_S = (0.25, 1.0)


class Liveness:
    """State of one live source.

    Args:
        stale_s, hung_s: as of `agent.worker.sources.LiveSource`.
        rng: for the jitter.

    Attributes:
        retry_ns: when to open it again; None while it is open.
        reconnects: how often a frame came again after it broke.
    """

    def __init__(self, stale_s: float, hung_s: float, rng: random.Random) -> None:
        self.state, self.reason, self.detail = OPENING, "", ""
        self.reconnects = 0
        self.last_ns = 0
        self.retry_ns: int | None = None
        self._stale_ns, self._hung_ns = round(stale_s * 1e9), round(hung_s * 1e9)
        self._rng = rng
        self._pause_s = RETRY_S[0]
        self._call_ns: int | None = None
        self._waits = False
        self._broken = False

    def called(self, now_ns: int, *, waits: bool) -> None:
        """A call of the source begins: it `waits` for a frame, or opens."""
        self._call_ns, self._waits = now_ns, waits

    def arrived(self, t_ns: int) -> None:
        """A frame came."""
        self._call_ns = None
        self.last_ns = t_ns
        self._pause_s = RETRY_S[0]
        if self._broken:
            self._broken = False
            self.reconnects += 1
        self.state, self.reason, self.detail = STREAMING, "", ""

    def reopened(self) -> None:
        """It is open again; the first frame will tell whether that is worth anything."""
        self._call_ns = self.retry_ns = None

    def broke(self, error: AgentError, now_ns: int) -> None:
        """A call failed; `retry_ns` says when to open the source again."""
        self._call_ns, self._broken = None, True
        self.state, self.reason, self.detail = RECONNECTING, error.reason.value, error.message
        self.retry_ns = now_ns + round(self._rng.uniform(0.5, 1.0) * self._pause_s * 1e9)
        self._pause_s = min(2 * self._pause_s, RETRY_S[1])

    def ended(self, detail: str) -> None:
        """No more frames will come."""
        self._call_ns = self.retry_ns = None
        self.state, self.reason, self.detail = ENDED, "", detail

    def looked(self, now_ns: int) -> bool:
        """Note how long the call has lasted; False when it hangs and the process has to be given up."""
        if self._call_ns is None:
            return True
        lasts_ns = now_ns - self._call_ns
        if lasts_ns >= self._hung_ns:
            self.state, self.reason = RECONNECTING, Reason.WORKER_HUNG.value
            self.detail = f"the source's driver has not answered for {self._hung_ns / 1e9:g} s"
            return False
        if self._waits and self.state != STALE and lasts_ns >= self._stale_ns:
            self.state, self.reason = STALE, Reason.SOURCE_STALE.value
            self.detail = f"no new frame for {self._stale_ns / 1e9:g} s"
        return True

    def next_ns(self) -> int | None:
        """When time alone changes something; None while it cannot."""
        if self.retry_ns is not None and self._call_ns is None:
            return self.retry_ns
        if self._call_ns is None:
            return None
        waits = self._waits and self.state != STALE
        return self._call_ns + (self._stale_ns if waits else self._hung_ns)
