"""A directory repository: its layout, its creation, and the read API that block servers are built on.

Signing new metadata is `publish.py`'s, what a device should run is `director.py`'s, making a release is `build.py`'s.
Invariants: everything under `payloads/`, `targets/` and `metadata/N.*` is written once under a name that says what it
is and never changes; `timestamp.json` is the only file that moves the repository forward; nothing read on behalf of
a client is named by the client without matching a strict pattern first. Layout: FORMAT.md §1.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from ota import release as release_format
from ota.errors import OtaError, PublishError, Reason
from ota.publisher import files, settings
from ota.publisher.certificates import Authority
from ota.publisher.keys import KeyStore, release_role
from ota.publisher.settings import Settings
from ota.release import DEVICE_PATTERN, LINE_PATTERN, VERSION_PATTERN, Release, target_name

Clock = Callable[[], datetime]
MAX_METADATA_BYTES = 16 << 20

_HEX64 = re.compile(r"[0-9a-f]{64}")
_HEX32 = re.compile(r"[0-9a-f]{32}")
_TOP_ROLES = ("root", "snapshot", "targets")
_ROOT_FILE = re.compile(r"([0-9]{1,9})\.root\.json")
_MAX_VERSION = 1 << 31
# A device of this name would own the topic `edge/v1/<tenant>/fleet/#`.
_RESERVED_DEVICES = ("fleet",)
# Its target paths `devices/<version>/release.json` would read like the director's.
_RESERVED_LINES = ("devices",)

_Signed = TypeVar("_Signed", Root, Timestamp, Snapshot, Targets)


@dataclass(frozen=True, slots=True)
class Listed:
    """A published release as its line's role lists it."""

    line: str
    version: str
    counter: int
    length: int
    sha256: str

    @property
    def target(self) -> str:
        """TUF target path."""
        return target_name(self.line, self.version)


def system_clock() -> datetime:
    """Now, in UTC."""
    return datetime.now(UTC)


