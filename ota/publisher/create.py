"""Creation of a repository: directories, keys, the certificate authority and version 1 of every metadata role."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)

from ota.errors import PublishError, Reason
from ota.publisher import files, settings
from ota.publisher.certificates import DEFAULT_BROKER_NAMES, OPERATOR_NAME, REVOKED_LIST, SERVICE_NAME
from ota.publisher.keys import ROOT_KEYS, ROOT_THRESHOLD
from ota.publisher.publish import meta_file
from ota.publisher.repository import Clock, Repository, system_clock
from ota.publisher.settings import Settings

_PUBLIC = ("metadata", "targets", "payloads", "devices", "prepared")
_SECRET = ("keys", "vault", "vault/plain", "vault/keys")


def create(
    path: Path,
    *,
    configured: Settings | None = None,
    broker_names: Sequence[str] = DEFAULT_BROKER_NAMES,
    now: Clock = system_clock,
) -> Repository:
    """Make a repository at `path`, which does not exist or is an empty directory.

    Args:
        configured: limits written to repo.toml; the defaults when None.
        broker_names: host names and addresses that the broker's certificate is valid for.

    Raises:
        PublishError: `repository_exists` when anything lies at `path`.
    """
    configured = configured or Settings()
    settings.check_tenant(configured.tenant)
    if path.exists() and (not path.is_dir() or os.listdir(path)):
        raise PublishError(
            Reason.REPOSITORY_EXISTS,
            f"{path} exists and is not an empty directory",
            hint="choose another path; an existing repository and its keys are never overwritten",
        )
    for name in ("", *_PUBLIC):
        files.make_directory(path / name)
    for name in _SECRET:
        files.make_directory(path / name, files.SECRET_DIRECTORY_MODE)
    repository = Repository(path, configured, now)
    _make_identities(repository, broker_names)
    sign_first(repository)
    # last: without it the directory is not a repository
    files.write_atomic(path / "repo.toml", settings.to_toml(configured))
    return repository


def _make_identities(repository: Repository, broker_names: Sequence[str]) -> None:
    limits = repository.settings
    for name in (*ROOT_KEYS, "targets", "snapshot", "timestamp", "director"):
        repository.keys.create_signer(name)
    repository.keys.create_director_hpke()
    now = repository.now().replace(microsecond=0)
    repository.authority.create(limits.tenant, now, limits.ca_days)
    repository.authority.issue_broker(broker_names, now, limits.server_certificate_days)
    for name in (SERVICE_NAME, OPERATOR_NAME):
        repository.authority.issue_client(name, now, limits.server_certificate_days)
    # an empty list, so that the broker can name it from the start
    files.write_atomic(repository.path / REVOKED_LIST, repository.authority.revocation_list((), 0, now))


def sign_first(repository: Repository) -> None:
    """Version 1 of root, targets, snapshot and timestamp, with the keys that lie in the repository."""
    keys, limits = repository.keys, repository.settings
    root = Root(version=1, expires=repository.expiry(limits.root_days), consistent_snapshot=True)
    for name in ROOT_KEYS:
        root.add_key(keys.signer(name).public_key, "root")
    root.roles["root"].threshold = ROOT_THRESHOLD
    for name in ("targets", "snapshot", "timestamp"):
        root.add_key(keys.signer(name).public_key, name)
    signed_root = Metadata(root)
    for name in ROOT_KEYS:
        signed_root.sign(keys.signer(name), append=True)

    director = keys.signer("director").public_key
    targets = Targets(
        version=1,
        expires=repository.expiry(limits.targets_days),
        delegations=Delegations(
            keys={director.keyid: director},
            roles={"director": DelegatedRole("director", [director.keyid], 1, True, paths=["devices/*"])},
        ),
    )
    signed_targets = Metadata(targets)
    signed_targets.sign(keys.signer("targets"))
    targets_bytes = signed_targets.to_bytes()

    snapshot = Metadata(
        Snapshot(
            version=1,
            expires=repository.expiry(limits.snapshot_days),
            meta={"targets.json": meta_file(1, targets_bytes)},
        )
    )
    snapshot.sign(keys.signer("snapshot"))
    snapshot_bytes = snapshot.to_bytes()

    timestamp = Metadata(
        Timestamp(
            version=1,
            expires=repository.expiry(limits.timestamp_days),
            snapshot_meta=meta_file(1, snapshot_bytes),
        )
    )
    timestamp.sign(keys.signer("timestamp"))
    files.write_atomic(repository.metadata_path("root", 1), signed_root.to_bytes())
    files.write_atomic(repository.metadata_path("targets", 1), targets_bytes)
    files.write_atomic(repository.metadata_path("snapshot", 1), snapshot_bytes)
    files.write_atomic(repository.metadata_path("timestamp", None), timestamp.to_bytes())
