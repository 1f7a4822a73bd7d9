"""Leaves out each durable call in turn: every fsync must be missed by some scene, or it is not needed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.crash import scenes
from tests.crash.memory import Durable
from tests.crash.scene import Maker
from tests.crash.survey import mutated

# who notices, and how many states of a cut it may take; the other scenes are asked when these do not
_FIRST: dict[str, tuple[Maker, int]] = {
    "inbox": (scenes.download, 24),
    "state/record.committed": (scenes.rotten_records, 2),
    "trust": (scenes.first_install, 2),
}


@dataclass(frozen=True)
class Missed:
    """What happened when one durable call was left out; `complaint` is empty when nothing noticed."""

    lies: Durable
    calls: int
    scene: str
    complaint: str

    def row(self) -> str:
        """One line of a table."""
        call, kind = self.lies
        return f"{call:10}{kind:24}{self.calls:6}  {self.scene or 'NOTHING FAILS':22}{self.complaint}"


def durable_calls(folder: Path) -> dict[Durable, tuple[int, list[Maker]]]:
    """Every kind of durable call that the scenes make, how often, and the scenes that make it."""
    counts: Counter[Durable] = Counter()
    makers: dict[Durable, list[Maker]] = {}
    for make in scenes.SCENES:
        scene = make(_empty(folder / make.__name__)).record()
        counts.update(scene.disk.synced)
        for lies in scene.disk.synced:
            makers.setdefault(lies, []).append(make)
    return {lies: (counts[lies], makers[lies]) for lies in sorted(counts)}


def missed(lies: Durable, calls: int, makers: list[Maker], bound: int, folder: Path) -> Missed:
    """Leave `lies` out of one scene after the other until one fails."""
    likely = [hint for prefix, hint in _FIRST.items() if lies[1].startswith(prefix) and hint[0] in makers]
    for number, (make, states) in enumerate([*likely, *((make, bound) for make in makers)]):
        complaint = mutated(make, _empty(folder / "-".join(lies).replace("/", "_") / str(number)), lies, states)
        if complaint:
            return Missed(lies, calls, make.__name__, complaint.partition(": ")[2].rpartition("): ")[2][:80])
    return Missed(lies, calls, "", "")


def _empty(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
