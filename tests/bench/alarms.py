"""`make selection`: healthy delegates tried again and again while both cores are loaded; any that is refused is a false
alarm.

The real delegates of this machine, and fakes with habits that look suspicious: waiting by spinning, buffers that grow
over the first runs, memory that comes and goes, answers whose last bit changes (`tests/fakes/delegates.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from agent.daemon.selection import Verdict  # noqa: E402
from agent.daemon.supervisor import Supervisor  # noqa: E402
from agent.daemon.trials import TrialRunner, candidates, subject_of  # noqa: E402
from agent.workbench import LIMITS  # noqa: E402
from ota.client.ports import Candidate  # noqa: E402
from ota.publisher import spec  # noqa: E402
from tests import workerpython  # noqa: E402
from tests.bench import pipeline, selection  # noqa: E402
from tests.bench.setting import PARTS, Pressure  # noqa: E402
from tests.fakes.registry import FOLDER  # noqa: E402

TRIALS = 50
HEALTHY = ("sleeps:npu", "spins:npu", "warms:npu", "jitters:npu", "saws:npu")
REAL = ("litert:xnnpack", "litert:cpu", "onnx:cpu", "openvino:cpu")


def offering(candidate: Candidate, delegates: Sequence[str]) -> Candidate:
    """`candidate` of a publisher that allows `delegates` too."""
    components = tuple(
        replace(c, delegates=(*c.delegates, *delegates)) if c.format == "tflite" else c
        for c in candidate.release.components
    )
    release = replace(candidate.release, components=components)
    return replace(candidate, release=release, component=release.component(candidate.component.name), alternatives=())


async def one(candidate: Candidate) -> list[Verdict]:
    """The verdicts of one trial on everything healthy."""
    host = workerpython.program(str(FOLDER / "entry.py"), "host")
    supervisor = Supervisor(listen=None, host_command=host, on_lost=lambda: None)
    await supervisor.start()
    try:
        offered = offering(candidate, HEALTHY)
        pairs = candidates(offered.components, (*HEALTHY, *REAL))
        return await TrialRunner(supervisor, LIMITS).run(subject_of(offered, min_coverage=0.9), pairs)
    finally:
        await supervisor.stop()


def false_alarms(candidate: Candidate, trials: int, burners: int) -> tuple[int, list[Verdict]]:
    """How many verdicts there were, and those that refused something healthy."""
    count, alarms = 0, []
    with selection.burners(burners) if burners else contextlib.nullcontext():
        for _ in range(trials):
            verdicts = asyncio.run(one(candidate))
            there = [v for v in verdicts if v.reason != "runtime_missing"]
            count += len(there)
            alarms += [v for v in there if not v.passed]
    return count, alarms


def main() -> int:
    """Try, print, and fail on any alarm."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=TRIALS)
    args = parser.parse_args()
    cores, began, pressure = os.cpu_count() or 1, time.monotonic(), Pressure()
    with tempfile.TemporaryDirectory(prefix="edge-bench-") as folder:
        candidate = pipeline.candidate(Path(folder) / "parts", spec.load(PARTS / "1.0.0" / "spec.toml"))
        count, alarms = false_alarms(candidate, args.trials, cores)
    loaded = f"{cores} burners on {cores} cores, CPU pressure {pressure.percent:.0f} %"
    print(f"{args.trials} trials of healthy delegates, {loaded}")
    print(f"{len(alarms)} false alarms in {count} verdicts, {time.monotonic() - began:.0f} s")
    for reason, times in Counter(f"{v.requested}: {v.reason} at {v.stage}: {v.message}" for v in alarms).items():
        print(f"  {times} times {reason}")
    return 1 if alarms else 0


if __name__ == "__main__":
    raise SystemExit(main())
