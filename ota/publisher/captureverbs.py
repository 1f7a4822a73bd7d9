"""The verbs of `edge-ota` that make the operator's capture key and open what devices kept."""

from __future__ import annotations

import argparse
import base64
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ota import capture
from ota.errors import OtaError, PayloadError, PublishError, Reason, exit_code, one_line
from ota.publisher import files
from ota.publisher.keys import private_pem
from ota.publisher.reports import Add, Report, Surroundings
from ota.publisher.repository import Repository

KEY_FILE = "capture.pem"
_MAX_FILE_BYTES = capture.MAX_PICTURE_BYTES + (1 << 20)


def add_capture_verbs(add: Add) -> None:
    """Add them to the parser."""
    add("capture-key", _key, "Print the key that devices seal captured pictures to; the first time, make it.")
    sub = add("capture-open", _open, "Open captures that were copied from a device.")
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE", help=f"a {capture.SUFFIX} file")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the pictures go")


def _key(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    with repository.locked():
        made = not (repository.keys.directory / KEY_FILE).exists()
        if made:
            repository.keys.store(KEY_FILE, private_pem(X25519PrivateKey.generate()))
        public = repository.keys.load(KEY_FILE, X25519PrivateKey).public_key().public_bytes_raw()
    text = base64.b64encode(public).decode()
    note = (f"made {repository.keys.directory / KEY_FILE}: without it no capture can be opened",) if made else ()
    return Report({"operator_key": text, "made": made}, ("[capture]", f'operator_key = "{text}"'), warnings=note)


def _open(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    private = repository.keys.load(KEY_FILE, X25519PrivateKey)
    pictures: list[dict[str, Any]] = []
    failed: list[OtaError] = []
    for path in arguments.files:
        try:
            header, picture = _opened(path, private)
        except PayloadError as e:  # one of many that a stick damaged: the others are opened all the same
            failed.append(PayloadError(e.reason, f"{path}: {e.message}", hint=e.hint))
            continue
        arguments.out.mkdir(parents=True, exist_ok=True)
        place = arguments.out / f"{header['name']}.jpg"
        files.write_atomic(place, picture, files.SECRET_MODE)
        pictures.append({**header, "file": str(place)})
    if failed and not pictures:
        raise failed[0]
    told = ((p["file"], *(one_line(str(p.get(key))) for key in ("device", "line", "rule"))) for p in pictures)
    return Report(
        {"captures": pictures},
        tuple(f"{file}: {device} {line} {rule}" for file, device, line, rule in told),
        warnings=tuple(f"{e.message} [{e.reason.value}]" for e in failed),
        status=exit_code(failed[0].reason) if failed else 0,
    )


def _opened(path: Path, private: X25519PrivateKey) -> tuple[dict[str, Any], bytes]:
    """Header and picture of the capture at `path`; its name is one that a device gives.

    Raises:
        PayloadError: it is none, or not for this key.
        PublishError: `not_found`.
    """
    data = files.read_regular(path.resolve(), _MAX_FILE_BYTES)
    if data is None:
        raise PublishError(Reason.NOT_FOUND, f"there is no capture {path}", hint="check the path")
    header, picture = capture.open_with(data, private)
    if not capture.NAME_PATTERN.fullmatch(str(header.get("name", ""))):
        raise PayloadError(Reason.PAYLOAD_CORRUPT, "it has no name of a capture", hint="fetch it again")
    return header, picture
