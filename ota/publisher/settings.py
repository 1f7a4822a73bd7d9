"""`repo.toml`: the named limits of one repository. Read strictly; an unknown key is an error.

Lifetimes are in days. A short `timestamp_days` bounds how long a device can be kept on an old view of the
repository; it is also how long a sideload directory stays usable.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields

from ota.errors import PublishError, Reason
from ota.release import LINE_PATTERN

FORMAT = 1
MAX_SETTINGS_BYTES = 65536
_MAX_DAYS = 20000
# A release lists at most 16 deltas (ota.release), so more bases than that have no place.
_MAX_DELTA_RELEASES = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and lifetimes of a repository. Every `*_days` counts from the moment of signing, but for
    `renewal_grace_days`: how long after its end a device's certificate still proves who asks for a new one."""

    version: int = FORMAT
    tenant: str = "edge"
    root_days: int = 3650
    targets_days: int = 365
    release_days: int = 365
    snapshot_days: int = 30
    timestamp_days: int = 7
    desired_days: int = 30
    stick_days: int = 180
    ca_days: int = 7300
    server_certificate_days: int = 825
    device_certificate_days: int = 825
    renewal_grace_days: int = 365
    delta_releases: int = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint of an unknown key: the nearest known one, or all of them when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(names)}"


def check_tenant(tenant: str) -> str:
    """Return `tenant` when it can stand in a topic.

    Raises:
        PublishError: `bad_spec`.
    """
    if not LINE_PATTERN.fullmatch(tenant):
        raise PublishError(Reason.BAD_SPEC, f"tenant {tenant[:40]!r} is not allowed", hint="use a-z, 0-9 and -")
    return tenant


def parse(data: bytes) -> Settings:
    """Parse the bytes of a `repo.toml`.

    Raises:
        PublishError: `bad_spec`, naming the key.
    """
    try:
        table = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as e:  # tomllib: also for integers of thousands of digits
        raise PublishError(Reason.BAD_SPEC, f"repo.toml: {e}") from e
    defaults = Settings()
    known = {field.name: getattr(defaults, field.name) for field in fields(Settings)}
    for key, value in table.items():
        if key not in known:
            raise PublishError(Reason.BAD_SPEC, f"repo.toml: unknown key {key!r}", hint=nearest(key, known))
        if type(value) is not type(known[key]):
            raise PublishError(Reason.BAD_SPEC, f"repo.toml: {key} is not {_article(known[key])}")
        if key.endswith("_days") and not 1 <= value <= _MAX_DAYS:
            raise PublishError(Reason.BAD_SPEC, f"repo.toml: {key} is not from 1 to {_MAX_DAYS}")
    settings = Settings(**table)
    if settings.version != FORMAT:
        raise PublishError(
            Reason.UNSUPPORTED,
            f"repository format {settings.version}, this edge-ota reads {FORMAT}",
            hint="use the edge-ota that made it",
        )
    if not 0 <= settings.delta_releases <= _MAX_DELTA_RELEASES:
        raise PublishError(Reason.BAD_SPEC, f"repo.toml: delta_releases is not from 0 to {_MAX_DELTA_RELEASES}")
    check_tenant(settings.tenant)
    return settings


def to_toml(settings: Settings) -> bytes:
    """The text that `parse` reads back to the same value."""
    lines = ["# Limits of this repository; every *_days counts from the moment of signing. See ota/FORMAT.md.\n"]
    for field in fields(Settings):
        value = getattr(settings, field.name)
        lines.append(f"{field.name} = {value}\n" if isinstance(value, int) else f'{field.name} = "{value}"\n')
    return "".join(lines).encode()


def _article(default: object) -> str:
    return "a whole number" if isinstance(default, int) else "a text"
