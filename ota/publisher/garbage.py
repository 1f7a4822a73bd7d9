"""What a repository keeps and nobody needs any more, and its removal.

Needed are: payloads and content keys of every release that was ever signed or waits to be; plaintexts that a coming
delta can start from, so those of the newest `delta_releases` of a line, of what waits, of what a device is assigned,
and of what an order to go back allows; of the sticks' metadata all roots and what the timestamp leads to, because each
stick carries its own copy. The rest is left by interrupted and replaced builds, or was overtaken.
Online metadata stays: a device may be half-way through it.
Invariants: what is needed is known whole before the first file goes, and one unreadable document keeps everything;
each file is unneeded by itself, so a cut in between leaves a smaller rest; a name that this package does not make is
left alone; nothing is built meanwhile, because the lock is held.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tuf.api.metadata import Targets

from ota import release as release_format
from ota.errors import PublishError, Reason
from ota.publisher import files, sticks, vault
from ota.publisher.publish import ALLOW_ROLLBACK_TO
from ota.publisher.reports import Add, Report, Surroundings
from ota.publisher.repository import MAX_METADATA_BYTES, Repository, load_metadata
from ota.release import Release

# what `files.write_atomic` leaves when its process is killed
_TEMPORARY = r"\.tmp-[a-z0-9_]{8}"
_SHA256 = re.compile(rf"[0-9a-f]{{64}}|{_TEMPORARY}")
_CEK_ID = re.compile(rf"[0-9a-f]{{32}}|{_TEMPORARY}")
_OVERTAKEN = re.compile(rf"[0-9]{{1,9}}\.(snapshot|targets)\.json|{_TEMPORARY}")


@dataclass(frozen=True, slots=True)
class Garbage:
    """Files that nothing needs, of one kind, and how many bytes they hold."""

    kind: str
    paths: tuple[Path, ...]
    bytes: int


def collect(repository: Repository, *, delete: bool) -> list[Garbage]:
    """What nobody needs, by kind; with `delete` it is removed. Interrupted, the next call goes on.

    Raises:
        PublishError: `state_corrupt`: it cannot be told what is needed, and nothing was removed; `busy`, `io_error`.
    """
    with repository.locked():
        found = _found(repository)
        for path in (path for garbage in found if delete for path in garbage.paths):
            files.remove(path)
        return found


def _found(repository: Repository) -> list[Garbage]:
    waiting = repository.prepared()
    signed = _signed(repository)
    releases = [*waiting, *signed.values()]
    parts = [part for release in releases for part in (*release.components, release.golden)]
    payloads = {part.full.sha256 for part in parts} | {d.payload.sha256 for part in parts for d in part.deltas}
    bases = _plaintexts(waiting) | _plaintexts(_bases(repository, signed))
    place = repository.path
    found = [
        _rest("payloads", place / "payloads", _SHA256, payloads),
        _rest("content keys", place / vault.FOLDER / vault.KEYS, _CEK_ID, {part.full.cek_id for part in parts}),
        _rest("plaintexts", place / vault.FOLDER / vault.PLAIN, _SHA256, bases),
    ]
    own = sticks.opened(repository)
    if own is not None:
        snapshot = own.timestamp().signed.snapshot_meta.version
        current = {f"{snapshot}.snapshot.json", f"{own.targets().signed.version}.targets.json"}
        found.append(_rest("metadata of sticks", own.path / "metadata", _OVERTAKEN, current))
    return found


def _signed(repository: Repository) -> dict[str, Release]:
    """Every release that was ever signed, by the hash of its release.json: also one that an older backup of the
    metadata does not list."""
    found = {listed.sha256: repository.release(listed) for listed in repository.published()}
    for path in (repository.path / "targets").glob("*/*/*.release.json"):
        sha256 = path.name.partition(".")[0]
        if sha256 not in found:
            data = files.read_regular(path, release_format.MAX_RELEASE_BYTES)
            if data is None or hashlib.sha256(data).hexdigest() != sha256:
                raise PublishError(Reason.STATE_CORRUPT, f"{path} is damaged", hint="restore it from a backup")
            found[sha256] = release_format.parse(data)
    return found


def _bases(repository: Repository, signed: dict[str, Release]) -> Iterator[Release]:
    """The signed releases whose plaintexts a coming delta may start from."""
    published = repository.published()
    orders = {
        line: role.signed.unrecognized_fields.get(ALLOW_ROLLBACK_TO, 0)
        for line, role in repository.release_roles().items()
    }
    assigned = set(_assigned(repository))
    for line, oldest in orders.items():
        newest_first = [listed for listed in published if listed.line == line][::-1]
        for place, listed in enumerate(newest_first):
            allowed = 0 < oldest <= listed.counter
            if place < repository.settings.delta_releases or listed.target in assigned or allowed:
                yield signed[listed.sha256]
    # not listed: it is not known here how new they are
    yield from (signed[sha256] for sha256 in signed.keys() - {listed.sha256 for listed in published})


def _assigned(repository: Repository) -> Iterator[str]:
    """Target names of what some device should run, over the network or from its last stick."""
    for kept in (repository, sticks.opened(repository)):
        for path in [] if kept is None else sorted((kept.path / "devices").glob("*/desired.json")):
            data = files.read_regular(path, MAX_METADATA_BYTES)
            if data is not None:
                yield from load_metadata(data, str(path), Targets).signed.targets


def _plaintexts(releases: Iterable[Release]) -> set[str]:
    return {part.plain_sha256 for release in releases for part in (*release.components, release.golden)}


def _rest(kind: str, directory: Path, ours: re.Pattern[str], needed: set[str]) -> Garbage:
    """Regular files in `directory` under a name of ours that is not needed."""
    paths, size = [], 0
    try:
        for path in sorted(directory.iterdir()):
            if path.name not in needed and ours.fullmatch(path.name):
                facts = path.lstat()
                if stat.S_ISREG(facts.st_mode):
                    paths.append(path)
                    size += facts.st_size
    except FileNotFoundError as e:
        raise PublishError(Reason.STATE_CORRUPT, f"{e.filename} is missing", hint="restore a backup") from e
    except OSError as e:
        raise PublishError(Reason.IO_ERROR, f"cannot read {directory}: {e.strerror}") from e
    return Garbage(kind, tuple(paths), size)


def add_garbage_verb(add: Add) -> None:
    """Add it to the parser."""
    sub = add("gc", _gc, "Show what the repository keeps and nobody needs any more, or remove it.")
    sub.add_argument("--delete", action="store_true", help="remove it; without this nothing changes")


def _gc(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    found = collect(repository, delete=arguments.delete)
    told = [f"{g.kind}: {len(g.paths)} files, {g.bytes} bytes" for g in found]
    if arguments.delete:
        told.append(f"removed {sum(g.bytes for g in found)} bytes")
    else:
        told.append(f"nothing was removed; with --delete {sum(g.bytes for g in found)} bytes are")
    return Report(
        {
            "deleted": arguments.delete,
            "garbage": [
                {
                    "kind": g.kind,
                    "bytes": g.bytes,
                    "files": [path.relative_to(repository.path).as_posix() for path in g.paths],
                }
                for g in found
            ],
        },
        tuple(told),
    )
