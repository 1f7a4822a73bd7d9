"""`make fuzz`: mutations of the kept inputs for as long as told, guided by the lines they reach.

An input that reaches a line of the product which no input before it reached becomes a seed of this run. An input that
does harm is kept in the corpus, where the suite finds it, the first of each kind and as short as cutting makes it.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import agent
import ota
from tests.fuzz.engine import CORPUS, Finding, Parser, judge, mutate
from tests.fuzz.parsers import all_parsers

_PRODUCT = tuple(f"{Path(str(package.__file__)).parent}/" for package in (agent, ota))
_SLICE_S = 2.0


class Coverage:
    """Lines of the product that were executed while tracing."""

    def __init__(self) -> None:
        self.lines: set[tuple[str, int]] = set()
        self._fresh = False

    def of(self, call: Callable[[], Any]) -> tuple[Any, bool]:
        """What `call` returns, and whether it reached a new line."""
        self._fresh = False
        sys.settrace(self._enter)
        try:
            return call(), self._fresh
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, _: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(_PRODUCT) else None

    def _line(self, frame: FrameType, event: str, _: object) -> Any:
        place = (frame.f_code.co_filename, frame.f_lineno)
        if place not in self.lines:
            self.lines.add(place)
            self._fresh = True
        return self._line


@dataclass
class Run:
    """What was done with one parser."""

    parser: Parser
    seeds: list[bytes]
    coverage: Coverage = field(default_factory=Coverage)
    inputs: int = 0
    findings: dict[str, tuple[Finding, bytes]] = field(default_factory=dict)

    def spend(self, seconds: float, rng: random.Random) -> None:
        """Try mutations for so long."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            data = mutate(rng, self.seeds, self.parser.form)
            finding, fresh = self.coverage.of(lambda data=data: judge(self.parser, data))  # type: ignore[misc]
            self.inputs += 1
            if finding is not None and finding.kind not in ("slow", "memory"):
                self.findings.setdefault(finding.kind, (finding, shortened(self.parser, data, finding.kind)))
            elif finding is not None and (again := judge(self.parser, data)) is not None:
                # seen again without the tracer, which costs time and memory itself
                self.findings.setdefault(again.kind, (again, data))
            elif fresh and len(data) < 65536:
                self.seeds.append(data)


def shortened(parser: Parser, data: bytes, kind: str) -> bytes:
    """`data` with everything cut out that the finding does not need, within a few hundred tries."""
    step, tries = max(1, len(data) // 2), 0
    while step and tries < 400:
        at = 0
        while at < len(data) and tries < 400:
            tries += 1
            shorter = data[:at] + data[at + step :]
            found = judge(parser, shorter)
            if found is not None and found.kind == kind:
                data = shorter
            else:
                at += step
        step //= 2
    return data


def main(words: list[str]) -> int:
    """Returns 1 when something was found."""
    arguments = argparse.ArgumentParser(prog="make fuzz ARGS=…", description=__doc__)
    arguments.add_argument("--seconds", type=float, default=60, help="for all parsers together (default: 60)")
    arguments.add_argument("--parser", action="append", help="only this one; may be repeated")
    arguments.add_argument("--seed", type=int, default=None, help="choices of the mutator; random when not given")
    given = arguments.parse_args(words)
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    chosen = [parser for parser in all_parsers() if not given.parser or parser.name in given.parser]
    if not chosen:
        arguments.error(f"parsers: {', '.join(parser.name for parser in all_parsers())}")
    rng = random.Random(seed)
    runs = [Run(parser, [path.read_bytes() for path in parser.corpus()]) for parser in chosen]
    end_s = time.monotonic() + given.seconds
    while (left_s := end_s - time.monotonic()) > 0:
        for run in runs:
            run.spend(min(_SLICE_S, left_s / len(runs)), rng)
    found = 0
    for run in runs:
        lines, findings = len(run.coverage.lines), len(run.findings)
        print(f"{run.parser.name:24} {run.inputs:8} inputs {lines:5} lines {findings:3} findings")
        for finding, data in run.findings.values():
            found += 1
            path = CORPUS / run.parser.name / f"broken-{hashlib.sha256(data).hexdigest()[:12]}"
            path.write_bytes(data)
            print(f"  {finding.kind}\n    {finding.detail.strip()}\n    kept as {path.relative_to(CORPUS.parents[2])}")
    print(f"seed {seed}: {sum(run.inputs for run in runs)} inputs, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
