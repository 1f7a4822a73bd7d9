"""Boots what cuts may leave of a scene, all of it or a stated sample, and counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.memory import Durable, Possibilities
from tests.crash.scene import Scene

SEED = 20


@dataclass
class Survey:
    """What became of one scene.

    Attributes:
        cuts: moments at which the power went; exhaustive: those of which every state was looked at.
        possible: states that the cuts may leave, alike ones counted each time.
        looked_at: states looked at; booted: those among them that differ.
    """

    name: str
    cuts: int = 0
    exhaustive: int = 0
    possible: int = 0
    looked_at: int = 0
    booted: int = 0
    violations: list[str] = field(default_factory=list)

    def row(self) -> str:
        """One line of the table under `HEADING`."""
        return (
            f"{self.name:24}{self.cuts:6}{self.exhaustive:12}{self.possible:14}{self.looked_at:11}{self.booted:9}"
            f"{len(self.violations):12}"
        )


HEADING = f"{'scene':24}{'cuts':>6}{'exhaustive':>12}{'possible':>14}{'looked at':>11}{'booted':>9}{'violations':>12}"


def survey(scene: Scene, bound: int, *, every: int = 1, first: bool = False) -> Survey:
    """Look at up to `bound` states of every (`every`-th) cut of a recorded scene; with `first` up to a violation, from
    the last cut on, when most has been promised."""
    found = Survey(scene.name)
    seen: set[object] = set()
    last = len(scene.moments) - 1
    for number, moment in reversed([*enumerate(scene.moments)]) if first else enumerate(scene.moments):
        if number % every and number != last:
            continue
        possible = Possibilities(moment.disk)
        found.cuts += 1
        found.possible += possible.count
        found.exhaustive += possible.count <= bound
        for picks in possible.picks(bound, SEED + number):
            found.looked_at += 1
            facts = (id(moment.record), moment.committed, moment.done, moment.fetched_bytes)
            known = (possible.disk(picks).fingerprint(), facts)
            if known in seen:
                continue
            seen.add(known)
            found.booted += 1
            problem = scene.judge(moment, picks, possible)
            if problem:
                found.violations.append(f"{scene.name}: cut {number} of {last}, state {picks}: {problem}")
                if first:
                    return found
    return found


def mutated(make: Callable[[Path], Scene], folder: Path, lies: Durable, bound: int) -> str:
    """The first complaint about a scene in which `lies` is left out; empty when nothing notices."""
    scene = make(folder)
    try:
        scene.record(lies)
    except AssertionError as e:
        return f"{scene.name}: {e}"
    found = survey(scene, bound, first=True)
    return found.violations[0] if found.violations else ""
