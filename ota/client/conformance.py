"""`python -m ota.client.conformance`: the device's TUF workflow behind the command line of the TUF conformance suite.

    --metadata-dir D init ROOT
    --metadata-url U --metadata-dir D refresh
    --metadata-url U --metadata-dir D --target-name N --target-base-url B --target-dir T download

A thin driver: `Workflow` decides, `Documents` keeps, urllib asks; one thread, no event loop. D holds `<role>.json` and,
under `state/`, the floors. Exit status 0, or 1 with the reason on stderr. Not a part of the agent: devices fetch over
their own transports.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import TargetFile

from ota.client.documents import Documents
from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.client.limits import Limits
from ota.client.repository import reference_time
from ota.client.verify import absent, mismatch
from ota.client.workflow import FetchMetadata, Steps, Trusted, Workflow
from ota.errors import OtaError, Reason, TransferError, TrustError

_REPOSITORY = "conformance"
# the suite's recorded repositories are judged at the time they were made, before this software was
_LIMITS = Limits(
    built=datetime.datetime.min.replace(tzinfo=datetime.UTC),
    # room for repositories of any kind, not only for a fleet's
    root_max_bytes=1 << 19,
    snapshot_max_bytes=1 << 21,
    targets_max_bytes=5 << 20,
)
_ROOT = "root.json"
_ABSENT = (403, 404)
_TIMEOUT_S = 20.0
_MAX_TARGET_BYTES = 1 << 30
_T = TypeVar("_T")
Clock = Callable[[], datetime.datetime]


class Client:
    """A TUF client of one repository behind HTTP.

    Args:
        folder: where its metadata lies.
        metadata_url: where the repository's metadata lies; empty for a client that only initialises.
    """

    def __init__(self, folder: Path, metadata_url: str, now: Clock, limits: Limits) -> None:
        self._fs = Fs(folder)
        self._url = metadata_url
        self._now = now
        self._limits = limits
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def init(self, root: bytes) -> None:
        """Trust `root` from now on.

        Raises:
            StoreError: `no_space` or `io_error`.
        """
        self._fs.write_atomic(_ROOT, root)

    def refresh(self) -> None:
        """Bring the top-level metadata up to date.

        Raises:
            OtaError: as `Workflow.top_level`.
        """
        journal, documents = self._open()
        self._walk(self._workflow(journal, documents).top_level(self._pinned()), documents)

    def download(self, name: str, base_url: str, folder: Path) -> None:
        """Bring the target `name` into `folder` as one file, unless it lies there already.

        Raises:
            OtaError: as `Workflow.find`; `not_found` when no trusted role lists it; `metadata_mismatch` when the
                bytes are not the listed ones.
        """
        journal, documents = self._open()
        workflow = self._workflow(journal, documents)

        def search() -> Steps[tuple[TargetFile | None, bool]]:
            top = yield from workflow.top_level(self._pinned())
            found = yield from workflow.find(top, name)
            return found, bool(top.root.consistent_snapshot)

        target, consistent = self._walk(search(), documents)
        if target is None:
            raise absent(f"target {name[:80]!r}")
        # under a hash: a target may be called "..", or longer than a file may be
        targets, place = Fs(folder), hashlib.sha256(name.encode()).hexdigest()
        kept = targets.read(place, target.length) if targets.size(place) == target.length else None
        if kept is not None and _is_target(target, kept):
            return
        prefix = f"{_best_hash(target)}." if consistent else ""
        parent, slash, file_name = name.rpartition("/")
        data = self._get(base_url, f"{quote(parent)}{slash}{prefix}{quote(file_name)}", _length(target))
        if data is None:
            raise absent(f"the file of target {name[:80]!r}")
        if not _is_target(target, data):
            raise mismatch(f"target {name[:80]!r} is not the file that was listed")
        targets.write_atomic(place, data)

    def _open(self) -> tuple[Journal, Documents]:
        journal = Journal(self._fs)
        return journal, Documents(self._fs, journal, _REPOSITORY, ".", self._limits.targets_max_bytes)

    def _workflow(self, journal: Journal, documents: Documents) -> Workflow:
        reference = reference_time(self._now(), journal.record.clock_floor, self._limits.built)
        return Workflow(documents.stored(), documents.floors, reference, self._limits)

    def _pinned(self) -> bytes:
        return self._fs.read(_ROOT, self._limits.root_max_bytes) or b""

    def _walk(self, steps: Steps[_T], documents: Documents) -> _T:
        answer: bytes | None = None
        failure: TransferError | None = None
        try:
            while True:
                effect = steps.send(answer) if failure is None else steps.throw(failure)
                answer = failure = None
                if isinstance(effect, Trusted):
                    documents.keep(effect)
                elif isinstance(effect, FetchMetadata):
                    version = "" if effect.version is None else f"{effect.version}."
                    try:
                        answer = self._get(self._url, f"{version}{quote(effect.role, safe='')}.json", effect.max_bytes)
                    except TransferError as e:
                        failure = e
        except StopIteration as e:
            result: _T = e.value
            return result

    def _get(self, base: str, place: str, max_bytes: int) -> bytes | None:
        url = f"{base.rstrip('/')}/{place}"
        try:
            with self._opener.open(url, timeout=_TIMEOUT_S) as response:
                data: bytes = response.read(max_bytes + 1)
        except urllib.error.HTTPError as e:
            with e:
                if e.code in _ABSENT:
                    return None
            raise TransferError(Reason.SOURCE_UNREACHABLE, f"{url}: HTTP {e.code}", retry=True) from e
        except TimeoutError as e:
            raise TransferError(Reason.TRANSFER_TIMEOUT, f"{url}: no answer", retry=True) from e
        except (OSError, HTTPException, ValueError) as e:
            raise TransferError(Reason.SOURCE_UNREACHABLE, f"{url}: {e}", retry=True) from e
        if len(data) > max_bytes:
            raise TrustError(Reason.METADATA_TOO_LARGE, f"{url}: more than the {max_bytes} bytes allowed")
        return data


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = _parser().parse_args(argv)
    client = Client(arguments.metadata_dir, arguments.metadata_url, _system_clock, _LIMITS)
    try:
        match arguments.command:
            case "init":
                client.init(arguments.root.read_bytes())
            case "refresh":
                client.refresh()
            case _:
                client.download(arguments.target_name, arguments.target_base_url, arguments.target_dir)
    except OtaError as e:
        print(f"error: {e.message} [{e.reason.value}]", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ota.client.conformance", allow_abbrev=False)
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url", default="")
    parser.add_argument("--target-name", default="")
    parser.add_argument("--target-base-url", default="")
    parser.add_argument("--target-dir", type=Path, default=Path())
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    return parser


def _system_clock() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _length(target: TargetFile) -> int:
    if target.length > _MAX_TARGET_BYTES:
        raise TrustError(Reason.METADATA_TOO_LARGE, f"{target.path[:80]!r} has {target.length} bytes")
    return target.length


def _best_hash(target: TargetFile) -> str:
    return target.hashes.get("sha256") or next(iter(target.hashes.values()))


def _is_target(target: TargetFile, data: bytes) -> bool:
    try:
        target.verify_length_and_hashes(data)
    except LengthOrHashMismatchError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
