"""What happens on the device, as telemetry and log: steps of updates, verdicts, frames without an answer, sources.

Nothing here decides or changes anything. Invariant: a frame is told as dropped only when its answer can no longer come.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from agent.daemon import report
from agent.daemon.lines import LineRuntime
from agent.daemon.selection import Verdict
from agent.daemon.sources import SourceRuntime
from agent.daemon.telemetry import Telemetry
from agent.daemon.updates import LastWords
from ota.client.ports import UpdateEvent

log = logging.getLogger(__name__)

SETTLE_S = 0.5


class News:
    """Hears of everything and passes it on.

    Args:
        lines: every line by name; it may be filled after the construction.
    """

    def __init__(self, telemetry: Telemetry, words: LastWords, lines: Mapping[str, LineRuntime]) -> None:
        self._telemetry = telemetry
        self._words = words
        self._lines = lines
        self._unsettled: dict[asyncio.TimerHandle, Callable[[], None]] = {}

    def updated(self, event: UpdateEvent) -> None:
        """A step of an update; see `ota.client.updater.Updater`."""
        self._words.add(event)
        level = logging.WARNING if event.reason else logging.INFO
        if event.outcome != "up_to_date":
            text = event.message or f"{event.line} {event.version} {event.state} {event.outcome or ''}"
            log.log(level, "update: %s", text, extra={"reason": event.reason.value if event.reason else ""})
            self._telemetry.event("update", report.event_facts(event), alarm=event.outcome is not None)

    def tried(self, line: str, version: str, verdicts: Sequence[Verdict]) -> None:
        """The verdicts of a trial."""
        self._telemetry.event("verdicts", report.verdict_facts(line, version, list(verdicts)))

    def dropped(self, line: str, seqs: list[int], reason: str) -> None:
        """Frames of `line` that its source gave up."""
        if reason not in ("worker_lost", "stopped"):
            self._telemetry.dropped(line, seqs, reason)
            return

        def settle() -> None:
            """A worker may be parted from the frame that it has answered, or answers yet: then the answer counts."""
            self._unsettled.pop(handle, None)
            lost = [seq for seq in seqs if not self._lines[line].answered(seq)]
            if lost:
                self._telemetry.dropped(line, lost, reason)

        # what the worker said is on its way through another socket
        handle = asyncio.get_running_loop().call_later(SETTLE_S, settle)
        self._unsettled[handle] = settle

    def settle(self) -> None:
        """Tell now what still waits for an answer, because none can come any more."""
        for handle, settle in list(self._unsettled.items()):
            handle.cancel()
            settle()

    def source_restarted(self, source: SourceRuntime) -> None:
        """A source came back with a new ring: its lines attach again."""
        self._telemetry.event("source_restarted", {"source": source.config.name, "restarts": source.restarts})
        for line in self._lines.values():
            if line.source is source:
                line.source_restarted()

    def source_state(self, source: SourceRuntime) -> None:
        """A source changed its state."""
        facts = {
            "source": source.config.name,
            "state": source.state,
            "reason": source.reason,
            "detail": source.detail,
        }
        self._telemetry.event("source", facts, alarm=source.state in ("stale", "reconnecting"))
