"""The verbs of `edge-ota` around sticks: `bundle` writes one, `sticks` keeps the repository they are signed by."""

from __future__ import annotations

import argparse
from pathlib import Path

from ota.publisher import sideload, stickkeys, sticks
from ota.publisher.reports import Add, Report, Surroundings
from ota.publisher.repository import Repository

_SHORT = "it does not pin the root of the sticks, so this one is signed with the fleet's short-lived metadata"


def add_stick_verbs(add: Add) -> None:
    """Add them to the parser."""
    sub = add("bundle", _bundle, "Write a stick for one device: a directory, or a stored zip.")
    sub.add_argument("device", metavar="DEVICE")
    sub.add_argument("out", type=Path, metavar="OUT", help="a new directory, or a new file that ends in .zip")

    sub = add("sticks", _sticks, "Make the repository that sticks are signed by, or replace one of its keys.")
    sub.add_argument("--rotate", metavar="KEY", help="root-1 … root-3, targets, snapshot, timestamp, director")


def _bundle(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    written = sideload.write_sideload(repository, arguments.device, arguments.out)
    return Report(
        {
            "device": written.device,
            "out": str(arguments.out),
            "releases": [{"line": r.line, "version": r.version} for r in written.releases],
            "files": written.files,
            "bytes": written.bytes,
            "expires": written.expires.isoformat(),
            "own_root": written.own_root,
        },
        (
            f"{arguments.out}: {', '.join(f'{r.line} {r.version}' for r in written.releases)} for {written.device}",
            f"  {written.files} files, {written.bytes} bytes, usable until {written.expires:%Y-%m-%d %H:%M} UTC",
        ),
        () if written.own_root else (f"{written.device}: {_SHORT}; enrolled anew, it gets long-lived ones",),
    )


def _sticks(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    if arguments.rotate is not None:
        rotated = stickkeys.rotate(repository, arguments.rotate)
        lines = [f"{rotated.name} of the sticks is now key {rotated.keyid[:16]}, root {rotated.root_version}"]
        lines += [f"  destroy the old key: {rotated.retired}"] if rotated.retired is not None else []
        return Report({"key": rotated.name, "keyid": rotated.keyid, "root_version": rotated.root_version}, tuple(lines))
    with repository.locked():
        made = sticks.create(repository)
    return Report(
        {"sticks": str(made.path), "root_version": made.root_version(), "days": repository.settings.stick_days},
        (
            f"{made.path}: root {made.root_version()}, sticks live {repository.settings.stick_days} days",
            "  devices that are enrolled from now on pin it",
        ),
    )
