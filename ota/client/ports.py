"""What the updater needs from the outside: a way to fetch bytes, a host that runs models, and the values they exchange.

This is the contract between `ota.client` and whoever embeds it; it holds no behaviour beyond opening a stored file.
Invariants: a transport is never trusted (every byte it gives is checked against signed values); a host only ever sees
plaintext in sealed memfds whose hash a verified release names.
"""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ota.errors import Reason
from ota.release import Component, Release

Clock = Callable[[], datetime.datetime]
"""The system's wall clock, timezone-aware UTC. It may be wrong; the updater judges at max(clock, signed floor)."""


class Transport(Protocol):
    """One source of metadata and payload bytes.

    Obligations: every method answers or raises `TransferError` within a bounded time; `not_found` is raised only when
    the source *said* so, silence is `transfer_timeout`, no connection is `source_unreachable`; never more than
    `max_bytes` (or `length`) bytes come back: a longer document raises `metadata_too_large`. Nothing needs to be
    verified here. Cancelling a call abandons the request and leaves the transport usable. Calls may run concurrently.
    """

    @property
    def name(self) -> str:
        """Short name for events and byte counters, such as `mqtt` or `directory`."""
        ...

    async def metadata(self, role: str, version: int | None, max_bytes: int) -> bytes:
        """Metadata document of `role` (`root`, `timestamp`, `snapshot`, `targets`, `release-<line>`).

        `version` names the file of a consistent snapshot and is None for `timestamp` alone.
        """
        ...

    async def desired(self, max_bytes: int) -> bytes:
        """This device's own `desired.json`."""
        ...

    async def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """The target file (`<line>/<version>/release.json`) whose hash is `sha256`."""
        ...

    async def block(self, sha256: str, offset: int, length: int) -> bytes:
        """`length` bytes at `offset` of the payload with ciphertext hash `sha256`; at most 96 KiB."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this device is: its id, the name of its device profile and the version of its agent (`X.Y.Z`)."""

    device: str
    profile: str
    agent_version: str


