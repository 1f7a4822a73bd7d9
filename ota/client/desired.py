"""What verified metadata assigns to this device: releases by line, and the keys to open them.

Values and their parsing alone; whether to believe the document they stand in is decided in `trust`.
"""

from __future__ import annotations

import base64
import binascii
import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ota.errors import OtaError, Reason, TrustError
from ota.release import LINE_PATTERN, VERSION_PATTERN, check_target_name

MAX_GRANTS = 1024


@dataclass(frozen=True, slots=True)
class Assignment:
    """The release that this device should run on a line, as two roles agree on it.

    `expires` is that of the release role's document: a signed date that a release's `issued` cannot lie behind.
    """

    line: str
    version: str
    path: str
    length: int
    sha256: str
    expires: datetime.datetime


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
    """

    assignments: Mapping[str, Assignment] = field(default_factory=dict)
    refused: Mapping[str, OtaError] = field(default_factory=dict)
    grants: Mapping[str, Grant] = field(default_factory=dict)


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


def _malformed(message: str) -> TrustError:
    return TrustError(Reason.METADATA_MISMATCH, message, hint="the director wrote it wrongly: grant again")
