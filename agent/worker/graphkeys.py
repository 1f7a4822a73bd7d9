"""Typed access to the objects of a release's `graph`: one method for each kind of value, every miss names its key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from agent.errors import ModelError, Reason

_HINT = "build the release again"


class Keys:
    """One object of the graph. Unknown keys are ignored: signed metadata may say more than this version knows.

    Raises:
        ModelError: `model_unloadable` by every method, naming the key.
    """

    def __init__(self, value: Any, where: str) -> None:
        self._where = where
        if not isinstance(value, Mapping):
            raise ModelError(Reason.MODEL_UNLOADABLE, f"{where} is not an object", hint=_HINT)
        self.value: Mapping[str, Any] = value

    def bad(self, key: str, why: str) -> ModelError:
        """The error of `key`."""
        return ModelError(Reason.MODEL_UNLOADABLE, f"{self._where}.{key}: {why}", hint=_HINT)

    def inner(self, key: str) -> Keys:
        """The object under `key`, empty when absent."""
        return Keys(self.value.get(key, {}), f"{self._where}.{key}")

    def names(self) -> tuple[str, ...]:
        """Every key there is."""
        return tuple(str(key) for key in self.value)

    def choice(self, key: str, known: tuple[str, ...], default: str) -> str:
        """One of `known`."""
        value = self.value.get(key, default)
        if value not in known:
            raise self.bad(key, f"{str(value)[:40]!r} is not one of {', '.join(known)}")
        return str(value)

    def text(self, key: str, limit: int, default: str) -> str:
        """A text of at most `limit` characters."""
        value = self.value.get(key, default)
        if not isinstance(value, str) or len(value) > limit:
            raise self.bad(key, f"not a text of at most {limit} characters")
        return value

    def texts(self, key: str, limit: int, longest: int) -> tuple[str, ...]:
        """At most `limit` texts, each cut to `longest` characters."""
        value = self.value.get(key, [])
        if not isinstance(value, list) or len(value) > limit or not all(isinstance(v, str) for v in value):
            raise self.bad(key, f"not a list of at most {limit} texts")
        return tuple(text[:longest] for text in value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.value.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, "not true or false")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number; required without a default."""
        value = self.value.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.bad(key, f"not an integer from {low} to {high}")
        return value

    def share(self, key: str, default: float) -> float:
        """A number from 0 to 1."""
        return self.number(key, 0, 1, default)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number; required without a default."""
        value: Any = self.value.get(key, default)
        if not _is_number(value) or not low <= value <= high:
            raise self.bad(key, f"not a number from {low:g} to {high:g}")
        return float(value)

    def numbers(
        self,
        key: str,
        default: tuple[float, ...],
        *,
        positive: bool = False,
        counts: tuple[int, ...] = (1, 3),
    ) -> tuple[float, ...]:
        """As many finite numbers as one of `counts` says."""
        value = self.value.get(key, list(default))
        if not isinstance(value, list) or len(value) not in counts or not all(map(_is_number, value)):
            raise self.bad(key, f"not a list of {' or '.join(map(str, counts[:8]))} numbers")
        if positive and min(value, default=1) <= 0:
            raise self.bad(key, "not positive")
        return tuple(float(item) for item in value)

    def some_numbers(self, key: str, limit: int) -> tuple[float, ...]:
        """1 to `limit` finite numbers, or one number without a list; required."""
        value: Any = self.value.get(key)
        items: list[Any] = value if isinstance(value, list) else [value]
        if not 0 < len(items) <= limit or not all(map(_is_number, items)):
            raise self.bad(key, f"not 1 to {limit} numbers")
        return tuple(float(item) for item in items)


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold: JSON integers have no end."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 63
