"""Typed access to the tables of a `spec.toml`, and the checks of their values; every miss names file and key."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ota.errors import PublishError, Reason
from ota.publisher.settings import nearest

Check = Callable[[Any], Any]
"""Returns the value as it shall be kept. Raises `ValueError` with the rest of a sentence."""


class Table:
    """One TOML table. A key that is not among `keys` is refused before any other is looked at: a misspelt key explains
    a missing one."""

    def __init__(self, raw: Mapping[str, Any], where: str, keys: Iterable[str]) -> None:
        self.raw = raw
        self.where = where
        known = tuple(keys)
        for key in raw:
            if key not in known:
                raise self.bad(key, "unknown key", nearest(key, known))

    def bad(self, key: str, why: str, hint: str = "") -> PublishError:
        """The error of `key`."""
        return PublishError(Reason.BAD_SPEC, f"{self.where}: {key}: {why}", hint=hint or "see FORMAT.md §2, spec.toml")

    def take(self, key: str, check: Check, *default: Any) -> Any:
        """The checked value of `key`, or the default when it is absent and there is one."""
        if key not in self.raw:
            if default:
                return default[0]
            raise self.bad(key, "missing")
        try:
            return check(self.raw[key])
        except ValueError as e:
            raise self.bad(key, str(e)) from e

    def table(self, key: str, *keys: str) -> Table:
        """The table under `key`, empty when absent."""
        return Table(self.take(key, mapping, {}), f"{self.where}: [{key}]", keys)


def mapping(value: Any) -> dict[str, Any]:
    """A table."""
    if not isinstance(value, dict):
        raise ValueError("not a table")
    return value


def boolean(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("not true or false")
    return value


def text(limit: int) -> Check:
    """A printable text of 1 to `limit` characters."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= limit:
            raise ValueError(f"not a text of 1 to {limit} characters")
        if not value.isprintable():
            raise ValueError("holds characters that cannot be printed")
        return value

    return check


def choice(*allowed: str) -> Check:
    """One of `allowed`."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{value!r} is not one of {', '.join(dict.fromkeys(allowed))}")
        return value

    return check


def integer(low: int, high: int) -> Check:
    """A whole number within bounds."""

    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"not a whole number from {low} to {high}")
        return value

    return check


def number(low: float, high: float) -> Check:
    """A finite number within bounds."""

    def check(value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError("not a number")
        if not low <= value <= high:
            raise ValueError(f"not from {low:g} to {high:g}")
        return float(value)

    return check


def numbers(counts: tuple[int, ...], low: float, high: float) -> Check:
    """A list of as many numbers as one of `counts` says."""

    one = number(low, high)

    def check(value: Any) -> list[float]:
        if not isinstance(value, list) or len(value) not in counts:
            raise ValueError(f"not a list of {' or '.join(map(str, counts[:8]))} numbers")
        return [one(each) for each in value]

    return check


def list_of(item: Check, low: int, high: int) -> Check:
    """A list of `low` to `high` values that `item` passes."""

    def check(value: Any) -> list[Any]:
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise ValueError(f"not a list of {low} to {high} values")
        return [item(one) for one in value]

    return check
