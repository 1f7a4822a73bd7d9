"""The `[[source]]` tables of `agent.toml`: which kinds there are, and the options of each.

What an option does is the business of the source's own module in `agent.worker.sources`, which checks it once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent.configtable import Table


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """One camera, file or sensor. `options` are checked here and handed to the source process as they are."""

    name: str
    kind: str
    options: Mapping[str, Any]


def parse_source(table: Table) -> SourceConfig:
    kind = table.choice("kind", None, ("video",))
    name = table.text("name", None)
    options = {
        "path": str(table.path("path", None)),
        "policy": table.choice("policy", "live", ("live", "every")),
        "loop": table.flag("loop", False),
        "queue_frames": int(table.number("queue_frames", 4, 1, 64)),
        "fps": table.number("fps", 0, 0, 1000),
    }
    table.finish()
    return SourceConfig(name, kind, options)
