"""`*.ovir`: an OpenVINO model in one file, checked before OpenVINO sees it. FORMAT.md §12.

Layout: `OVB1`, the lengths of .xml and .bin (uint32, little-endian), the .bin, the .xml; nothing before, between or
after. Invariants: every constant of the .xml lies within the .bin; the .xml has no document type, names no file, and
its operators are OpenVINO's own, so that nothing outside the file is ever looked for.
"""

from __future__ import annotations

import mmap
import os
import pyexpat
import re
import struct
from typing import Any

import numpy as np

from agent.errors import ModelError, Reason

MAGIC = b"OVB1"
HEAD = struct.Struct("<4sII")
MAX_XML_BYTES = 64 << 20
MAX_DEPTH = 64
_OPSET = re.compile(r"opset[0-9]{1,3}")
_NUMBER = re.compile(r"[0-9]{1,15}")


def split(fd: int) -> tuple[bytes, np.ndarray[Any, np.dtype[np.uint8]]]:
    """The .xml and, mapped without a copy, the .bin of the model in the sealed `fd`.

    Raises:
        ModelError: `model_unloadable`.
    """
    length = os.fstat(fd).st_size
    head = os.pread(fd, HEAD.size, 0)
    if len(head) < HEAD.size or head[:4] != MAGIC:
        raise _bad("is no .ovir file")
    _, xml_length, bin_length = HEAD.unpack(head)
    if HEAD.size + bin_length + xml_length != length:
        raise _bad(f"has {length} bytes where its header says {HEAD.size + bin_length + xml_length}")
    if not 0 < xml_length <= MAX_XML_BYTES:
        raise _bad(f"has an .xml part of {xml_length} bytes")
    xml = os.pread(fd, xml_length, HEAD.size + bin_length)
    if len(xml) != xml_length:
        raise _bad("is cut short")
    _Reader(bin_length).check(xml)
    # private and writable: OpenVINO shares no array that it could not write to
    mapping = mmap.mmap(fd, length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    return xml, np.frombuffer(mapping, np.uint8, bin_length, HEAD.size)


class _Reader:
    """One pass over the .xml."""

    def __init__(self, bin_length: int) -> None:
        self._bin_length = bin_length
        self._depth = 0
        self._root = ""

    def check(self, xml: bytes) -> None:
        parser = pyexpat.ParserCreate()
        parser.StartElementHandler = self._begin
        parser.EndElementHandler = self._end
        parser.StartDoctypeDeclHandler = _refuse_doctype
        try:
            parser.Parse(xml, True)
        except (pyexpat.ExpatError, LookupError, ValueError) as e:  # the last two: an encoding that is none
            raise _bad(f"has an .xml part that is not whole: {e}") from e
        if self._root != "net":
            raise _bad(f"describes no network but {self._root[:20]!r}")

    def _begin(self, name: str, attributes: dict[str, str]) -> None:
        self._root = self._root or name
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _bad(f"is nested more than {MAX_DEPTH} deep")
        # `__weights_path` and the like: notes that OpenVINO leaves for itself when it read a file
        if any("weights_path" in text.lower() for text in (name, *attributes, attributes.get("name", ""))):
            raise _bad("names another file as the place of its weights")
        if name == "layer" and not _OPSET.fullmatch(attributes.get("version", "")):
            operator, version = attributes.get("type", "")[:40], attributes.get("version", "")[:40]
            raise _bad(f"has the operator {operator!r} of {version!r}, which is none of OpenVINO's own")
        if name == "data" and ("offset" in attributes or "size" in attributes):
            self._check_range(attributes.get("offset", ""), attributes.get("size", ""))

    def _end(self, _: str) -> None:
        self._depth -= 1

    def _check_range(self, offset: str, size: str) -> None:
        if not (_NUMBER.fullmatch(offset) and _NUMBER.fullmatch(size)):
            raise _bad(f"has a constant at {offset[:20]!r} of {size[:20]!r} bytes")
        if int(offset) + int(size) > self._bin_length:
            raise _bad(f"has a constant at {offset} of {size} bytes, beyond the {self._bin_length} of its .bin part")


def _refuse_doctype(*_: object) -> None:
    raise _bad("has an .xml part with a document type")


def _bad(why: str) -> ModelError:
    return ModelError(Reason.MODEL_UNLOADABLE, f"the model {why}", hint="pack it again: edge-ota pack MODEL.xml")
