"""How the device is: the status document, what of it is reported to the fleet, and the figures sent with metrics.

Reads the parts and changes none. How each part's section looks is `agent.daemon.report`'s.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.daemon import report
from agent.daemon.fetching import Fetching
from agent.daemon.governor import Governor
from agent.daemon.hosting import ModelHost
from agent.daemon.keys import KeyProvider, OpenKeys
from agent.daemon.lifecycle import Lifecycle
from agent.daemon.lines import LineRuntime
from agent.daemon.link import Link
from agent.daemon.sources import SourceRuntime
from agent.daemon.supervisor import Supervisor
from agent.daemon.telemetry import Telemetry
from agent.daemon.updates import LastWords
from ota.client.updater import Updater

FPS_WINDOW_TICKS = 5


@dataclass(frozen=True)
class Observed:
    """The parts whose state the document shows, and who this device is (`about`: id, tenant, profile …)."""

    about: Mapping[str, str]
    supervisor: Supervisor
    provider: KeyProvider
    link: Callable[[], Link | None]
    sources: Mapping[str, SourceRuntime]
    lines: Mapping[str, LineRuntime]
    host: ModelHost
    updater: Updater
    words: LastWords
    telemetry: Telemetry
    keys: OpenKeys
    lifecycle: Lifecycle
    fetching: Fetching
    governor: Governor


class Status:
    """The daemon's account of itself. `tick` is called once in `tick_s`."""

    def __init__(self, observed: Observed, *, tick_s: float) -> None:
        self._observed = observed
        self._tick_s = tick_s
        self._started = time.monotonic()
        self._history: dict[str, list[int]] = {name: [] for name in observed.lines}

    def tick(self) -> None:
        """Note how many results each line has given, for its frame rate."""
        for name, line in self._observed.lines.items():
            self._history[name] = [*self._history[name][-FPS_WINDOW_TICKS:], line.results]

    def document(self) -> dict[str, Any]:
        """The status document."""
        parts = self._observed
        record = parts.updater.record
        link = self._link()
        return {
            "device": dict(parts.about),
            "isolation": parts.supervisor.isolation,
            "custody": {
                "kind": parts.provider.custody,
                "sealed_to": parts.provider.sealed_to,
                "worth": parts.provider.worth,
            },
            "link": link,
            "certificate": parts.lifecycle.status(),
            "sources": {name: report.source_status(source) for name, source in parts.sources.items()},
            "lines": {
                name: report.line_status(
                    line, record, parts.words, parts.telemetry, parts.host.verdicts(name), self._fps(name)
                )
                | {"selection": parts.host.selection(name)}
                for name, line in parts.lines.items()
            },
            "fetching": parts.fetching.status(),
            "governor": parts.governor.status(),
            "locks": [
                *(report.lock_status(view) for view in parts.updater.locks()),
                *(report.owner_status(name, parts.lines[line]) for name, line in parts.host.owners().items()),
            ],
            "conditions": [
                *report.key_conditions(parts.keys.troubles),
                *parts.lifecycle.conditions(),
                *parts.governor.conditions(),
                *report.conditions(parts.lines, parts.sources, record, link, parts.words),
            ],
            "process": {
                "pid": os.getpid(),
                "rss_bytes": resident_bytes(),
                "uptime_s": round(time.monotonic() - self._started, 1),
            },
        }

    def reported(self) -> dict[str, Any]:
        """The retained document: what changes rarely and an operator filters by."""
        status = self.document()
        line_keys = ("version", "committed", "component", "delegate", "update")
        return {
            "v": 1,
            "device": {key: status["device"][key] for key in ("id", "profile", "agent")},
            "isolation": status["isolation"],
            "custody": status["custody"]["kind"],
            "lines": {name: {key: line[key] for key in line_keys} for name, line in status["lines"].items()},
            "conditions": [c for c in status["conditions"] if c["type"] != "LinkConnected"],
        }

    def figures(self) -> dict[str, Any]:
        """What goes with the lines' metrics."""
        link = self._observed.link()
        return {
            "rss_bytes": resident_bytes(),
            "cpu_s": round(time.process_time(), 2),
            "load": os.getloadavg()[0],
            "bytes": self._observed.fetching.with_https(link.bytes_by_purpose() if link else {}),
            "lost": self._observed.telemetry.lost,
        }

    def _link(self) -> dict[str, Any]:
        link = self._observed.link()
        if link is None:
            if self._observed.keys.tls is None:
                text = "this device has no TLS key to connect with"
                return {"state": "no_key", "message": text, "bytes": {}, "broker": ""}
            return {"state": "offline by configuration", "message": "", "bytes": {}, "broker": ""}
        return link.status()

    def _fps(self, name: str) -> float:
        history = self._history[name]
        return (history[-1] - history[0]) / ((len(history) - 1) * self._tick_s) if len(history) > 1 else 0.0


def resident_bytes() -> int:
    """Resident memory of this process (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def boot_id() -> str:
    """The kernel's id of this boot; a random one where there is none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return secrets.token_hex(16)
