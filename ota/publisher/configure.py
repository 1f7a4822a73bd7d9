"""`edge-ota configure`: sign the settings that a device should run with into its desired.json.

The device tries them and takes them back if they do not bring its link, sources and lines (FORMAT.md §6); it looks at
each document once, so sending the same again changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from ota.client.desired import MAX_SETTINGS_BYTES
from ota.errors import PublishError, Reason
from ota.publisher import director, files, wanted
from ota.publisher.director import Desired
from ota.publisher.enroll import load_device, revoked_error
from ota.publisher.reports import Add, Report, Surroundings
from ota.publisher.repository import Repository


def configure(repository: Repository, device: str, data: bytes) -> Desired:
    """Want the settings `data` on `device`, and sign its document anew.

    Raises:
        PublishError: `unknown_device`, `device_revoked`, `bad_request`, `key_missing`, `busy`, `io_error`, `no_space`.
    """
    with repository.locked():
        enrolled = load_device(repository, device)
        if enrolled.revoked:
            raise revoked_error(enrolled)
        repository.keys.signer("director")  # what cannot be signed must not wait for the next signature
        wanted.store(repository, device, data)
        signed = director.resign(repository, device)
    if signed is None:
        raise PublishError(Reason.STATE_CORRUPT, f"the settings of {device} are gone again", hint="look at the disk")
    return signed


def add_configure_verb(add: Add) -> None:
    """Add it to the parser."""
    sub = add("configure", _configure, "Send a device settings, a whole agent.toml; it takes back what does not work.")
    sub.add_argument("device", metavar="DEVICE")
    sub.add_argument("file", type=Path, metavar="FILE", help=f"at most {MAX_SETTINGS_BYTES >> 10} KiB of TOML")


def _configure(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    data = files.read_regular(arguments.file.resolve(), MAX_SETTINGS_BYTES + 1)
    if data is None:
        raise PublishError(Reason.NOT_FOUND, f"there is no file {arguments.file}", hint="check the path")
    desired = configure(repository, arguments.device, data)
    sha256 = hashlib.sha256(data).hexdigest()
    return Report(
        {"device": desired.device, "version": desired.version, "settings": sha256},
        (
            f"{desired.device} is to run with settings {sha256[:12]}, desired.json {desired.version}",
            "  it tries them at its next look and tells how that ended as an event `settings`",
        ),
    )
