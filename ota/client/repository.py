"""Runs `trust.refresh` over a transport and keeps what it verified: `trust/<repository>/<role>.json` and the floors.

A thin driver. Each repository (the fleet's own, a stick's) has a name, a pinned root, documents and floors of its own;
only the release counters of the lines are shared between them.
"""

from __future__ import annotations

import asyncio
import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ota.client import trust
from ota.client.desired import Desired
from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.client.limits import Limits
from ota.client.ports import Transport
from ota.errors import OtaError, Reason, TransferError

DIRECTORY = "trust"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_SUFFIX = ".json"
_ELSEWHERE = frozenset({Reason.SOURCE_UNREACHABLE, Reason.TRANSFER_TIMEOUT})


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What a refresh found, over which transport, for how many bytes of metadata."""

    desired: Desired
    transport: Transport
    metadata_bytes: int


class Repository:
    """One source of trust.

    Args:
        name: names the folder and the floors; `[a-z0-9-]`.
        pinned_root: root metadata from enrolment, the anchor when nothing else is left.
    """

    def __init__(self, fs: Fs, journal: Journal, name: str, pinned_root: bytes, limits: Limits) -> None:
        if not _NAME.fullmatch(name):
            raise OtaError(Reason.BAD_TARGET_NAME, f"repository name {name[:60]!r} is not allowed")
        self.name = name
        self._fs = fs
        self._journal = journal
        self._pinned_root = pinned_root
        self._limits = limits

    async def refresh(self, transports: Sequence[Transport], device: str, now: datetime.datetime) -> Refreshed:
        """Verified assignments of `device`, from the first transport that answers.

        Args:
            now: the system clock; judged is at the later of it and the signed floor.

        Raises:
            TrustError, TransferError, StoreError, OtaError: as `trust.refresh`, or when nobody answers.
        """
        failure: TransferError | None = None
        for transport in transports:
            try:
                return await self._refresh(transport, device, now)
            except TransferError as e:
                if e.reason not in _ELSEWHERE:
                    raise
                failure = failure or e
        raise failure or TransferError(
            Reason.SOURCE_UNREACHABLE, "there is no transport to ask", hint="configure a broker", retry=True
        )

    async def _refresh(self, transport: Transport, device: str, now: datetime.datetime) -> Refreshed:
        record = self._journal.record
        walk = trust.refresh(
            self._pinned_root,
            self._stored(),
            record.floors.get(self.name, {}),
            device,
            reference_time(now, record.clock_floor),
            self._limits,
        )
        answer: bytes | None = None
        total = 0
        while True:
            try:
                effect = walk.send(answer)
            except StopIteration as e:
                return Refreshed(e.value, transport, total)
            if isinstance(effect, trust.Trusted):
                self._keep(effect)
                answer = None
            else:
                answer = await self._ask(transport, effect)
                total += len(answer or b"")

    async def _ask(self, transport: Transport, wanted: trust.FetchMetadata | trust.FetchDesired) -> bytes | None:
        try:
            async with asyncio.timeout(self._limits.metadata_timeout_s):
                if isinstance(wanted, trust.FetchDesired):
                    return await transport.desired(wanted.max_bytes)
                return await transport.metadata(wanted.role, wanted.version, wanted.max_bytes)
        except TimeoutError as e:
            raise TransferError(
                Reason.TRANSFER_TIMEOUT, f"{transport.name} did not answer for metadata", retry=True
            ) from e
        except TransferError as e:
            if e.reason is Reason.NOT_FOUND:
                return None
            raise

    def _stored(self) -> dict[str, bytes]:
        folder = f"{DIRECTORY}/{self.name}"
        stored = {}
        for name in self._fs.names(folder):
            data = self._fs.read_at(f"{folder}/{name}", 0, self._limits.targets_max_bytes + 1)
            stored[name.removesuffix(_SUFFIX)] = data
        return stored

    def _keep(self, trusted: trust.Trusted) -> None:
        """File first: a floor without its file only costs a fetch, a file without its floor is judged again."""
        folder = f"{DIRECTORY}/{self.name}"
        path = f"{folder}/{trusted.role}{_SUFFIX}"
        if self._fs.size(path) != len(trusted.data) or self._fs.read(path, len(trusted.data)) != trusted.data:
            self._fs.make_dirs(folder)
            self._fs.write_atomic(path, trusted.data)
        self._journal.save(self._journal.record.with_floor(self.name, trusted.role, trusted.floor))


def reference_time(now: datetime.datetime, clock_floor: str) -> datetime.datetime:
    """The time at which signed dates are judged: `now`, or the floor if the clock lies before it."""
    if not clock_floor:
        return now
    return max(now, datetime.datetime.fromisoformat(clock_floor))


def raised_floor(clock_floor: str, issued: str, expires: datetime.datetime, ceiling: datetime.datetime) -> str:
    """The clock floor after a release that was signed at `issued` was committed.

    Dates that are unreadable, behind the ceiling, or behind the expiry of the document that lists the release do not
    count: a floor can never be lowered again.
    """
    try:
        date = datetime.datetime.fromisoformat(issued)
    except ValueError:
        return clock_floor
    if date.tzinfo is None or date > ceiling or date > expires:
        return clock_floor
    if clock_floor and date <= datetime.datetime.fromisoformat(clock_floor):
        return clock_floor
    return date.astimezone(datetime.UTC).isoformat()
