"""One strict JSON reader for every byte that comes from outside.

Refuses what `json.loads` lets through or trips over: duplicate keys, NaN and infinities, integers of thousands of
digits, lone surrogates, bytes that are not UTF-8, deep nesting, and anything larger than the caller's limit.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

from ota.errors import OtaError, Reason

MAX_DEPTH = 32
MAX_INT_DIGITS = 19


def loads(data: bytes, *, max_bytes: int, what: str) -> Any:
    """Parse `data`, at most `max_bytes` long, into plain Python values.

    Args:
        data: UTF-8 text of one JSON value.
        max_bytes: refused unread above this size.
        what: name of the document for the error's text.

    Raises:
        OtaError: reason `bad_json`.
    """
    if len(data) > max_bytes:
        raise _bad(what, f"{len(data)} bytes, more than the {max_bytes} allowed")
    try:
        text = data.decode("utf-8", errors="strict")
    except UnicodeDecodeError as e:
        raise _bad(what, f"not UTF-8 at byte {e.start}") from e
    _check_depth(text, what)

    def refuse_constant(name: str) -> NoReturn:
        raise _bad(what, f"{name} is not a JSON number")

    def read_int(digits: str) -> int:
        if len(digits) > MAX_INT_DIGITS + digits.startswith("-"):
            raise _bad(what, f"an integer of {len(digits)} digits")
        return int(digits)

    def read_float(digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            raise _bad(what, f"number {digits[:24]} is out of range")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise _bad(what, f"key {twice[:60]!r} appears twice")
        return result

    try:
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=refuse_constant, parse_int=read_int, parse_float=read_float
        )
    except (json.JSONDecodeError, RecursionError) as e:
        raise _bad(what, str(e)) from e
    if "\\u" in text:
        _check_surrogates(value, what)
    return value


def canonical(value: Any) -> bytes:
    """One byte string per value: sorted keys, no blanks, UTF-8. Floats are kept as Python prints them."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _bad(what: str, why: str) -> OtaError:
    return OtaError(Reason.BAD_JSON, f"{what}: {why}", hint="the file was damaged or was not made by edge-ota")


def _check_depth(text: str, what: str) -> None:
    """Count brackets outside strings before the recursive parser sees them."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    in_string = False
    escaped = False
    for char in text:
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise _bad(what, f"nested deeper than {MAX_DEPTH}")
        elif char in "]}":
            depth -= 1


def _check_surrogates(value: Any, what: str) -> None:
    if isinstance(value, str):
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise _bad(what, "a lone surrogate in a string")
    elif isinstance(value, list):
        for item in value:
            _check_surrogates(item, what)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_surrogates(key, what)
            _check_surrogates(item, what)
