"""`edge-agent bench MODEL`: the delegates of this board beside each other, as a table with bars, a picture, or JSON.

It measures through `agent.workbench`, as a trial on a device does, and chooses as a line with that objective would.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from agent import workbench
from agent.daemon.selection import Verdict, figure, rank
from agent.errors import AgentError, Reason
from agent.screen import printable

# the best one's bar, and where a much longer one is cut off
UNIT_CELLS = 2
MOST_CELLS = 24
UNITS = {"latency": ("ms", 1.0), "throughput": ("ms", 1.0), "memory": ("MB", 1e-6), "power": ("CPU ms", 1.0)}


def run(args: argparse.Namespace, ladder: Sequence[str], graph: Mapping[str, Any], outputs: Sequence[str]) -> int:
    """Measure, show, and draw where that is wanted.

    Raises:
        AgentError: `no_delegate` when none runs the model; `state_unwritable` when the picture cannot be written.
    """
    verdicts = asyncio.run(workbench.bench(args.model, ladder, graph, outputs, args.worker_python))
    if args.json:
        print(json.dumps([v.to_json() for v in verdicts], indent=1))
    else:
        print("\n".join(table(verdicts, args.objective)))
    if args.svg is not None:
        try:
            args.svg.write_text(picture(verdicts, args.objective, args.model.name), encoding="utf-8")
        except OSError as e:
            raise AgentError(Reason.STATE_UNWRITABLE, f"{args.svg}: {e.strerror}", hint="name another file") from e
    workbench.best_delegate(verdicts)
    return 0


def table(verdicts: Sequence[Verdict], objective: str) -> list[str]:
    """Lines of text: figures and a bar for each that passed, the best first, then why the others did not."""
    ranked = rank(verdicts, objective)
    heads = f"{'min ms':>8} {'p50':>8} {'p95':>8} {'p99':>8} {'CPU ms':>8} {'load':>7} {'RSS MB':>7} {'nodes':>6}"
    lines = [f"{'delegate':16} {heads}  {objective}"]
    for v in ranked:
        times = f"{v.min_ms:8.3f} {v.p50_ms:8.3f} {v.p95_ms:8.3f} {v.p99_ms:8.3f} {v.cpu_ms:8.3f} {v.load_ms:7.0f}"
        ratio = _ratio(v, ranked[0], objective)
        word = _best_word(objective) if v is ranked[0] else f"{ratio:.1f}x"
        lines.append(f"{v.requested:16} {times} {v.rss_bytes / 1e6:7.1f} {v.coverage:6.0%}  {_bar(ratio)} {word}")
    for v in verdicts:
        if not v.passed:
            where = f" at {v.stage}" if v.stage else ""
            lines.append(f"{v.requested:16} {v.reason}{where}: {printable(v.message)[:100]}")
    if ranked:
        lines.append(f"{len(ranked)} of {len(verdicts)} run it; times are without what a run waited for a core")
    if objective == "power":
        lines.append("no power sensor is read: CPU milliseconds a frame stand for it")
    return lines


def picture(verdicts: Sequence[Verdict], objective: str, model: str) -> str:
    """The same as an SVG: a bar for the objective's figure; for times a line from the fastest run to p95, a tick at
    p99."""
    ranked = rank(verdicts, objective)
    failed = [v for v in verdicts if not v.passed]
    unit, scale = UNITS[objective]
    timed, of = objective == "latency", "" if objective == "memory" else " a frame"
    reach = [max(figure(v, objective) * scale, v.p95_ms if timed else 0.0) for v in ranked]
    wide = 350 / max(reach, default=1.0) if reach and max(reach) > 0 else 1.0
    height = 92 + 46 * len(ranked) + 26 * len(failed)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{height}" viewBox="0 0 900 {height}" '
        'font-family="sans-serif" font-size="14" fill="#1f2933">',
        f'<rect width="900" height="{height}" fill="#ffffff"/>',
        f'<text x="24" y="34" font-size="19" font-weight="bold">{escape(_cut(printable(model), 64))}</text>',
        f'<text x="24" y="56" fill="#616e7c">{objective}, {unit}{of}, less is better'
        + ("; line to p95, tick at p99" if timed else "")
        + "</text>",
    ]
    for number, v in enumerate(ranked):
        parts += _row(v, 80 + 46 * number, wide, objective, best=number == 0)
    for number, v in enumerate(failed):
        top = 80 + 46 * len(ranked) + 26 * number
        said = escape(_cut(f"{v.requested}: {v.reason}, {printable(v.message)}", 118))
        parts.append(f'<text x="24" y="{top + 16}" fill="#9aa5b1" font-size="13">{said}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _row(v: Verdict, top: int, wide: float, objective: str, *, best: bool) -> list[str]:
    unit, scale = UNITS[objective]
    value = figure(v, objective) * scale
    end = 170 + value * wide
    colour = "#0f766e" if best else "#94a3b8"
    middle, weight = top + 11, "bold" if best else "normal"
    parts = [
        f'<text x="158" y="{top + 16}" text-anchor="end" font-weight="{weight}">{escape(v.requested)}</text>',
        f'<rect x="170" y="{top}" width="{max(1.0, value * wide):.1f}" height="22" rx="3" fill="{colour}"/>',
    ]
    if objective == "latency":
        p95, p99 = 170 + v.p95_ms * wide, 170 + v.p99_ms * wide
        line = f'stroke="{colour}" stroke-width="2"'
        parts.append(f'<line x1="{end:.1f}" y1="{middle}" x2="{p95:.1f}" y2="{middle}" {line}/>')
        if p99 < 540:  # beyond lies the text
            parts.append(f'<line x1="{p99:.1f}" y1="{top + 4}" x2="{p99:.1f}" y2="{top + 18}" {line}/>')
    parts.append(f'<text x="548" y="{top + 12}" font-size="13">{value:.3g} {unit}</text>')
    small = (
        f"p95 {v.p95_ms:.3g} ms · CPU {v.cpu_ms:.3g} ms · {v.rss_bytes / 1e6:.0f} MB · {v.coverage:.0%} of the nodes"
    )
    parts.append(f'<text x="548" y="{top + 28}" font-size="11" fill="#616e7c">{small}</text>')
    return parts


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _ratio(v: Verdict, best: Verdict, objective: str) -> float:
    least = figure(best, objective)
    return figure(v, objective) / least if least > 0 else 1.0


def _bar(ratio: float) -> str:
    cells = round(UNIT_CELLS * ratio)
    return "█" * cells if cells <= MOST_CELLS else "█" * (MOST_CELLS - 1) + "▶"


def _best_word(objective: str) -> str:
    return {"latency": "fastest", "throughput": "most frames", "memory": "smallest", "power": "least CPU"}[objective]
