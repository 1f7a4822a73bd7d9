"""From a verified release to plaintext in a sealed memfd: which payload to fetch, its key, and how it is opened.

Not here: fetching (`fetch`), keeping (`store`), the order of things (`update`).
Invariants: a delta is chosen only if it is smaller than the full payload and its base is committed on this device; what
`open_payload` returns has exactly the length and hash that the release signs.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from ota import payload
from ota.client import memfd, offload
from ota.client.desired import Grant
from ota.client.ports import Candidate, DeviceKeys, Host, Installed
from ota.client.store import Store, keyless
from ota.errors import PayloadError, Reason
from ota.release import Component, Payload, Release

RAW = "raw"


@dataclass(frozen=True, slots=True)
class Plan:
    """How one file of a release will be obtained; `base_sha256` is None for the full payload."""

    component: Component
    payload: Payload
    base_sha256: str | None

    @property
    def is_delta(self) -> bool:
        """Whether the payload applies to a base."""
        return self.base_sha256 is not None

    def full(self) -> Plan:
        """The same file by its full payload."""
        return Plan(self.component, self.component.full, None)


def plan(component: Component, bases: Collection[str]) -> Plan:
    """The cheapest way to `component` for a device that has the plaintexts `bases`."""
    offered = [delta for delta in component.deltas if delta.base_sha256 in bases]
    best = min(offered, key=lambda delta: delta.payload.length, default=None)
    if best is None or best.payload.length >= component.full.length:
        return Plan(component, component.full, None)
    return Plan(component, best.payload, best.base_sha256)


def payload_hashes(release: Release) -> Iterable[str]:
    """Ciphertext hashes of every payload of a release."""
    for component in (*release.components, release.golden):
        yield component.full.sha256
        yield from (delta.payload.sha256 for delta in component.deltas)


def opener(store: Store) -> Callable[[Component], Awaitable[int]]:
    """How a `Candidate` opens its files."""

    async def open_stored(component: Component) -> int:
        return await store.read(component.plain_sha256)

    return open_stored


def stored_candidate(store: Store, installed: Installed) -> Candidate | None:
    """A committed release as the host wants it; None when its release.json is gone or unreadable."""
    release = store.release(installed.release_sha256)
    if release is None:
        return None
    return Candidate(release, release.component(installed.component), opener(store))


def content_key(release: Release, wanted: Payload, grants: Mapping[str, Grant], keys: DeviceKeys, device: str) -> bytes:
    """The key of a payload, out of this device's grants.

    Raises:
        PayloadError: `no_grant` when none was given, or for a key this device no longer has; `not_for_this_device`
            for one that does not open here.
        StoreError: `sealed_key_unavailable`: this device has no key at all at present.
    """
    if not keys.storage:
        raise keyless()
    hint = f"ask the operator for a grant: edge-ota grant REPO {device} {release.line} {release.version}"
    grant = grants.get(wanted.cek_id)
    if grant is None:
        raise PayloadError(
            Reason.NO_GRANT, f"no key was granted for {release.line} {release.version}", hint=hint, retry=True
        )
    private = keys.hpke.get(grant.kid)
    if private is None:
        raise PayloadError(
            Reason.NO_GRANT,
            f"the grant for {release.line} {release.version} is for key {grant.kid}, which this device does not have",
            hint=hint,
            retry=True,
        )
    info = payload.grant_info(device, release.line, release.version, wanted.cek_id)
    return payload.unwrap_key(grant.wrapped, private, info)


async def open_payload(
    release: Release, chosen: Plan, sealed: Iterable[bytes], key: bytes, store: Store, host: Host
) -> int:
    """Decrypt and decode a fetched payload; returns a sealed memfd that the caller closes.

    Args:
        sealed: the ciphertext, already checked against its leaves.

    Raises:
        PayloadError: the bytes are not what the release signs; `delta_mismatch` when a delta gave another result.
        StoreError: the base of a delta cannot be opened.
        Rejected: the decoding process crashed, hung or outgrew its limit.
    """
    component = chosen.component
    what = f"{release.line} {release.version} {component.name}"
    # the tail of a truncated payload does not authenticate, so the signed length is trusted for the allocation only
    length = payload.plain_length(chosen.payload.length)
    context = payload.context_of(release.line, release.version, component, chosen.payload)

    def fill(view: memoryview) -> None:
        written = payload.open_into(sealed, key, context, view)
        if written != length:
            raise PayloadError(Reason.PAYLOAD_TRUNCATED, f"{what} opens to {written} bytes of {length}")

    fd = await offload.opened(lambda: memfd.write_sealed("payload", length, fill))
    try:
        if chosen.payload.codec == RAW and not chosen.is_delta:
            await _check(fd, component, what)
            return fd
        decoded = await _decode(chosen, fd, store, host)
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    try:
        await _check(decoded, component, what)
    except BaseException as e:
        os.close(decoded)
        if chosen.is_delta and isinstance(e, PayloadError):
            raise PayloadError(Reason.DELTA_MISMATCH, f"the delta of {what} gives another result than signed") from e
        raise
    return decoded


async def _check(fd: int, component: Component, what: str) -> None:
    own = os.dup(fd)  # the thread may outlive whoever waits for it

    def work() -> None:
        try:
            memfd.check(own, component.plain_sha256, component.plain_length, what)
        finally:
            os.close(own)

    await offload.finished(work)


async def _decode(chosen: Plan, fd: int, store: Store, host: Host) -> int:
    base = await store.read(chosen.base_sha256) if chosen.base_sha256 is not None else None
    try:
        return await host.transform(chosen.payload.codec, chosen.component.plain_length, fd, base)
    finally:
        if base is not None:
            os.close(base)
