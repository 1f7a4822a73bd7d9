"""The last verdicts of each line, kept across restarts so that a line serves at once on what was measured before.

A verdict holds for the bytes of a model on one delegate under one runtime, driver, profile and thread count. Profile
and threads are known before anything loads and are compared here; runtime and driver are told by the worker that
serves, and whoever serves compares them then (`stale`). A damaged file only costs a new trial.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from agent.daemon.selection import Verdict, rank
from agent.errors import Reason
from ota import strictjson
from ota.errors import OtaError

log = logging.getLogger(__name__)

NAME = "verdicts.json"
MAX_KEPT = 32
MAX_BYTES = 1 << 20
_KINDS: Mapping[Any, type] = {"str": str, "float": float, "int": int}


class Verdicts:
    """Args:
    folder: where they lie.
    write: durable write of (name under the state directory, bytes).
    profile: the device profile in use.
    """

    def __init__(self, folder: Path, write: Callable[[str, bytes], None], profile: str) -> None:
        self.write = write
        self._profile = profile
        self._kept = _load(folder / NAME)

    def of(self, line: str) -> list[Verdict]:
        """The last verdicts on every component of `line`; empty before the first trial."""
        kept = self._kept.get(line, [])
        newest: dict[str, str] = {}
        for verdict in kept:
            newest.setdefault(verdict.component, verdict.model)
        return [v for v in kept if v.model == newest[v.component]]

    def about(self, line: str, models: Collection[str]) -> list[Verdict]:
        """All that is known of the files whose SHA-256 is one of `models`."""
        return [v for v in self._kept.get(line, []) if v.model in models]

    def find(self, line: str, component: str, model: str, delegate: str) -> Verdict:
        """What is known of one file on one delegate; a verdict without figures where nothing is."""
        for verdict in self._kept.get(line, []):
            if (verdict.model, verdict.requested) == (model, delegate):
                return verdict
        return Verdict(component, delegate, model=model)

    def best(self, line: str, model: str, ladder: Collection[str], threads: int, objective: str) -> Verdict | None:
        """The best for `objective` on a delegate of `ladder` that still holds as far as can be told without loading."""
        for verdict in rank(self.about(line, (model,)), objective):
            if verdict.requested not in ladder:
                continue
            held, now = (verdict.profile, verdict.threads), (self._profile, threads)
            if held != now:
                log.info("line %s: the verdict on %s is of profile %s with %d threads and is not used: now %s with %d",
                         line, verdict.requested, *held, *now)  # fmt: skip
                continue
            return verdict
        return None

    def stamp(self, verdicts: Sequence[Verdict], models: dict[str, str], threads: int) -> list[Verdict]:
        """`verdicts` with all that they hold for; `models` gives the SHA-256 of each component."""
        return [replace(v, model=models[v.component], profile=self._profile, threads=threads) for v in verdicts]

    def keep(self, line: str, verdicts: Sequence[Verdict]) -> None:
        """A trial says nothing new about other files, the release before among them: their older verdicts stay, and so
        do those on delegates that it did not try."""
        tried = {(v.model, v.requested) for v in verdicts}
        older = [v for v in self._kept.get(line, []) if (v.model, v.requested) not in tried]
        self._kept[line] = [*verdicts, *older][:MAX_KEPT]
        document = {name: [v.to_json() for v in kept] for name, kept in self._kept.items()}
        try:
            self.write(NAME, json.dumps(document, indent=1).encode())
        except OtaError as e:
            log.warning("verdicts are not kept: %s", e.message, extra={"reason": e.reason.value})


def stale(verdict: Verdict, runtime: str, driver: str) -> str:
    """Why `verdict` does not hold where a worker says `runtime` and `driver`, if it does not."""
    if not verdict.runtime:
        return ""
    changed = [
        f"{before or 'no driver'} is now {now or 'none'}"
        for before, now in ((verdict.runtime, runtime), (verdict.driver, driver))
        if before != now
    ]
    return ", ".join(changed)


def _load(path: Path) -> dict[str, list[Verdict]]:
    try:
        data = strictjson.loads(path.read_bytes(), max_bytes=MAX_BYTES, what=path.name)
        return {line: [_verdict(item) for item in items] for line, items in data.items()}
    except FileNotFoundError:
        return {}
    except (OSError, OtaError, TypeError, AttributeError, ValueError) as e:
        log.warning("%s is unreadable and will be made anew: %s", path, e)
        return {}


def _verdict(item: dict[str, Any]) -> Verdict:
    """One that was kept, perhaps by another version of this program.

    Raises:
        TypeError, ValueError: it is none that this version can judge by.
    """
    verdict = Verdict(**item)
    for field in fields(Verdict):
        value = getattr(verdict, field.name)
        if type(value) is not _KINDS[field.type] and not (field.type == "float" and type(value) is int):
            raise TypeError(f"{field.name} is {value!r:.40}")
    if verdict.reason:
        Reason(verdict.reason)
    return verdict
