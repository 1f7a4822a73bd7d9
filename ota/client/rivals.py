"""Two updates of one line at the same time, one from the network and one from a stick: which of them goes on.

Of two sources the higher release counter wins; of the network's own wishes the latest does, because signed metadata
says which that is. The loser is cancelled, says so, and loses nothing that was fetched. What only waits for its trial
counts like what runs, as far as sticks are concerned.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ota.client.desired import Desired
from ota.client.machine import LineRecord, State
from ota.client.ports import UpdateEvent
from ota.client.update import Update
from ota.errors import OtaError, Reason
from ota.release import Release


@dataclass(eq=False)
class Run:
    """The one update of a line that is under way.

    Attributes:
        source: name of the repository that it came from.
        error: why it was cancelled, if it was.
    """

    task: asyncio.Task[UpdateEvent]
    update: Update
    source: str
    version: str
    error: OtaError | None = None


def check_other(run: Run, line: str, sha256: str | None) -> None:
    """Refuse a second update to the very release that is under way, and one to nothing in particular.

    Raises:
        OtaError: `busy`.
    """
    if sha256 is None or sha256 == run.update.wanted:
        raise OtaError(
            Reason.BUSY,
            f"an update of {line} to {run.version or 'a waiting release'} is running already",
            hint=f"wait for its end, which edge-agent status shows; or first: edge-agent update cancel {line}",
            retry=True,
        )


def outranked(run: Run, release: Release, *, latest_decides: bool) -> OtaError:
    """What the running update is told when `release`, which this device may run, takes its place.

    Args:
        latest_decides: both come from the network, so that the later wish counts, whatever the release counters.

    Raises:
        OtaError: `superseded`: it does not take its place.
    """
    what = f"{release.line} {release.version}"
    counter = run.update.counter
    if not latest_decides and counter is not None and counter >= release.release_counter:
        raise OtaError(
            Reason.SUPERSEDED,
            f"{what} is not newer than {run.version}, which is being installed",
            hint=f"wait for {run.version}; edge-agent update cancel {release.line} stops it",
            retry=True,
        )
    return OtaError(
        Reason.SUPERSEDED,
        f"the update of {release.line} to {run.version} made room for {release.version}",
        hint="nothing to do: what was fetched is kept",
        retry=True,
    )


def goes_on(run: Run, record: LineRecord, desired: Desired | None) -> bool:
    """Whether a general look leaves a running update alone. One that has not come to its trial yet and is not wanted
    any more makes room."""
    wanted = desired.assignments.get(record.line) if desired is not None else None
    early = record.state in (State.CHECKING, State.FETCHING)
    return not (early and run.update.wanted and wanted is not None and wanted.sha256 != run.update.wanted)


async def spare(record: LineRecord, desired: Desired, update: Update) -> None:
    """Let a stick that cannot take its place not cost a line what waits there for its trial, or was fetched in part.

    Raises:
        OtaError: `superseded`, or why what the stick wants may not run here; nothing changed.
    """
    line = record.line
    if not record.pending_sha256:
        return
    if line in desired.refused:
        raise desired.refused[line]
    wanted = desired.assignments.get(line)
    active = "" if record.active is None else record.active.release_sha256
    if wanted is None or wanted.sha256 in (active, record.pending_sha256):
        return
    release, waiting = await update.acceptable(wanted), record.candidate
    if waiting is not None and waiting.release_counter >= release.release_counter:
        raise OtaError(
            Reason.SUPERSEDED,
            f"{line} {release.version} is not newer than {waiting.version}, which waits for its trial",
            hint="edge-agent update tries what waits; edge-agent status shows it",
            retry=True,
        )


def running(line: str) -> OtaError:
    """What is told of a wish that an update in progress is in the way of."""
    hint = f"wait for its end, or first: edge-agent update cancel {line}"
    return OtaError(Reason.BUSY, f"an update of {line} is running", hint=hint, retry=True)


def unsettled(line: str) -> OtaError:
    """The same of an update that broke off."""
    message = f"an update of {line} broke off and is not cleared up yet"
    return OtaError(Reason.BUSY, message, hint="edge-agent update clears up; then again", retry=True)


def cancelled(line: str) -> OtaError:
    """What an update is told that a person stops."""
    hint = f"edge-agent update looks again; edge-agent update retry {line} lifts a quarantine"
    return OtaError(Reason.OPERATOR, f"the update of {line} was cancelled", hint=hint)


def postponed(line: str) -> OtaError:
    """What an update is told when the release it would replace is given up meanwhile."""
    message = f"the update of {line} waits: the release before it is put back"
    return OtaError(Reason.SUPERSEDED, message, retry=True)


def stuck(line: str) -> OtaError:
    """What is told of an update that was cancelled and does not end."""
    return OtaError(
        Reason.BUSY,
        f"the update of {line} does not end; other lines are not concerned",
        hint="restart the agent: systemctl restart edge-agent",
        retry=True,
    )


def expelled() -> OtaError:
    """What every update of a revoked device is told."""
    return OtaError(
        Reason.DEVICE_REVOKED,
        "this device was revoked; nothing is installed on it any more",
        hint="ask the operator to enrol it again",
    )
