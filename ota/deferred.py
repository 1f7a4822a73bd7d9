"""Modules that a dependency imports and never uses for us, kept unloaded until somebody does use them.

A dependency that imports the world at its top makes a small daemon large, and cannot be changed from here. Within
`deferred` it gets a stand-in, which imports the module when anything of it is asked for. Not for our own imports: those
stand in the function that needs them. Invariants: everybody outside the block imports the module as ever; whoever holds
the stand-in gets the module's own attributes. What each use saves: docs/decisions/0017-memory-of-the-daemon.md.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_lock = threading.Lock()


class _StandIn(ModuleType):
    """Forwards every attribute to the module whose name it has."""

    def __getattr__(self, attribute: str) -> Any:
        _take_away(self)
        return getattr(importlib.import_module(self.__name__), attribute)


@contextmanager
def deferred(*names: str) -> Iterator[None]:
    """Modules imported inside the block that import one of `names` load it at its first use instead.

    A name that is loaded already is left alone, and one whose parent package does not exist. The parent of a dotted
    name is imported.
    """
    stand_ins = [stand_in for name in names if name not in sys.modules and (stand_in := _put(name)) is not None]
    try:
        yield
    finally:
        for stand_in in stand_ins:
            _take_away(stand_in)


def _put(name: str) -> _StandIn | None:
    stand_in = _StandIn(name)
    parent, _, leaf = name.rpartition(".")
    if parent:
        try:
            package = importlib.import_module(parent)
        except ModuleNotFoundError:  # another version of the dependency
            return None
        if name in sys.modules:
            return None  # the parent uses it itself
        # `import a.b` binds a, and finds b as its attribute
        setattr(package, leaf, stand_in)
    sys.modules[name] = stand_in
    return stand_in


def _take_away(stand_in: _StandIn) -> None:
    with _lock:  # else a second thread could take away the module that a first one has begun to import
        if sys.modules.get(stand_in.__name__) is stand_in:
            del sys.modules[stand_in.__name__]
