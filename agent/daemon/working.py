"""Whether the daemon's parts work: what settings on trial are measured by. It looks and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agent.daemon.lines import LineRuntime
from agent.daemon.link import Link
from agent.daemon.sources import SourceRuntime


@dataclass(frozen=True)
class Working:
    """The parts of the daemon that have to work with new settings as they did before, named `link`, `source NAME` and
    `line NAME`.

    Attributes:
        committed: whether a line has a release to serve; without one its source gives no frames.
        busy: whether an update is under way.
        paused: why the governor has paused all sources, empty while it has not.
    """

    link: Callable[[], Link | None]
    sources: Mapping[str, SourceRuntime]
    lines: Mapping[str, LineRuntime]
    committed: Callable[[str], bool]
    busy: Callable[[], bool]
    paused: Callable[[], str]

    def holds(self, what: str, *, excused: bool) -> bool:
        """Whether `what` works. An open source that gives no frame does where that is `excused`."""
        kind, _, name = what.partition(" ")
        if kind == "link":
            link = self.link()
            return link is not None and link.connected
        if kind == "source":
            return self._streams(name, excused)
        line = self.lines.get(name)
        return line is not None and line.serving is not None and not line.serving.worker.exited.done()

    def why(self, what: str) -> str:
        """What keeps `what` from working, for people."""
        kind, _, name = what.partition(" ")
        link, source = self.link(), self.sources.get(name)
        if kind == "link" and link is not None:
            status = link.status()
            return f"the link is {status['state']} {status['reason'] or ''} {status['message']}".rstrip()
        if kind == "source" and source is not None:
            paused = self.paused() if source.opened is not None else ""
            why = f"paused by the governor: {paused}" if paused else f"{source.reason} {source.detail}"
            return f"{what} is {source.state} {why}".rstrip()
        return f"{what} does not work"

    def _streams(self, name: str, excused: bool) -> bool:
        source = self.sources.get(name)
        if source is None:
            return False
        if source.state in ("streaming", "ended"):
            return True
        # the clock of a source starts with its first reader
        read_by = [line for line in self.lines.values() if line.source is source]
        idle = excused or not any(self.committed(line.config.name) for line in read_by)
        return idle and source.state == "opening" and source.opened is not None
