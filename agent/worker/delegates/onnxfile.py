"""Whether an ONNX file names other files, found by walking its protobuf without a library.

External data names files relative to wherever the process is, and a precompiled node any file at all; a model that
arrives alone in a memfd has none, so any mention of them is refused before a runtime can follow it. Field numbers are
those of onnx.proto3.
Invariant: the walk copies nothing and skips tensors' contents by their length.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping

from agent.errors import ModelError, Reason

MAX_DEPTH = 64
_TENSOR_EXTERNAL_DATA = 13
_TENSOR_DATA_LOCATION = 14
_NODE_OPERATOR = 4
# what a provider compiled elsewhere; it opens any file that the node names, wherever that lies
_PRECOMPILED = b"EPContext"
_TAG_BITS = 32

# Message kinds, and in which of their fields which kinds lie.
_INSIDE: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}


def refuse_external_data(fd: int) -> None:
    """Pass only an ONNX file that is complete in itself.

    Raises:
        ModelError: `model_unloadable` for external data, for nodes compiled elsewhere, and for bytes that are no
            protobuf message.
    """
    with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as data:
        with memoryview(data) as view:
            todo = [(k, s, e, 1) for k, s, e in _walk(view, "model", 0, len(view))]
            if not any(kind == "graph" for kind, *_ in todo):
                raise _malformed()
            while todo:
                kind, start, end, depth = todo.pop()
                if depth > MAX_DEPTH:
                    raise _malformed()
                todo += [(k, s, e, depth + 1) for k, s, e in _walk(view, kind, start, end)]


def _walk(view: memoryview, kind: str, start: int, end: int) -> list[tuple[str, int, int]]:
    """Messages inside one message, as (kind, start, end)."""
    inside = _INSIDE[kind]
    found = []
    position = start
    while position < end:
        key, position = _varint(view, position, end)
        if key >> _TAG_BITS:
            raise _malformed()  # protobuf drops what is above, and would read another field here
        number, wire = key >> 3, key & 7
        value = 0
        begin = position
        if wire == 0:
            value, position = _varint(view, position, end)
        elif wire == 1:
            position += 8
        elif wire == 5:
            position += 4
        elif wire == 2:
            length, begin = _varint(view, position, end)
            position = begin + length
        else:
            raise _malformed()
        if position > end:
            raise _malformed()
        if kind == "tensor" and (number == _TENSOR_EXTERNAL_DATA or (number == _TENSOR_DATA_LOCATION and value)):
            raise ModelError(
                Reason.MODEL_UNLOADABLE,
                "the ONNX model keeps weights in other files",
                hint="save it with its weights inside (onnx.save without external data)",
            )
        if kind == "node" and number == _NODE_OPERATOR and view[begin:position] == _PRECOMPILED:
            raise ModelError(
                Reason.MODEL_UNLOADABLE,
                "the ONNX model holds an EPContext node, which names other files",
                hint="publish the model itself; the device compiles it",
            )
        if wire == 2 and number in inside:
            found.append((inside[number], begin, position))
    return found


def _varint(view: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise _malformed()


def _malformed() -> ModelError:
    return ModelError(Reason.MODEL_UNLOADABLE, "the file is not a whole ONNX model", hint="check the exported file")
