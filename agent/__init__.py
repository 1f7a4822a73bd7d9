"""The edge runtime agent: how authentic models run on this board."""

from __future__ import annotations

from ota import BUILT

__version__ = "0.1.0"
RELEASED = BUILT.date()
"""A day before which this version was not made: a clock that shows an earlier one is wrong."""