class Repository:
    """An opened repository. Reading takes no lock; `locked()` guards everything that writes."""

    def __init__(self, path: Path, configured: Settings, now: Clock) -> None:
        self.path = path
        self.settings = configured
        self.now = now
        self.keys = KeyStore(path / "keys")
        self.authority = Authority(self.keys)

    @classmethod
    def open(cls, path: Path, *, now: Clock = system_clock) -> Repository:
        """Open the repository at `path`.

        Raises:
            PublishError: `repository_missing`; `bad_spec` for its repo.toml.
        """
        data = files.read_regular(path / "repo.toml", settings.MAX_SETTINGS_BYTES)
        if data is None:
            raise PublishError(
                Reason.REPOSITORY_MISSING, f"there is no repository at {path}", hint=f"edge-ota init {path}"
            )
        return cls(path, settings.parse(data), now)

    @property
    def tenant(self) -> str:
        """The tenant in every topic of this repository's devices."""
        return self.settings.tenant

    def locked(self) -> AbstractContextManager[None]:
        """The writer's lock; `busy` when it is not free within `files.LOCK_WAIT_S`."""
        return files.locked(self.path / ".lock")

    def expiry(self, days: int) -> datetime:
        """`days` from now, in whole seconds."""
        return self.now().replace(microsecond=0) + timedelta(days=days)

    # -- read API of block servers and sideload directories; every name comes from outside ---------------------------

    def read_metadata(self, role: str, version: int | None) -> bytes | None:
        """One metadata document, or None when there is none of that role and version.

        `timestamp` has no version; `root`, `snapshot`, `targets` and `release-<line>` need one.
        """
        if role == "timestamp":
            if version is not None:
                return None
            return files.read_regular(self.metadata_path("timestamp", None), MAX_METADATA_BYTES)
        if version is None or not 0 < version < _MAX_VERSION:
            return None
        line = role.removeprefix("release-")
        if role not in _TOP_ROLES and (line == role or not LINE_PATTERN.fullmatch(line)):
            return None
        return files.read_regular(self.metadata_path(role, version), MAX_METADATA_BYTES)

    def read_desired(self, device: str) -> bytes | None:
        """The signed desired.json of `device`, or None when there is none."""
        if not _is_device(device):
            return None
        return files.read_regular(self.desired_path(device), MAX_METADATA_BYTES)

    def read_target(self, path: str, sha256: str) -> bytes | None:
        """The target file `path` with that hash, or None."""
        try:
            release_format.check_target_name(path)
        except OtaError:
            return None
        if not _HEX64.fullmatch(sha256):
            return None
        return files.read_regular(self.target_path(path, sha256), release_format.MAX_RELEASE_BYTES)

    def open_payload(self, sha256: str) -> tuple[int, int] | None:
        """Descriptor (the caller closes it) and length of the payload with the ciphertext hash `sha256`, or None."""
        if not _HEX64.fullmatch(sha256):
            return None
        return files.open_regular(self.payload_path(sha256))

    # -- places ---------------------------------------------------------------------------------------------------

    def metadata_path(self, role: str, version: int | None) -> Path:
        """Where a metadata document lies; only the timestamp has no version."""
        name = f"{role}.json" if version is None else f"{version}.{role}.json"
        return self.path / "metadata" / name

    def target_path(self, target: str, sha256: str) -> Path:
        """Where a target lies: the hash stands before the file name (TUF consistent snapshots)."""
        directory, _, name = target.rpartition("/")
        return self.path / "targets" / directory / f"{sha256}.{name}"

    def payload_path(self, sha256: str) -> Path:
        """Where a sealed payload lies."""
        return self.path / "payloads" / sha256

    def prepared_path(self, line: str, version: str) -> Path:
        """Where an unsigned release waits for `publish`."""
        return self.path / "prepared" / line / version / "release.json"

    def device_path(self, device: str) -> Path:
        """Directory of one device.

        Raises:
            PublishError: `unknown_device` for a name outside the grammar.
        """
        return self.path / "devices" / check_device(device)

    def desired_path(self, device: str) -> Path:
        """Where the device's signed document lies."""
        return self.device_path(device) / "desired.json"

    # -- what is signed now ---------------------------------------------------------------------------------------

    def root_version(self) -> int:
        """Version of the newest root.

        Raises:
            PublishError: `state_corrupt` when there is none.
        """
        found = [
            int(match[1])
            for entry in (self.path / "metadata").iterdir()
            if (match := _ROOT_FILE.fullmatch(entry.name)) is not None
        ]
        if not found:
            raise PublishError(Reason.STATE_CORRUPT, "the repository has no root metadata", hint="restore a backup")
        return max(found)

    def root(self) -> Metadata[Root]:
        """The newest root."""
        return self._load("root", self.root_version(), Root)

    def timestamp(self) -> Metadata[Timestamp]:
        """The current timestamp; as all that follow, `state_corrupt` when absent or unreadable."""
        return self._load("timestamp", None, Timestamp)

    def snapshot(self) -> Metadata[Snapshot]:
        """The snapshot that the timestamp names."""
        return self._load("snapshot", self.timestamp().signed.snapshot_meta.version, Snapshot)

    def targets(self, role: str = "targets") -> Metadata[Targets]:
        """The top-level targets, or a line's role, in the version that the snapshot names."""
        return self._load(role, self.snapshot().signed.meta[f"{role}.json"].version, Targets)

    def release_roles(self) -> dict[str, Metadata[Targets]]:
        """Current document of every line that has releases, by line."""
        meta = self.snapshot().signed.meta
        lines = [name[len("release-") : -len(".json")] for name in sorted(meta) if name.startswith("release-")]
        return {
            line: self._load(release_role(line), meta[f"{release_role(line)}.json"].version, Targets) for line in lines
        }

    def published(self) -> list[Listed]:
        """Every signed release, by line and counter."""
        found = []
        for line, role in self.release_roles().items():
            for path, target in role.signed.targets.items():
                custom = target.custom or {}
                found.append(
                    Listed(
                        line, path.split("/")[1], int(custom["release_counter"]), target.length, target.hashes["sha256"]
                    )
                )
        return sorted(found, key=lambda listed: (listed.line, listed.counter))

    def find(self, line: str, version: str) -> Listed:
        """The published release.

        Raises:
            PublishError: `unknown_release`.
        """
        for listed in self.published():
            if (listed.line, listed.version) == (line, version):
                return listed
        published = self.published()
        known = [listed.version for listed in published if listed.line == line]
        lines = sorted({listed.line for listed in published})
        if self.valid_release(line, version) and self.prepared_path(line, version).is_file():
            hint = f"it is built but not signed: edge-ota publish {self.path} {line} {version}"
        else:
            hint = f"published versions of {line}: {', '.join(known)}" if known else "edge-ota release builds one"
            hint += f"; published lines: {', '.join(lines)}" if lines and not known else ""
        raise PublishError(Reason.UNKNOWN_RELEASE, f"release {line} {version} is not published", hint=hint)

    def release(self, listed: Listed) -> Release:
        """The parsed release.json of a published release.

        Raises:
            PublishError: `state_corrupt` when the file is gone or not the signed one.
        """
        data = self.read_target(listed.target, listed.sha256)
        if data is None or hashlib.sha256(data).hexdigest() != listed.sha256:
            place = self.target_path(listed.target, listed.sha256)
            raise PublishError(Reason.STATE_CORRUPT, f"{place} is gone or damaged", hint="restore it from a backup")
        return release_format.parse(data)

    def prepared(self) -> list[Release]:
        """Releases that are built and not signed, by line and counter.

        Raises:
            PublishError: `state_corrupt`, naming the file.
        """
        found = []
        for path in sorted((self.path / "prepared").glob("*/*/release.json")):
            data = files.read_regular(path, release_format.MAX_RELEASE_BYTES)
            try:
                found += [release_format.parse(data)] if data is not None else []
            except OtaError as e:
                hint = "remove it, and build that release again"
                raise PublishError(Reason.STATE_CORRUPT, f"{path} is damaged: {e.message}", hint=hint) from e
        return sorted(found, key=lambda release: (release.line, release.release_counter))

    def releases(self, line: str) -> list[Release]:
        """Published and prepared releases of `line`, oldest counter first."""
        by_version = {r.version: r for r in self.prepared() if r.line == line}
        by_version |= {listed.version: self.release(listed) for listed in self.published() if listed.line == line}
        return sorted(by_version.values(), key=lambda release: release.release_counter)

    def devices(self) -> Iterator[str]:
        """Ids of the enrolled devices, sorted."""
        for entry in sorted((self.path / "devices").iterdir()):
            if (entry / "device.json").is_file():
                yield entry.name

    @staticmethod
    def valid_release(line: str, version: str) -> bool:
        """Whether the two are in the grammar of lines and versions."""
        return bool(LINE_PATTERN.fullmatch(line) and VERSION_PATTERN.fullmatch(version))

    def _load(self, role: str, version: int | None, kind: type[_Signed]) -> Metadata[_Signed]:
        path = self.metadata_path(role, version)
        data = files.read_regular(path, MAX_METADATA_BYTES)
        if data is None:
            raise PublishError(Reason.STATE_CORRUPT, f"{path} is missing", hint="restore it from a backup")
        return load_metadata(data, str(path), kind)


