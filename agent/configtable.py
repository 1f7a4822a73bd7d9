"""Typed access to one table of `agent.toml`: every miss names the key, what is allowed, and the nearest known word.

It knows no key of its own; `agent.config` and `agent.sourceconfig` ask for theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.errors import ConfigError, Reason


class Table:
    """Typed access to one TOML table that remembers which keys were asked for."""

    def __init__(self, data: Mapping[str, Any], where: str, base: Path) -> None:
        self._data = data
        self._where = where
        self._base = base
        self._known: set[str] = set()

    def bad(self, why: str, hint: str) -> ConfigError:
        return ConfigError(Reason.BAD_CONFIG, f"{self._where}: {why}", hint=hint)

    def _get(self, key: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        self._known.add(key)
        value = self._data.get(key, default)
        if value is None:
            # a misspelt key explains a missing one
            for near in _close(key, [k for k in self._data if k not in self._known]):
                raise self.bad(f"unknown key {near!r}", f"did you mean {key!r}?")
            raise self.bad(f"{key} is missing", f"add {key} = …, {what}")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            # what lies in a list or table may be an address with its password
            shown = "[…]" if isinstance(value, (list, dict)) else repr(value)
            raise self.bad(f"{key} = {shown} is not {what}", "see docs/reference/config.md")
        return value

    def has(self, key: str) -> bool:
        self._known.add(key)
        return key in self._data

    def text(self, key: str, default: str | None) -> str:
        value = str(self._get(key, default, (str,), "a text"))
        if "\0" in value:
            raise self.bad(f"{key} holds a NUL character", "take it out")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._get(key, [], (list,), "a list of texts")
        for item in value:
            if not isinstance(item, str):
                raise self.bad(f"{key}: {item!r} is not a text", "write every one in quotation marks")
        return tuple(value)

    def choices(self, key: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
        value = self._get(key, [], (list,), "a list of texts")
        for item in value:
            if item not in allowed:
                raise self.bad(f"{key}: {item!r} is not one of {', '.join(allowed)}", _nearest(str(item), allowed))
        return tuple(value)

    def parsed(self, key: str, parse: Callable[[str], object]) -> list[str]:
        """A list of texts, each of which `parse` takes without a ValueError."""
        value = self._get(key, [], (list,), "a list of texts")
        for item in value:
            try:
                parse(str(item))
            except ValueError as e:
                raise self.bad(f"{key}: {e}", "see docs/reference/config.md") from e
        return [str(item) for item in value]

    def pairs(self, key: str) -> tuple[tuple[float, float], ...]:
        """A list of pairs of numbers, such as the corners of a polygon."""
        value = self._get(key, [], (list,), "a list of [x, y]")
        for item in value:
            fits = isinstance(item, list) and len(item) == 2
            if not fits or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in item):
                raise self.bad(f"{key}: {item!r} is not a pair of numbers", "write [[0.1, 0.2], [0.9, 0.2], …]")
        return tuple((float(x), float(y)) for x, y in value)

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._get(key, default, (bool,), "true or false"))

    def number(self, key: str, default: float | None, low: float, high: float) -> float:
        value = self._get(key, default, (int, float), "a number")
        # compared as it stands: an integer may be too large to become a float
        if not low <= value <= high:
            shown = str(value)[:40]
            raise self.bad(f"{key} = {shown} is not between {low:g} and {high:g}", "choose a value in that range")
        return float(value)

    def choice(self, key: str, default: str | None, allowed: tuple[str, ...]) -> str:
        value = self.text(key, default)
        if value not in allowed:
            raise self.bad(f"{key} = {value!r} is not one of {', '.join(allowed)}", _nearest(value, allowed))
        return value

    def path(self, key: str, default: str | None) -> Path:
        return (self._base / self.text(key, default)).absolute()

    def table(self, key: str) -> Table:
        return Table(self._get(key, {}, (dict,), "a table"), f"{self._where}: [{key}]", self._base)

    def tables(self, key: str) -> list[Table]:
        value = self._get(key, [], (list,), "a list of tables")
        if not all(isinstance(item, dict) for item in value):
            raise self.bad(f"{key} is not a list of tables", f"write [[{key}]]")
        return [Table(item, f"{self._where}: [[{key}]] {i + 1}", self._base) for i, item in enumerate(value)]

    def finish(self) -> None:
        """Refuse keys nobody asked for."""
        for key in self._data:
            if key not in self._known:
                raise self.bad(f"unknown key {key!r}", _nearest(key, tuple(sorted(self._known))))


def _nearest(word: str, allowed: tuple[str, ...]) -> str:
    close = _close(word, allowed)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(allowed)}"


def _close(word: str, allowed: Sequence[str]) -> list[str]:
    """The word that was meant, if there is one like it."""
    import difflib  # memory that a daemon with a good configuration does not need

    return difflib.get_close_matches(word, allowed, n=1)
