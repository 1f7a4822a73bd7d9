"""The `[[line]]` tables of `agent.toml`: which model looks at what, and how it is chosen and run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from agent.configtable import Table
from agent.profile import DELEGATES
from ota.release import LINE_PATTERN

OBJECTIVES = ("latency", "throughput", "memory", "power")
"""What a line's delegate may be chosen by."""
MAX_LINES = 7
"""Lines that may look at one source: it serves eight readers at once, and a line that is swapped has two."""


@dataclass(frozen=True, slots=True)
class LineConfig:
    """One model line and the source it looks at.

    `explore`: whether components that are not needed may be fetched to measure them (`never`, `unmetered`, `always`).
    `objective`, of `OBJECTIVES`, is what the delegate is chosen by; `fallback` whether a lower rung may stand
    in for one that failed (`allow`, `error`); hardware must run `min_coverage` of the graph's nodes, 0 to 1.
    `motion`: share of the picture that must change before the model looks at it, 0 to look at every frame; it looks at
    the latest every `refresh_s`. A line `on` another looks at what that finds, not at frames: at the first `boxes` of
    those labelled as in `only` (any when empty) with sides of at least `least_px`, grown by `margin` of them; its
    `source` is the other's. `memory_mb` is the most heap its worker may have, 0 for that of a trial; `fused` lets
    one process read the source and run the model.
    """

    name: str
    source: str
    threads: int
    explore: str
    delegates: tuple[str, ...]
    motion: float = 0.0
    refresh_s: float = 10.0
    objective: str = "latency"
    fallback: str = "allow"
    min_coverage: float = 0.9
    memory_mb: int = 0
    fused: bool = False
    on: str = ""
    only: tuple[str, ...] = ()
    margin: float = 0.1
    least_px: float = 8.0
    boxes: int = 16

    @property
    def crops(self) -> dict[str, Any] | None:
        """As a worker is told what to look at; None of a line that looks at whole frames."""
        told = {"labels": list(self.only), "margin": self.margin, "least_px": self.least_px, "most": self.boxes}
        return told if self.on else None


def parse_line(table: Table) -> LineConfig:
    """Check one `[[line]]` table.

    Raises:
        ConfigError: `bad_config`, naming the key.
    """
    name = table.text("name", None)
    if not LINE_PATTERN.fullmatch(name):
        raise table.bad(f"name {name!r} is not a line", "use a-z, 0-9 and -, at most 32 characters")
    line = LineConfig(
        name=name,
        source="" if table.has("on") else table.text("source", None),
        threads=int(table.number("threads", 1, 1, 64)),
        explore=table.choice("explore", "unmetered", ("never", "unmetered", "always")),
        delegates=table.choices("delegates", tuple(DELEGATES)),
        motion=table.number("motion", 0, 0, 1),
        refresh_s=table.number("refresh_s", 10, 0, 86400),
        objective=table.choice("objective", "latency", OBJECTIVES),
        fallback=table.choice("fallback", "allow", ("allow", "error")),
        min_coverage=table.number("min_coverage", 0.9, 0, 1),
        memory_mb=int(table.number("memory_mb", 0, 0, 1 << 20)),
        fused=table.flag("fused", False),
        on=table.text("on", ""),
        only=table.texts("only"),
        margin=table.number("margin", 0.1, 0, 2),
        least_px=table.number("least_px", 8, 1, 4096),
        boxes=int(table.number("boxes", 16, 1, 64)),
    )
    if line.on and table.has("source"):
        raise table.bad("a line on another has no source of its own", f"leave source out: it is that of {line.on!r}")
    table.finish()
    return line


def following(lines: tuple[LineConfig, ...], top: Table) -> tuple[LineConfig, ...]:
    """The lines, those on another with the other's source.

    Raises:
        ConfigError: `bad_config`: a line is on none, or on one that is on another itself; too many look at one source.
    """
    by_name = {line.name: line for line in lines}
    found = []
    for line in lines:
        if line.on:
            before = by_name.get(line.on)
            if before is None or before.on:
                known = [other.name for other in lines if not other.on]
                raise top.bad(f"line {line.name!r}: on {line.on!r} is not among {known}", "name a line with a source")
            line = replace(line, source=before.source)
        found.append(line)
        if sum(other.source == line.source for other in found) > MAX_LINES:
            raise top.bad(
                f"line {line.name!r}: source {line.source!r} has {MAX_LINES} lines already",
                "give the camera another [[source]] table for it, where its driver lets two read it",
            )
    return tuple(found)
