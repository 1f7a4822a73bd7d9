"""Runs `trust.refresh` over a transport and keeps what it verified: `trust/<repository>/<role>.json` and the floors.

A thin driver. Each repository (the fleet's own, a stick's) has a name, a pinned root, documents and floors of its own;
only the release counters of the lines are shared between them.
"""

from __future__ import annotations

import asyncio
import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ota.client import trust
from ota.client.desired import Desired
from ota.client.documents import Documents
from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.client.limits import Limits
from ota.client.ports import Transport
from ota.errors import OtaError, Reason, StoreError, TransferError

DIRECTORY = "trust"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_BEFORE_ALL_DATES = datetime.datetime.min.replace(tzinfo=datetime.UTC)
ELSEWHERE = frozenset(
    {
        Reason.SOURCE_UNREACHABLE,
        Reason.TRANSFER_TIMEOUT,
        Reason.ROOT_UNREACHABLE,
        Reason.TRANSFER_CORRUPT,
        Reason.SERVER_UNTRUSTED,
        Reason.SERVER_REFUSED,
        Reason.SERVER_NOT_YET_VALID,
    }
)
"""What says nothing about the repository, only about the way to it."""
# of these alone nobody has to be told as long as another transport answers
_OUT_OF_REACH = frozenset({Reason.SOURCE_UNREACHABLE, Reason.TRANSFER_TIMEOUT})
_COMPLETE = (False, 0)


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What a refresh found, over which transport, for how many bytes of metadata.

    `passed_over` is what was wrong with another transport or its documents; None when it was only out of reach.
    """

    desired: Desired
    transport: Transport
    metadata_bytes: int
    passed_over: OtaError | None = None


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
        self._journal = journal
        self._documents = Documents(fs, journal, name, f"{DIRECTORY}/{name}", limits.targets_max_bytes)
        self._pinned_root = pinned_root
        self._limits = limits
        fs.sweep(f"{DIRECTORY}/{name}")

    async def refresh(
        self, transports: Sequence[Transport], device: str, now: datetime.datetime, *, allow_expired: bool = False
    ) -> Refreshed:
        """Verified assignments of `device`, from the first transport whose documents are all there and verify: a source
        that garbles, replays or withholds must not keep a device from another one.

        Args:
            now: the system clock; what is judged is judged at `reference_time` of it.
            allow_expired: a person answers for it that dates are not looked at; versions are all the same.

        Raises:
            StoreError: at once.
            TrustError, TransferError, OtaError: as `trust.refresh`, from every transport; of several causes the first
                that is about the repository and not about the way to it.
        """
        answers: list[Refreshed] = []
        failures: list[tuple[Transport, OtaError]] = []
        for transport in transports:
            try:
                answers.append(await self._refresh(transport, device, now, allow_expired))
            except StoreError:
                raise
            except OtaError as e:
                failures.append((transport, e))
            else:
                if _lacking(answers[-1]) == _COMPLETE:
                    break
        # of equals the last, whose documents are the newest
        best = min(reversed(answers), key=_lacking, default=None)
        for answer in answers:
            if best is not None and _lacking(answer) > _lacking(best):
                failures += [(answer.transport, e) for e in answer.desired.refused.values()]
        wrong = next(((way, e) for way, e in failures if e.reason not in ELSEWHERE), None)
        if best is not None:
            read_bytes = sum(answer.metadata_bytes for answer in answers)
            named = wrong or next(((way, e) for way, e in failures if e.reason not in _OUT_OF_REACH), None)
            return replace(best, metadata_bytes=read_bytes, passed_over=_passed_over(*named) if named else None)
        if failures:
            raise (wrong or failures[0])[1]
        raise TransferError(
            Reason.SOURCE_UNREACHABLE, "there is no transport to ask", hint="configure a broker", retry=True
        )

    async def _refresh(
        self, transport: Transport, device: str, now: datetime.datetime, allow_expired: bool
    ) -> Refreshed:
        floor = self._journal.record.clock_floor
        reference = _BEFORE_ALL_DATES if allow_expired else reference_time(now, floor, self._limits.built)
        documents = self._documents
        walk = trust.refresh(self._pinned_root, documents.stored(), documents.floors, device, reference, self._limits)
        answer: bytes | None = None
        failure: TransferError | None = None
        total = 0
        try:
            while True:
                effect = walk.send(answer) if failure is None else walk.throw(failure)
                answer = failure = None
                if isinstance(effect, trust.Trusted):
                    documents.keep(effect)
                    continue
                try:
                    answer = await self._ask(transport, effect)
                except TransferError as e:
                    failure = e
                total += len(answer or b"")
        except StopIteration as e:
            return Refreshed(e.value, transport, total)
        finally:
            walk.close()

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


def _lacking(refreshed: Refreshed) -> tuple[bool, int]:
    """How much another source may know better: whether there was no document for this device, and how many of its
    lines did not verify."""
    return refreshed.desired == Desired(), len(refreshed.desired.refused)


def _passed_over(transport: Transport, error: OtaError) -> OtaError:
    message = f"{transport.name} was passed over: {error.message}"
    return OtaError(error.reason, message, hint=error.hint, retry=True)


def reference_time(now: datetime.datetime, clock_floor: str, built: datetime.datetime) -> datetime.datetime:
    """The time at which signed dates are judged: the latest of the clock, the floor that signed dates raised, and the
    day on which this software was made."""
    floor = datetime.datetime.fromisoformat(clock_floor) if clock_floor else built
    return max(now, floor, built)


def raised_floor(clock_floor: str, issued: str, expires: datetime.datetime, ceiling: datetime.datetime) -> str:
    """The clock floor after a release that was signed at `issued` was committed.

    Dates that are unreadable, behind the ceiling, or behind the expiry of the document that lists the release do not
    count: a floor can never be lowered again.
    """
    try:
        date = datetime.datetime.fromisoformat(issued)
        aware = date.tzinfo is not None
        date = date.astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        return clock_floor
    if not aware or date > ceiling or date > expires:
        return clock_floor
    if clock_floor and date <= datetime.datetime.fromisoformat(clock_floor):
        return clock_floor
    return date.isoformat()
