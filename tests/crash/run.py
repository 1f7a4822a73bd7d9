"""Command: every state that a power cut can leave of every scene, and every fsync left out in turn.

    python tests/crash/run.py [--all] [--only SCENE ...] [--no-fsyncs]

Without `--all` it looks at most at 64 states of a cut, as described in `memory.Possibilities.picks`; with it at up to
65,536, which is all of them for nearly every cut (the table says for how many). Exit status 1 when a state violates
what `scene` demands, or when an fsync can be left out and nothing fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.crash import mutations, scenes
from tests.crash.survey import HEADING, SEED, Survey, survey

SAMPLE, ALL = 64, 1 << 16
FSYNC_BOUND = 16


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [make.__name__ for make in scenes.SCENES]
    parser.add_argument("--all", action="store_true", help="every state, not a sample")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SCENE", help=", ".join(names))
    parser.add_argument("--no-fsyncs", action="store_true", help="leave out the table of fsyncs")
    arguments = parser.parse_args()
    bound = ALL if arguments.all else SAMPLE
    with tempfile.TemporaryDirectory() as name:
        well = _survey(Path(name), arguments.only, bound)
        if not arguments.no_fsyncs:
            well = _fsyncs(Path(name) / "fsyncs") and well
    return 0 if well else 1


def _survey(folder: Path, names: list[str], bound: int) -> bool:
    print(f"at most {bound} states of a cut, seed {SEED}\n{HEADING}{'seconds':>9}", flush=True)
    total = Survey("sum")
    for make in scenes.SCENES:
        if make.__name__ in names:
            started = time.monotonic()
            (folder / make.__name__).mkdir()
            found = survey(make(folder / make.__name__).record(), bound)
            print(f"{found.row()}{time.monotonic() - started:9.1f}", flush=True)
            for violation in found.violations[:20]:
                print(f"    {violation}")
            for field in ("cuts", "exhaustive", "possible", "looked_at", "booted"):
                setattr(total, field, getattr(total, field) + getattr(found, field))
            total.violations += found.violations
    print(total.row())
    return not total.violations


def _fsyncs(folder: Path) -> bool:
    print(f"\neach durable call left out in turn\n{'call':10}{'path':24}{'calls':>6}  scene that fails")
    well = True
    for lies, (count, makers) in mutations.durable_calls(folder / "counted").items():
        result = mutations.missed(lies, count, makers, FSYNC_BOUND, folder)
        print(result.row(), flush=True)
        well = well and bool(result.complaint)
    return well


if __name__ == "__main__":
    sys.exit(main())
