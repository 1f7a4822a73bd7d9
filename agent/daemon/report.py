"""The status document: what `edge-agent status`, `/metrics` and the retained `reported` message show. Pure readers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from agent.daemon.keys import Trouble
from agent.daemon.lines import LineRuntime
from agent.daemon.selection import Verdict, rank
from agent.daemon.sources import SourceRuntime
from agent.daemon.telemetry import Telemetry
from agent.daemon.updates import LastWords
from ota.client.journal import Record
from ota.client.locks import LockView
from ota.client.ports import UpdateEvent
from ota.client.rest import DEVICE
from ota.client.settings import State as SettingsState
from ota.errors import Reason

_SEE_LOG = "why: journalctl -u edge-agent"


def source_status(source: SourceRuntime) -> dict[str, Any]:
    """State of one source."""
    opened = source.opened
    return {
        "state": source.state,
        "reason": source.reason,
        "detail": source.detail,
        "isolation": source.isolation,
        "frames": source.frames,
        "drops": dict(source.drops),
        "reconnects": source.reconnects,
        "restarts": source.restarts,
        "age_s": None if source.age_s is None else round(source.age_s, 1),
        "size": opened.size if opened else "",
        "fps": opened.fps if opened else 0.0,
        "measured_fps": round(source.fps, 1),
        **({"samples": dict(source.samples)} if source.samples else {}),
    }


def line_status(
    runtime: LineRuntime, record: Record, words: LastWords, telemetry: Telemetry, verdicts: list[Verdict], fps: float
) -> dict[str, Any]:
    """What serves one line, how fast, and how its last update went."""
    name = runtime.config.name
    serving = runtime.serving
    counts = telemetry.counts(name)
    stages = telemetry.stages_ms(name)
    installed = record.line(name).active
    served = serving.candidate.release if serving else None
    return {
        "version": served.version if served else "",
        "release_counter": served.release_counter if served else 0,
        "committed": installed.version if installed else "",
        "component": serving.verdict.component if serving else "",
        "delegate": serving.verdict.requested if serving else "",
        "worker_pid": serving.worker.pid if serving else 0,
        "fps": round(fps, 2),
        "results": runtime.results,
        "unchanged": runtime.unchanged,
        "rules": runtime.ruling.lasting() if runtime.ruling is not None else {},
        "dropped": {key.removeprefix("dropped_"): n for key, n in counts.items() if key.startswith("dropped_")},
        "restarts": runtime.restarts,
        "p50_ms": stages.get("latency", {}).get("p50", 0.0),
        "stages_ms": stages,
        "verdicts": [v.to_json() for v in verdicts],
        "update": update_status(name, record, words),
    }


def update_status(name: str, record: Record, words: LastWords) -> dict[str, Any]:
    """Where the line's update stands and how the last one ended."""
    ended, now = words.ended.get(name), words.now.get(name)
    waits = now is not None and now.outcome is None and now.reason in (Reason.METERED, Reason.OUTSIDE_WINDOW)
    return {
        "state": record.line(name).state.value,
        "version": record.line(name).pending_version,
        "waits_for": now.reason.value if now is not None and now.reason is not None and waits else "",
        "last_version": ended.version if ended else "",
        "outcome": ended.outcome if ended else "",
        "reason": ended.reason.value if ended and ended.reason else "",
        "message": ended.message if ended else "",
        "hint": ended.hint if ended else "",
    }


def lock_status(view: LockView) -> dict[str, Any]:
    """One resource that an update holds, and who waits for it."""
    return {
        "name": view.name,
        "owner": view.owner,
        "since_s": view.since_s,
        "timeout_s": view.timeout_s,
        "waiting": list(view.waiting),
    }


def owner_status(delegate: str, runtime: LineRuntime) -> dict[str, Any]:
    """A delegate for one process alone, and the line that serves on it for as long as it likes."""
    since_s = round(time.monotonic() - runtime.serving.since, 1) if runtime.serving else 0.0
    return {"name": delegate, "owner": runtime.config.name, "since_s": since_s, "timeout_s": 0.0, "waiting": []}