@dataclass(frozen=True, slots=True)
class DeviceKeys:
    """The device's secrets; never printed, never persisted by this package.

    Attributes:
        hpke: HPKE private keys by key id (`key_id`); two during a rotation.
        storage: 32 bytes under which everything new in the store is sealed; empty while the sealed key is unavailable.
        retired_storage: earlier ones, which still open files that were not re-sealed yet.
    """

    hpke: dict[str, X25519PrivateKey] = field(repr=False)
    storage: bytes = field(repr=False)
    retired_storage: tuple[bytes, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Installed:
    """A release that is committed on this device, as the journal keeps it.

    `release_sha256` names the stored bytes of its release.json; `plain_sha256` the model component's plaintext,
    `golden_sha256` the golden vectors' plaintext; both lie sealed in the store.
    """

    line: str
    version: str
    release_counter: int
    release_sha256: str
    component: str
    plain_sha256: str
    golden_sha256: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Model components worth fetching, best first.

    Each further one is fetched only if the self-test of the one before was rejected; with `together` all are fetched
    beforehand and one self-test compares them (exploring: it costs bytes, and is done once for a line).
    """

    order: tuple[str, ...]
    together: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A release with one component chosen, all of its bytes in the store: to be tried, activated or served.

    The same type describes the committed release (`Updater.active`) and the one rolled back to. `alternatives` are
    further components in the store that a self-test may prefer; empty for all but a self-test.
    """

    release: Release
    component: Component
    opener: Callable[[Component], Awaitable[int]] = field(repr=False)
    alternatives: tuple[Component, ...] = ()

    @property
    def components(self) -> tuple[Component, ...]:
        """The chosen component and its alternatives."""
        return (self.component, *self.alternatives)

    @property
    def line(self) -> str:
        """Line of the release."""
        return self.release.line

    @property
    def version(self) -> str:
        """Version of the release."""
        return self.release.version

    async def open(self, component_name: str) -> int:
        """A new sealed memfd with the plaintext of `component_name`; the caller closes it.

        Args:
            component_name: of one of `candidate.components`, or `candidate.release.golden.name` for the golden vectors.

        Raises:
            StoreError: `not_found` when the file is absent, `payload_corrupt` when it was damaged at rest.
            OtaError: `bad_release` for a name the release does not have.
        """
        golden = self.release.golden
        component = golden if component_name == golden.name else self.release.component(component_name)
        return await self.opener(component)


@dataclass(frozen=True, slots=True)
class Tested:
    """What the self-test of a candidate measured: the delegate that will run it and its figures there."""

    component: str
    delegate: str
    p50_ms: float
    p95_ms: float
    load_ms: float
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class Probation:
    """What a passed probation saw. `synthetic` when golden vectors stood in for frames that did not come."""

    inferences: int
    seconds: float
    p95_ms: float
    synthetic: bool


class Host(Protocol):
    """Whoever runs the models.

    Obligations: methods of different lines may run concurrently, those of one line never do. A candidate found
    unfit raises `ota.errors.Rejected` with a reason of its own (`golden_mismatch`, `worker_crashed`, `over_budget`
    …); `Rejected(busy)` means "not now" and counts as no attempt. Any other `OtaError` is the device's own trouble:
    the update fails without blaming the release. Every method survives cancellation: the line then serves what it
    served before the call, or (during `activate` and `probation`) what `revert` is about to name.
    The host keeps no record of what is installed: after a restart it serves `Updater.active(line)`.
    """

    async def choose(self, release: Release) -> Choice:
        """The model components worth fetching here.

        Raises:
            Rejected: `no_delegate` when no component can run here.
        """
        ...

    async def transform(self, codec: str, out_length: int, payload_fd: int, base_fd: int | None) -> int:
        """Decode in a throw-away process; returns a sealed memfd of exactly `out_length` bytes that the caller closes.

        Args:
            codec: a name of `ota.release.FULL_CODECS` other than `raw`, or of `DELTA_CODECS`.
            out_length: plaintext length that the release signs; the process may allocate no more for its output.
            payload_fd: sealed memfd with the decrypted payload; stays the caller's.
            base_fd: sealed memfd with the plaintext a delta applies to, None for a full payload; stays the caller's.

        Raises:
            PayloadError: `delta_corrupt`, `payload_corrupt` or `unsupported`: the bytes are at fault.
            Rejected: `worker_crashed`, `worker_hung` or `worker_out_of_memory`.
        """
        ...

    def exclusive(self, candidate: Candidate) -> Sequence[str]:
        """Names of the accelerators that one process alone may have open and that trying and activating `candidate`
        needs; the updater lends them to one line at a time."""
        ...

    async def self_test(self, candidate: Candidate) -> Tested:
        """Load `candidate` beside the serving release, reproduce its golden vectors, measure it, compare with its
        budgets; of several components the best is named in the answer. Leaves the serving release serving.

        Raises:
            Rejected: the candidate must not run here.
        """
        ...

    async def activate(self, candidate: Candidate, tested: Tested) -> None:
        """Make `candidate` the one whose results count, from a frame boundary on.

        Raises:
            Rejected: it did not come up; `revert` follows.
        """
        ...

    async def probation(self, candidate: Candidate) -> Probation:
        """Watch the active `candidate` until it has served long enough inside its budgets.

        Raises:
            Rejected: it crashed, hung or left its budgets; `revert` follows.
        """
        ...

    async def revert(self, line: str, previous: Candidate | None) -> None:
        """Serve `previous` again, at once and without a trial; None stops the line. Idempotent; must not need the
        failed candidate to cooperate.

        Raises:
            OtaError: `previous` cannot be served either; it stays the committed release all the same.
        """
        ...


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one update by purpose.

    `fetched_bytes` were needed, `refetched_bytes` were fetched before and lost or failed their check,
    `duplicate_bytes` came unasked or twice and were thrown away; `full_bytes` is what the full payloads would have
    cost, `delta_bytes` what the deltas chosen instead of them cost.
    """

    metadata_bytes: int = 0
    fetched_bytes: int = 0
    refetched_bytes: int = 0
    duplicate_bytes: int = 0
    delta_bytes: int = 0
    full_bytes: int = 0


@dataclass(frozen=True, slots=True)
class UpdateEvent:
    """One step of one update, for telemetry, logs and the operator's screen.

    Attributes:
        line: the line, or `*` for what concerns the device as a whole (metadata, the journal).
        version: the release in question, empty before it is known.
        state: state of the line after the step (`ota.client.machine.State` value).
        outcome: `committed`, `rolled_back`, `rejected`, `failed`, `up_to_date`, or None while the update goes on.
        reason: stable cause of a bad outcome or of a remarkable step (a delta that fell back), else None.
        message: one line for a person; hint: what to do next.
        attempt: number of the trial, counted before it started; 0 before the first.
        traffic: bytes so far.
        tested, probation: figures once known.
    """

    line: str
    version: str
    state: str
    outcome: str | None = None
    reason: Reason | None = None
    message: str = ""
    hint: str = ""
    attempt: int = 0
    traffic: Traffic = Traffic()
    tested: Tested | None = None
    probation: Probation | None = None
