"""What verified metadata assigns to this device: releases by line, and the keys to open them.

Values and their parsing alone; whether to believe the document they stand in is decided in `trust`.
"""

from __future__ import annotations

import base64
import binascii
import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ota.errors import OtaError, Reason, TrustError
from ota.release import LINE_PATTERN, VERSION_PATTERN, check_target_name

MAX_GRANTS = 1024
MAX_REVOKED_KEYS = 64
MAX_SETTINGS_BYTES = 32 << 10
_MAX_COUNTER = 1 << 53


@dataclass(frozen=True, slots=True)
class Assignment:
    """The release that this device should run on a line, as two roles agree on it.

    `expires` is that of the release role's document: a signed date that a release's `issued` cannot lie behind.
    `allow_rollback_to` is the lowest release counter that this role lets devices go back to, 0 is none, and
    `allow_rollback_from` the highest that it listed when it said so: a device beyond that came later than the order.
    """

    line: str
    version: str
    path: str
    length: int
    sha256: str
    expires: datetime.datetime
    allow_rollback_to: int = 0
    allow_rollback_from: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """A content key wrapped to the device key `kid`."""

    cek_id: str
    kid: str
    wrapped: bytes


@dataclass(frozen=True, slots=True)
class Desired:
    """What verified metadata assigns to this device.

    `refused` holds lines whose assignment did not verify, with the cause; they concern no other line.
    `revoked` says that this device is expelled; it is then assigned and granted nothing. `revoked_keys` are the ids of
    the HPKE keys of the board that is meant, so that the document does not reach the board that took its place; empty
    means every board.
    `settings` is the text of the agent.toml that the fleet wants here, at most 32 KiB of UTF-8, not yet judged; None
    when the fleet wants none.
    """

    assignments: Mapping[str, Assignment] = field(default_factory=dict)
    refused: Mapping[str, OtaError] = field(default_factory=dict)
    grants: Mapping[str, Grant] = field(default_factory=dict)
    revoked: bool = False
    revoked_keys: frozenset[str] = frozenset()
    settings: str | None = None


def split_path(path: str) -> tuple[str, str]:
    """Line and version of a release's target path.

    Raises:
        OtaError: `bad_target_name`.
    """
    check_target_name(path)
    line, _, rest = path.partition("/")
    version, _, name = rest.partition("/")
    if name != "release.json" or not LINE_PATTERN.fullmatch(line) or not VERSION_PATTERN.fullmatch(version):
        raise OtaError(Reason.BAD_TARGET_NAME, f"{path!r} is not the name of a release")
    return line, version


def parse_grants(value: Any) -> dict[str, Grant]:
    """The `grants` object of a verified desired.json.

    Raises:
        TrustError: `metadata_mismatch`.
    """
    if not isinstance(value, dict) or len(value) > MAX_GRANTS:
        raise _malformed(f"desired.json: grants are not an object of at most {MAX_GRANTS}")
    grants = {}
    for cek_id, item in value.items():
        try:
            wrapped = base64.b64decode(item["wrapped"], validate=True)
            grants[cek_id] = Grant(cek_id, str(item["kid"])[:64], wrapped)
        except (KeyError, TypeError, binascii.Error, ValueError) as e:
            raise _malformed(f"desired.json: grant {str(cek_id)[:40]!r} is not understood") from e
    return grants


def parse_revoked(value: Any) -> bool:
    """The `revoked` member of a verified desired.json.

    Raises:
        TrustError: `metadata_mismatch`.
    """
    if not isinstance(value, bool):
        raise _malformed("desired.json: revoked is neither true nor false")
    return value


def parse_revoked_keys(value: Any) -> frozenset[str]:
    """The `revoked_keys` member of a verified desired.json.

    Raises:
        TrustError: `metadata_mismatch`.
    """
    if not isinstance(value, list) or len(value) > MAX_REVOKED_KEYS or not all(isinstance(kid, str) for kid in value):
        raise _malformed(f"desired.json: revoked_keys are not at most {MAX_REVOKED_KEYS} key ids")
    return frozenset(value)


def parse_settings(value: Any) -> str | None:
    """The `settings` member of a verified desired.json: text, read as TOML by whoever applies it.

    Raises:
        TrustError: `metadata_mismatch`.
    """
    if value is None:
        return None
    if not isinstance(value, str) or len(value.encode()) > MAX_SETTINGS_BYTES:
        raise _malformed(f"desired.json: settings are not a text of at most {MAX_SETTINGS_BYTES} bytes")
    return value


def parse_allow_rollback_to(value: Any, role: str) -> int:
    """The `allow_rollback_to` member of a verified release role's document; 0 when it allows none.

    Raises:
        TrustError: `metadata_mismatch`.
    """
    if type(value) is not int or not 0 <= value < _MAX_COUNTER:
        raise _malformed(f"{role}: allow_rollback_to {str(value)[:40]!r} is not a release counter")
    return value


def newest_counter(customs: Iterable[Any]) -> int:
    """The highest release counter among the `custom` members of listed targets; 0 when none has one."""
    counters = [custom.get("release_counter") for custom in customs if isinstance(custom, dict)]
    return max((counter for counter in counters if type(counter) is int), default=0)


def _malformed(message: str) -> TrustError:
    return TrustError(Reason.METADATA_MISMATCH, message, hint="it was signed as such: sign it again")
