"""The settings that the operator wants on a device: `devices/<id>/settings.toml`, carried by every desired.json signed.

What they say is the device's to judge: this package knows TOML and a length, not the keys of agent.toml.
"""

from __future__ import annotations

import tomllib

from ota.client.desired import MAX_SETTINGS_BYTES
from ota.errors import PublishError, Reason
from ota.publisher import files
from ota.publisher.repository import Repository

NAME = "settings.toml"


def check(data: bytes) -> str:
    """The text of settings.

    Raises:
        PublishError: `bad_request`: not TOML in UTF-8, or too long.
    """
    if len(data) > MAX_SETTINGS_BYTES:
        raise PublishError(
            Reason.BAD_REQUEST, f"the settings are longer than {MAX_SETTINGS_BYTES} bytes", hint="shorten comments"
        )
    try:
        text = data.decode()
        tomllib.loads(text)
    except (ValueError, RecursionError) as e:
        raise PublishError(Reason.BAD_REQUEST, f"the settings are not TOML: {e}", hint="mend the file") from e
    return text


def stored(repository: Repository, device: str) -> str | None:
    """The settings wanted on `device`, None when none are.

    Raises:
        PublishError: `io_error`; `bad_request` when somebody spoilt the file.
    """
    data = files.read_regular(repository.desired_path(device).with_name(NAME), MAX_SETTINGS_BYTES + 1)
    return None if data is None else check(data)


def store(repository: Repository, device: str, data: bytes) -> None:
    """Want these settings on `device`; the caller holds the repository's lock and signs anew.

    Raises:
        PublishError: `bad_request`, `io_error`, `no_space`.
    """
    files.write_atomic(repository.desired_path(device).with_name(NAME), check(data).encode())