def conditions(
    lines: Mapping[str, LineRuntime],
    sources: Mapping[str, SourceRuntime],
    record: Record,
    link: Mapping[str, Any],
    words: LastWords,
) -> list[dict[str, str]]:
    """What a person should know and do something about; empty when all is well."""
    found = []
    for name, source in sources.items():
        if source.state not in ("streaming", "ended"):
            text = f"source {name} is {source.state}" + (f": {source.detail}" if source.detail else "")
            found.append(_condition("SourceStreaming", "False", source.reason or source.state, text))
    for name, runtime in lines.items():
        if runtime.serving is None and runtime.lent:
            text = f"line {name} makes room for a trial on what it serves on; it serves again by itself"
            found.append(_condition("LineServing", "False", "lent", text))
        elif runtime.serving is None:
            text = "publish and grant a release" if record.line(name).active is None else _SEE_LOG
            found.append(_condition("LineServing", "False", "no_release", f"line {name} serves nothing; {text}"))
        elif runtime.serving.worker.exited.done():
            reason = runtime.serving.worker.exited.result().reason.value
            found.append(_condition("LineServing", "False", reason, f"line {name} is being started again; {_SEE_LOG}"))
    if link["state"] not in ("connected", "offline by configuration"):
        found.append(_condition("LinkConnected", "False", link.get("reason") or link["state"], link.get("message", "")))
    device = words.now.get(DEVICE)
    if device is not None and device.reason is not None:
        text = f"{device.message}; {device.hint}" if device.hint else device.message
        found.append(_condition("MetadataFresh", "False", device.reason.value, text))
    if record.settings.state is not SettingsState.IDLE:
        text = f"settings {record.settings.trial[:12]} are on trial and end by themselves; edge-agent config show"
        found.append(_condition("SettingsProved", "False", "on_trial", text))
    return found


def key_conditions(troubles: Iterable[Trouble]) -> list[dict[str, str]]:
    """What is wrong with this device's keys since it started."""
    return [_condition("KeysAvailable", "False", t.reason, f"{t.message}; {t.hint}") for t in troubles]


def event_facts(event: UpdateEvent) -> dict[str, Any]:
    """An update event as telemetry: flat, without empty fields."""
    facts: dict[str, Any] = {
        "line": event.line,
        "version": event.version,
        "state": event.state,
        "outcome": event.outcome,
        "reason": event.reason.value if event.reason else None,
        "message": event.message,
        "attempt": event.attempt,
    }
    traffic = event.traffic
    facts["traffic"] = {key: getattr(traffic, key) for key in traffic.__slots__}
    if event.tested is not None:
        facts["delegate"], facts["component"] = event.tested.delegate, event.tested.component
        facts["p50_ms"], facts["p95_ms"] = round(event.tested.p50_ms, 3), round(event.tested.p95_ms, 3)
    if event.probation is not None:
        facts["probation"] = {
            "inferences": event.probation.inferences,
            "seconds": round(event.probation.seconds, 2),
            "synthetic": event.probation.synthetic,
        }
    return {key: value for key, value in facts.items() if value not in (None, "")}


def verdict_facts(line: str, version: str, verdicts: list[Verdict]) -> dict[str, Any]:
    """Verdicts of one trial as telemetry: the choice first."""
    ordered = [*rank(verdicts), *(v for v in verdicts if not v.passed)]
    rows = [
        {
            "delegate": v.requested, "component": v.component, "min_ms": round(v.min_ms, 3),
            "p50_ms": round(v.p50_ms, 3), "p95_ms": round(v.p95_ms, 3), "rss_bytes": v.rss_bytes,
            "coverage": v.coverage, "runtime": v.runtime, "reason": v.reason, "message": v.message[:200],
        }
        for v in ordered
    ]  # fmt: skip
    return {"line": line, "version": version, "verdicts": rows}


def _condition(kind: str, status: str, reason: str, message: str) -> dict[str, str]:
    return {"type": kind, "status": status, "reason": reason, "message": message}
