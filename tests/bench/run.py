"""`make bench`: what the pipeline costs beside bare loops, what a device weighs and how fast it starts, and the figures
of every other section of the table below.

Rounds are interleaved, figures are minima over rounds (other load only ever adds), and the CPU pressure of the machine
stands beside them. Nothing is asserted; build/bench.json keeps every round.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.setting import Setting  # noqa: E402

# One line a section: a module of this folder whose `bench(setting: Setting) -> dict[str, Any]` measures, prints, and
# returns what build/bench.json keeps. Imported only when it is run.
SECTIONS = (
    "pipeline",
    "device",
    "transfer",
    "prepost",
    "throughput",
    "resources",
    "selection",
)


def main() -> int:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--only", choices=SECTIONS, action="append", default=[])
    args = parser.parse_args()
    began = time.monotonic()
    out = ROOT / "build" / "bench.json"
    out.parent.mkdir(exist_ok=True)
    kept = {}
    with tempfile.TemporaryDirectory(prefix="edge-bench-") as name:
        for section in args.only or SECTIONS:
            folder = Path(name) / section
            folder.mkdir()
            setting = Setting(folder, Path(name), args.rounds, args.seconds)
            kept[section] = importlib.import_module(f"tests.bench.{section}").bench(setting)
            out.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"\n{time.monotonic() - began:.0f} s; every round is in {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
