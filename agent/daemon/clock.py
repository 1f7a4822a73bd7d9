"""The system clock, raised to the newest date that somebody trusted has signed: a board without a battery wakes up in
the past, and no certificate is valid there.

A command of its own (`edge-agent clock`) in a unit of its own, because setting the clock is a privilege that the daemon
does not have. It only reads the updater's state. What raises the floor is decided there (`ota.client.repository`).
Invariants: the clock is never set back; never while the kernel calls it synchronised, because then somebody who knows
better keeps it; never beyond the ceiling, behind which no signed date counts.
"""

from __future__ import annotations

import ctypes
import datetime
import enum
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent import RELEASED
from agent.errors import AgentError, Reason
from ota.client import journal
from ota.client.limits import Limits
from ota.errors import OtaError

_STA_UNSYNC = 0x0040  # adjtimex(2), linux/timex.h
_CEILING = Limits().clock_ceiling
_PADDING_BYTES = 512  # of what follows in struct timex, and more
_MAX_FILE_BYTES = journal.MAX_RECORD_BYTES + 1024


class Kernel(Protocol):
    """The kernel's wall clock."""

    def now(self) -> datetime.datetime:
        """What it shows, in UTC."""
        ...

    def synchronised(self) -> bool:
        """Whether something keeps it in step with the world. Raises OSError."""
        ...

    def set(self, moment: datetime.datetime) -> None:
        """Set it. Raises OSError: `EPERM` without CAP_SYS_TIME."""
        ...


class Verdict(enum.Enum):
    """What is to be done with the clock."""

    RAISE = "raise"
    PAST_THE_FLOOR = "past_the_floor"
    SYNCHRONISED = "synchronised"


@dataclass(frozen=True, slots=True)
class Floor:
    """Before `moment` it certainly is not. `damaged` records of the updater were passed over, and dates `beyond` the
    ceiling ignored."""

    moment: datetime.datetime
    damaged: int = 0
    beyond: int = 0


def judge(now: datetime.datetime, floor: datetime.datetime, synchronised: bool) -> Verdict:
    """What to do with a clock that shows `now`."""
    if now >= floor:
        return Verdict.PAST_THE_FLOOR
    return Verdict.SYNCHRONISED if synchronised else Verdict.RAISE


def read_floor(
    state_dir: Path,
    released: datetime.date = RELEASED,
    ceiling: datetime.datetime = _CEILING,
) -> Floor:
    """The newest of the date of this software and the signed dates in the updater's records, whichever can be read."""
    moment = datetime.datetime.combine(released, datetime.time(), datetime.UTC)
    damaged = beyond = 0
    for name in journal.FILES:
        try:
            data = _read(state_dir / name)
            if data is None:
                continue
            text = journal.decode(data)[1].clock_floor
            signed = datetime.datetime.fromisoformat(text) if text else moment
            if signed.tzinfo is None:
                raise ValueError(text)
        except (OtaError, OSError, ValueError):
            damaged += 1  # the other records, or the date of this software, still tell something
            continue
        if signed > ceiling:
            beyond += 1
        else:
            moment = max(moment, signed)
    return Floor(moment, damaged, beyond)


def raise_clock(kernel: Kernel, floor: datetime.datetime) -> tuple[Verdict, datetime.datetime]:
    """Raise the clock to `floor` if need be; returns what was done, and what the clock showed before.

    Raises:
        AgentError: `clock_unsettable`.
    """
    now = kernel.now()
    try:
        verdict = judge(now, floor, now < floor and kernel.synchronised())
        if verdict is Verdict.RAISE:
            kernel.set(floor)
    except OSError as e:
        raise AgentError(
            Reason.CLOCK_UNSETTABLE,
            f"the clock shows {now:%Y-%m-%d %H:%M} UTC, it is at least {floor:%Y-%m-%d %H:%M}: {e.strerror}",
            hint="systemctl start edge-agent-clock, or set it: sudo timedatectl set-time 'YYYY-MM-DD HH:MM:SS'",
        ) from e
    return verdict, now


class _Timex(ctypes.Structure):
    """struct timex as far as it is read: adjtimex(2)."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * _PADDING_BYTES),
    )


class SystemKernel:
    """Implements `Kernel` with adjtimex(2) and clock_settime(2)."""

    def now(self) -> datetime.datetime:
        """See `Kernel`."""
        return datetime.datetime.now(datetime.UTC)

    def synchronised(self) -> bool:
        """See `Kernel`; `modes` 0 only reads, for which no privilege is needed."""
        state = _Timex()
        if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(state)) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return not state.status & _STA_UNSYNC

    def set(self, moment: datetime.datetime) -> None:
        """See `Kernel`."""
        time.clock_settime(time.CLOCK_REALTIME, moment.timestamp())


def _read(path: Path) -> bytes | None:
    """The bytes of a record, None when it is absent. Raises OSError, also for what is not a plain file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(0, "not a plain file")
        return file.read(_MAX_FILE_BYTES)
