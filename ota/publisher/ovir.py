"""`edge-ota pack`: an OpenVINO model, which is two files, as the one file `*.ovir` of a component. FORMAT.md §12.

Not here: what the two files say; the device's worker checks that before OpenVINO reads them.
"""

from __future__ import annotations

import argparse
import struct
from pathlib import Path
from typing import Any

from ota.errors import PublishError, Reason
from ota.publisher import files
from ota.publisher.arguments import Parser
from ota.publisher.reports import Report, Surroundings
from ota.release import MAX_PAYLOAD_BYTES

MAGIC = b"OVB1"
MAX_XML_BYTES = 64 << 20
_HEAD = struct.Struct("<4sII")


def pack(xml: bytes, weights: bytes) -> bytes:
    """Bytes of an .ovir file: magic, both lengths, the .bin, the .xml."""
    return _HEAD.pack(MAGIC, len(xml), len(weights)) + weights + xml


def add_pack_verb(verbs: Any) -> None:
    """Add it to the subparsers of `edge-ota`; it needs no repository."""
    text = "Pack an OpenVINO model (.xml and .bin) into the one file .ovir."
    sub: Parser = verbs.add_parser("pack", help=text, description=text, allow_abbrev=False)
    sub.add_argument("model", type=Path, metavar="MODEL.xml", help="the .bin of the same name lies beside it")
    sub.add_argument("--out", type=Path, metavar="FILE", help="default: the .ovir of the same name beside it")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.set_defaults(verb=_pack)


def _pack(arguments: argparse.Namespace, _: Surroundings) -> Report:
    model: Path = arguments.model
    if model.suffix != ".xml":
        raise PublishError(Reason.BAD_USAGE, f"{model} is no .xml file", hint="name the .xml of an OpenVINO model")
    parts = (model, model.with_suffix(".bin"))
    out: Path = arguments.out or model.with_suffix(".ovir")
    if out.resolve() in [path.resolve() for path in parts]:
        raise PublishError(Reason.BAD_USAGE, f"{out} is one of the two files to be packed", hint="name another --out")
    xml, weights = (
        _read(path, limit) for path, limit in zip(parts, (MAX_XML_BYTES, MAX_PAYLOAD_BYTES // 2), strict=True)
    )
    if not xml:
        raise PublishError(Reason.BAD_USAGE, f"{model} is empty", hint="openvino.save_model writes both files")
    # whoever may not read the weights may not read them in here either
    mode = parts[0].stat().st_mode & parts[1].stat().st_mode & files.PUBLIC_MODE
    files.write_atomic(out, pack(xml, weights), mode)
    return Report({"file": str(out), "bytes": out.stat().st_size}, (f"{out}: {out.stat().st_size} bytes",))


def _read(path: Path, max_bytes: int) -> bytes:
    data = files.read_regular(path.resolve(), max_bytes)
    if data is None:
        raise PublishError(Reason.NOT_FOUND, f"there is no {path}", hint="openvino.save_model writes both files")
    return data
