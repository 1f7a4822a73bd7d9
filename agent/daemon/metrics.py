"""The status document as Prometheus text: one pure function, no registry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_HELP = {
    "edge_up": "1 while the daemon runs",
    "edge_resident_bytes": "resident memory of the daemon",
    "edge_link_connected": "1 while the broker is connected",
    "edge_link_bytes_total": "bytes over the link by purpose and direction",
    "edge_source_frames_total": "frames a source has captured",
    "edge_source_streaming": "1 while a source delivers frames",
    "edge_source_restarts_total": "restarts of a source process",
    "edge_source_reconnects_total": "how often a lost source was found again without a restart",
    "edge_source_fps": "frames a second that a source delivers",
    "edge_line_results_total": "frames answered",
    "edge_line_unchanged_total": "frames that the motion gate kept from the model",
    "edge_line_dropped_total": "frames dropped, by reason",
    "edge_line_restarts_total": "restarts of a model worker",
    "edge_line_info": "release and delegate that serve a line",
    "edge_stage_ms": "time of a stage of one frame, by quantile",
    "edge_governor_level": "rungs of the governor's ladder that are taken, 0 at full rate",
    "edge_temperature_celsius": "temperature of the hottest thermal zone",
    "edge_cpu_pressure_percent": "share of the last ten seconds in which a task waited for a processor",
    "edge_board_watts": "what the board's own power meter reads",
}
_VITALS = {
    "edge_temperature_celsius": "temperature_c",
    "edge_cpu_pressure_percent": "pressure_percent",
    "edge_board_watts": "power_w",
}
_COUNTERS = {name for name in _HELP if name.endswith("_total")}


def render(status: Mapping[str, Any]) -> str:
    """`status` (as `agent.app` builds it) in the text exposition format, version 0.0.4."""
    samples: dict[str, list[tuple[dict[str, str], float]]] = {name: [] for name in _HELP}
    samples["edge_up"].append(({}, 1))
    samples["edge_resident_bytes"].append(({}, status["process"]["rss_bytes"]))
    samples["edge_link_connected"].append(({}, status["link"]["state"] == "connected"))
    for purpose, flow in status["link"]["bytes"].items():
        for direction, count in flow.items():
            samples["edge_link_bytes_total"].append(({"purpose": purpose, "direction": direction}, count))
    for name, source in status["sources"].items():
        labels = {"source": name}
        samples["edge_source_frames_total"].append((labels, source["frames"]))
        samples["edge_source_streaming"].append((labels, source["state"] == "streaming"))
        samples["edge_source_restarts_total"].append((labels, source["restarts"]))
        samples["edge_source_reconnects_total"].append((labels, source["reconnects"]))
        samples["edge_source_fps"].append((labels, source["measured_fps"]))
    for name, line in status["lines"].items():
        labels = {"line": name}
        samples["edge_line_results_total"].append((labels, line["results"]))
        samples["edge_line_unchanged_total"].append((labels, line["unchanged"]))
        samples["edge_line_restarts_total"].append((labels, line["restarts"]))
        info = {"version": line["version"], "delegate": line["delegate"], "component": line["component"]}
        samples["edge_line_info"].append(({**labels, **info}, 1))
        for reason, count in line["dropped"].items():
            samples["edge_line_dropped_total"].append(({**labels, "reason": reason}, count))
        for stage, figures in line["stages_ms"].items():
            for quantile, value in figures.items():
                share = f"0.{quantile[1:]}"
                samples["edge_stage_ms"].append(({**labels, "stage": stage, "quantile": share}, value))
    if "governor" in status:  # a revoked device has none
        samples["edge_governor_level"].append(({}, status["governor"]["level"]))
        vitals = status["governor"]["vitals"]
        for name, key in _VITALS.items():
            if vitals[key] is not None:
                samples[name].append(({}, vitals[key]))
    return "".join(_family(name, rows) for name, rows in samples.items() if rows)


def _family(name: str, rows: Iterable[tuple[Mapping[str, str], float]]) -> str:
    kind = "counter" if name in _COUNTERS else "gauge"
    lines = [f"# HELP {name} {_HELP[name]}", f"# TYPE {name} {kind}"]
    for labels, value in rows:
        text = ",".join(f'{key}="{_escape(label)}"' for key, label in labels.items())
        lines.append(f"{name}{{{text}}} {float(value):.10g}" if text else f"{name} {float(value):.10g}")
    return "\n".join(lines) + "\n"


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
