"""Where a repository keeps what a transport asks for: names below its root, as FORMAT.md §1 lays it out.

Pure. Every name is built of validated parts, so none can leave the root, whoever asked for it.
"""

from __future__ import annotations

import re

from ota.errors import OtaError, Reason
from ota.release import DEVICE_PATTERN, check_target_name

Place = tuple[str, ...]

_ROLE = re.compile(r"root|timestamp|snapshot|targets|release-[a-z0-9][a-z0-9-]{0,31}")
_HEX64 = re.compile(r"[0-9a-f]{64}")


def metadata_place(role: str, version: int | None) -> Place:
    """`metadata/<version>.<role>.json`, or `metadata/timestamp.json`.

    Raises:
        OtaError: `bad_target_name`.
    """
    if not _ROLE.fullmatch(role):
        raise OtaError(Reason.BAD_TARGET_NAME, f"role {role[:60]!r} is not allowed")
    prefix = "" if version is None else f"{int(version)}."
    return ("metadata", f"{prefix}{role}.json")


def desired_place(device: str) -> Place:
    """`devices/<device>/desired.json`.

    Raises:
        OtaError: `bad_target_name`.
    """
    if not DEVICE_PATTERN.fullmatch(device):
        raise OtaError(Reason.BAD_TARGET_NAME, f"device id {device[:60]!r} is not allowed")
    return ("devices", device, "desired.json")


def target_place(path: str, sha256: str) -> Place:
    """`targets/<path>` with the hash before the file's name, as TUF's consistent snapshots lay it out.

    Raises:
        OtaError: `bad_target_name`.
    """
    *folders, name = check_target_name(path).split("/")
    return ("targets", *folders, f"{_hex(sha256)}.{name}")


def payload_place(sha256: str) -> Place:
    """`payloads/<sha256>`.

    Raises:
        OtaError: `bad_target_name`.
    """
    return ("payloads", _hex(sha256))


def _hex(sha256: str) -> str:
    if not _HEX64.fullmatch(sha256):
        raise OtaError(Reason.BAD_TARGET_NAME, f"{sha256[:80]!r} is not a SHA-256")
    return sha256
