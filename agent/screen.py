"""What the verbs of `edge-agent` print: tables and lines for a person, JSON for a program. Decides nothing.

Invariant: names come from models, sticks and peers, so nothing is printed that a terminal would obey.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agent.errors import AgentError
from agent.errors import exit_code as agent_exit_code
from ota.errors import OtaError
from ota.errors import exit_code as ota_exit_code

if TYPE_CHECKING:
    import argparse

_COLUMNS = 80
LONGEST_VALUE = 100


def columns() -> int:
    """How wide the terminal is; COLUMNS goes before what it says, 80 where there is none."""
    with contextlib.suppress(ValueError):
        if (wanted := int(os.environ.get("COLUMNS", ""))) > 0:
            return wanted
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stdout.fileno()).columns or _COLUMNS
    return _COLUMNS


def printable(text: str) -> str:
    """Names come from models, sticks and peers: a terminal must not obey them."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def complain(error: AgentError | OtaError, *, as_json: bool = False) -> int:
    """An error as every command tells it; returns its exit code."""
    if as_json:
        print(json.dumps({"reason": error.reason.value, "message": error.message, "hint": error.hint}))
    print(f"error: {printable(error.message)} [{error.reason.value}]", file=sys.stderr)
    if error.hint:
        print(f"hint: {printable(error.hint)}", file=sys.stderr)
    return agent_exit_code(error.reason) if isinstance(error, AgentError) else ota_exit_code(error.reason)


def answer(args: argparse.Namespace, answer: Mapping[str, Any]) -> int:
    """An answer of few fields, a line for each; returns 0."""
    if args.json:
        print(json.dumps(answer, indent=1))
    else:
        for key, value in answer.items():
            print(f"{key}: {printable(str(value))}")
    return 0


def status(status: Mapping[str, Any]) -> None:
    """The status document for a person."""
    device = status["device"]
    print(f"device     {device['id']}  profile {device['profile']}  agent {device['agent']}")
    if device.get("recognised"):
        plugged = f"  with {device['accessories']}" if device["accessories"] else ""
        print(f"board      {printable(device['recognised'])}{plugged}")
    print(f"isolation  {status['isolation']}")
    print(f"custody    {status['custody']['kind']}: {status['custody']['worth']}")
    link = status["link"]
    detail = link["message"] or link["broker"]
    print(f"link       {link['state']} {printable(detail)}")
    own = status["certificate"]
    if own is not None:
        renewal = f", renewed after {own['renewal'][:10]}" if own["renewal"] else ", renewed by nobody"
        print(f"identity   certificate until {own['expires'][:16].replace('T', ' ')} UTC{renewal}")
    for name, source in status["sources"].items():
        came = f"{source['frames']} frames  {source['measured_fps']:.1f} fps"
        print(f"source     {name}  {source['state']}  {came}  {printable(source['detail'])}")
    for name, line in status["lines"].items():
        update = line["update"]
        running = f"{line['version']} on {line['delegate']}" if line["delegate"] else "nothing runs"
        figures = f"{line['fps']:.1f} fps  p50 {line['p50_ms']:.2f} ms"
        print(f"line       {name}  {running}  {figures}  {printable(_update_now(update))}")
        if line["rules"]:
            print(f"           lasts: {printable(', '.join(line['rules']))}")
        if update["waits_for"]:
            print(f"           {_waits(update['waits_for'], status['fetching'])}")
        if update["reason"]:
            print(f"           last update: {update['outcome']} ({update['reason']}) {printable(update['message'])}")
            if update["hint"]:
                print(f"           hint: {printable(update['hint'])}")
        _selection(line["selection"])
        verdicts(line["verdicts"], indent="           ")
    for lock in status["locks"]:
        waiting = f", {', '.join(lock['waiting'])} wait" if lock["waiting"] else ""
        limit = f" of {lock['timeout_s']:g}" if lock["timeout_s"] else ", in service"
        print(f"lock       {lock['name']}  {lock['owner']} for {lock['since_s']:g} s{limit}{waiting}")
    for condition in status["conditions"]:
        print(f"condition  {condition['type']} {condition['status']}: {printable(condition['message'])}")
        if condition.get("hint"):
            print(f"           hint: {printable(condition['hint'])}")