def load_metadata(data: bytes, what: str, kind: type[_Signed]) -> Metadata[_Signed]:
    """Parse one of our own metadata documents. This does not verify it: the publisher trusts its own disk.

    Raises:
        PublishError: `state_corrupt`.
    """
    try:
        metadata = Metadata[_Signed].from_bytes(data)
    except (DeserializationError, RepositoryError) as e:
        cause = e.__cause__ or e
        raise PublishError(Reason.STATE_CORRUPT, f"{what} is not metadata: {cause}", hint="restore a backup") from e
    if not isinstance(metadata.signed, kind):
        raise PublishError(Reason.STATE_CORRUPT, f"{what} holds {metadata.signed.type}, not {kind.type}")
    return metadata


def check_device(device: str) -> str:
    """Return `device` when it is in the grammar of device ids.

    Raises:
        PublishError: `unknown_device`.
    """
    if not _is_device(device):
        raise PublishError(
            Reason.UNKNOWN_DEVICE,
            f"device id {device[:60]!r} is not allowed",
            hint="1 to 48 of a-z, 0-9 and -, starting with a letter or digit, and not 'fleet'",
        )
    return device


def check_line(line: str) -> str:
    """Return `line` when it is in the grammar of lines and not reserved.

    Raises:
        PublishError: `bad_spec`.
    """
    if not LINE_PATTERN.fullmatch(line) or line in _RESERVED_LINES:
        raise PublishError(
            Reason.BAD_SPEC,
            f"line {line[:40]!r} is not allowed",
            hint="1 to 32 of a-z, 0-9 and -, starting with a letter or digit, and not 'devices'",
        )
    return line


def _is_device(device: str) -> bool:
    return DEVICE_PATTERN.fullmatch(device) is not None and device not in _RESERVED_DEVICES
