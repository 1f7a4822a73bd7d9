"""The verbs of `edge-ota` that make or replace keys and certificates."""

from __future__ import annotations

import argparse
from datetime import timedelta

from ota.errors import OtaError
from ota.publisher import revocation, rotate
from ota.publisher.certificates import LISTENER_NAME
from ota.publisher.reports import Add, Report, Surroundings
from ota.publisher.repository import Repository

_SERVER_WARNING_DAYS = 60


def add_key_verbs(add: Add) -> None:
    """Add them to the parser."""
    sub = add("broker-certificate", _broker_certificate, "Make a new key and certificate for the broker.")
    sub.add_argument("names", nargs="+", metavar="NAME", help="host name or address")

    add("renew-ca", _renew_ca, "Make a later certificate of the fleet's authority, by the same key.")

    sub = add("identity", _identity, "Make a key and certificate for another block server or operator.")
    sub.add_argument("name", metavar="NAME", help="ota_…; the broker's ACL has to know it")

    sub = add("rotate", _rotate, "Replace a signing key, and sign anew what it signed.")
    sub.add_argument("key", metavar="KEY", help="root-1 … root-3, targets, snapshot, timestamp, director, release-LINE")


def ending(repository: Repository) -> tuple[str, ...]:
    """Which certificates among the keys end soon, or that one cannot be read, with what to do: a line each. Nothing of
    it happens by itself."""
    try:
        ends = repository.authority.ends()
    except OtaError as e:
        return (f"{e.message}; {e.hint}",)  # what was signed meanwhile is signed
    now, days = repository.now(), repository.settings.device_certificate_days
    path = repository.path
    advice = {
        "ca": f"edge-ota renew-ca {path}; devices need {days} days to get the later one",
        "broker": f"edge-ota broker-certificate {path} NAME …, then restart the broker with it",
        LISTENER_NAME: "restart whoever runs the enrolment listener: it makes another",
    }
    return tuple(
        f"{name}.pem ends on {end:%Y-%m-%d}: "
        + advice.get(name, f"edge-ota identity {path} {name}, then restart who connects with it")
        for name, end in ends.items()
        if end - now < timedelta(days=days if name == "ca" else _SERVER_WARNING_DAYS)
    )


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


def _renew_ca(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    settings = repository.settings
    with repository.locked():
        former = repository.authority.certificate().not_valid_after_utc
        now = around.now().replace(microsecond=0)
        later = repository.authority.renew(now, settings.ca_days).not_valid_after_utc
        crl = revocation.write_list(repository)  # it ends with the certificate
    ca = repository.authority.broker_tls.ca
    reached = now + timedelta(days=settings.device_certificate_days)
    late = (
        ()
        if reached < former
        else (
            f"devices renew until {reached:%Y-%m-%d}: those that do so after {former:%Y-%m-%d} need a bundle by hand",
        )
    )
    return Report(
        {"ca": str(ca), "expires": later.isoformat(), "former_expires": former.isoformat(), "crl": str(crl)},
        (
            f"{ca} is valid until {later:%Y-%m-%d}; what was issued before stays valid",
            f"  install it as the broker's cafile, with {crl} as its crlfile, and restart the broker",
            f"  each device gets it with the next renewal of its certificate, until {reached:%Y-%m-%d}",
        ),
        late,
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