def _selection(chosen: Mapping[str, Any]) -> None:
    """What the line's delegate is chosen by where that is not latency, and what about it a person should know."""
    if chosen["objective"] != "latency":
        proxy = f", measured as {chosen['proxy']}" if chosen["proxy"] else ""
        print(f"           chosen for {chosen['objective']}{proxy}")
    for fell in chosen["fell"]:
        print(f"           not on {fell['delegate']}: {fell['reason']}: {printable(fell['message'])}")
    if chosen["stale"]:
        print(f"           tried anew: {printable(chosen['stale'])}")
    for trial in chosen["trying"]:
        print(f"           trying {trial['delegate']}: {trial['step']} for {trial['since_s']:g} s")


def _update_now(update: Mapping[str, Any]) -> str:
    """What the update of a line is doing, in a few words."""
    if update["state"] != "idle":
        return f"update {update['state']} {update['version']}".rstrip()
    # at rest with a version: what was fetched of it, or all of it, goes on at the next look
    return f"update idle, {update['version']} goes on by itself" if update["version"] else "update idle"


def _waits(reason: str, fetching: Mapping[str, Any]) -> str:
    """What an update waits for by policy, and until when."""
    if reason == "outside_window":
        hours, minutes = divmod(-(-fetching["window_opens_in_s"] // 60), 60)
        return f"waits for its update window, which opens in {hours} h {minutes} min (windows in agent.toml)"
    return "waits for a network that is not metered (metered and on_metered in agent.toml); or install from a stick"


def verdicts(verdicts: Sequence[Mapping[str, Any]], indent: str = "") -> None:
    """A table of delegates, the fastest marked."""
    if not verdicts:
        return
    best = min((v["min_ms"] for v in verdicts if not v["reason"]), default=0.0)
    heads = f"{'min ms':>8} {'p50':>8} {'p95':>8} {'load':>8} {'RSS MB':>7}  verdict"
    print(f"{indent}{'delegate':16} {'component':14} {heads}")
    for v in verdicts:
        row = f"{indent}{v['requested']:16} {v['component'][:14]:14} "
        if v["reason"]:
            print(f"{row}{'-':>8} {'-':>8} {'-':>8} {'-':>8} {'-':>7}  {v['reason']}: {printable(v['message'])[:90]}")
            continue
        word = "fastest" if v["min_ms"] == best else f"{v['min_ms'] / best:.1f}x slower" if best else ""
        figures = (
            f"{v['min_ms']:8.3f} {v['p50_ms']:8.3f} {v['p95_ms']:8.3f} {v['load_ms']:8.1f} {v['rss_bytes'] / 1e6:7.1f}"
        )
        print(f"{row}{figures}  {word}")


def _shortened(text: str) -> str:
    """A value for a line: outlines, points and vectors have thousands of numbers, and --json shows them all."""
    return (
        text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}… ({len(text)} characters, whole with --json)"
    )


def inference(args: argparse.Namespace, delegate: str, stages_us: Sequence[int], items: Sequence[Any]) -> None:
    """What a model said of one picture, and how long each stage took."""
    if args.json:
        print(json.dumps({"delegate": delegate, "stages_us": list(stages_us), "items": list(items)}, indent=1))
        return
    _, pre, run, post = stages_us
    print(
        f"{delegate}: preprocess {pre / 1000:.2f} ms, inference {run / 1000:.2f} ms, postprocess {post / 1000:.2f} ms"
    )
    for item in items:
        print("  " + "  ".join(f"{key} {_shortened(printable(str(value)))}" for key, value in item.items()))
    if not items:
        print("  nothing found")
