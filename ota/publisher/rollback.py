"""The order to go back: a line's release role lets devices run a release below the counter they have reached.

Without it a device refuses every older release, whoever assigns it. The order is signed by the release role alone, so
a stolen director's key cannot give it; it says what is allowed, `grant` says what runs. It ends with the next release
of the line, or when the newest one is named.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ota.publisher.publish import publish
from ota.publisher.reports import Add, Report, Surroundings
from ota.publisher.repository import Listed, Repository


@dataclass(frozen=True, slots=True)
class RollbackOrder:
    """The oldest release that devices may go back to; None when the order was withdrawn. `role_version` is that of the
    document that says so."""

    oldest: Listed | None
    role_version: int


def allow_rollback(repository: Repository, line: str, version: str) -> RollbackOrder:
    """Let the devices of `line` go back as far as the published release `version`; the newest one withdraws that.

    Raises:
        PublishError: `unknown_release`, `key_missing`, `bad_signature`, `busy`, `io_error`, `no_space`.
    """
    oldest = repository.find(line, version)
    newest = max(listed.counter for listed in repository.published() if listed.line == line)
    counter = oldest.counter if oldest.counter < newest else 0
    signed = publish(repository, [], back_to=(line, counter))
    return RollbackOrder(oldest if counter else None, signed.roles[f"release-{line}"])


def add_rollback_verb(add: Add) -> None:
    """Add it to the parser."""
    sub = add("allow-rollback", _allow_rollback, "Let devices go back to an older release, until the next one.")
    sub.add_argument("line", metavar="LINE")
    sub.add_argument("version", metavar="VERSION", help="the oldest that may run again; the newest withdraws the order")


def _allow_rollback(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    line: str = arguments.line
    order = allow_rollback(repository, line, arguments.version)
    if order.oldest is None:
        told = [f"devices of {line} may no longer go back"]
    else:
        oldest = f"{order.oldest.version}, counter {order.oldest.counter}"
        told = [
            f"devices of {line} may go back to {oldest}, until the next release",
            f"next: edge-ota grant {repository.path} DEVICE {line} {order.oldest.version}",
        ]
    return Report(
        {
            "line": line,
            "allow_rollback_to": None
            if order.oldest is None
            else {"version": order.oldest.version, "counter": order.oldest.counter},
            "role_version": order.role_version,
        },
        tuple(told),
    )
