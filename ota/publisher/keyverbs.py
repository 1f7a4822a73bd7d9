"""The verbs of `edge-ota` that make or replace keys and certificates."""

from __future__ import annotations

import argparse

from ota.publisher import rotate
from ota.publisher.reports import Add, Report, Surroundings
from ota.publisher.repository import Repository


def add_key_verbs(add: Add) -> None:
    """Add them to the parser."""
    sub = add("broker-certificate", _broker_certificate, "Make a new key and certificate for the broker.")
    sub.add_argument("names", nargs="+", metavar="NAME", help="host name or address")

    sub = add("identity", _identity, "Make a key and certificate for another block server or operator.")
    sub.add_argument("name", metavar="NAME", help="ota_…; the broker's ACL has to know it")

    sub = add("rotate", _rotate, "Replace a signing key, and sign anew what it signed.")
    sub.add_argument("key", metavar="KEY", help="root-1 … root-3, targets, snapshot, timestamp, director, release-LINE")


def _broker_certificate(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    days = repository.settings.server_certificate_days
    with repository.locked():
        repository.authority.issue_broker(arguments.names, around.now().replace(microsecond=0), days)
    tls = repository.authority.broker_tls
    return Report(
        {"names": arguments.names, "certificate": str(tls.certificate), "key": str(tls.key)},
        (f"{tls.certificate} is valid for {', '.join(arguments.names)} for {days} days; restart the broker with it",),
    )


def _rotate(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    rotated = rotate.rotate(repository, arguments.key)
    lines = [f"{rotated.name} is now key {rotated.keyid[:16]}, root {rotated.root_version} is in force"]
    lines += [f"  destroy the old key: {rotated.retired}"] if rotated.retired is not None else []
    return Report(
        {
            "key": rotated.name,
            "keyid": rotated.keyid,
            "root_version": rotated.root_version,
            "retired": None if rotated.retired is None else str(rotated.retired),
        },
        tuple(lines),
    )


def _identity(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    with repository.locked():
        repository.authority.issue_client(
            arguments.name, around.now().replace(microsecond=0), repository.settings.server_certificate_days
        )
    tls = repository.authority.client_tls(arguments.name)
    return Report(
        {"name": arguments.name, "certificate": str(tls.certificate), "key": str(tls.key)},
        (f"{tls.certificate} and {tls.key.name}; give {arguments.name} its rights in the broker's ACL",),
    )
