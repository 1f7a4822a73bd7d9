"""`make faults`: is every row of the fault list claimed by a test that passed, and is a missing guard noticed?

Prints the claimed rows with their tests, the open ones with the reason, and each guard as killed or survived. Ends with
1 when a claiming test failed, a row of `ota` is open, a row is open without a reason, or a guard's absence went
unnoticed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.meta import claims as collecting
from tests.meta.claims import Claim
from tests.meta.mutation import Copy, Verdict
from tests.meta.rows import PAGE, Guard, Row, by_row, guards, page, rows


def main(words: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="make faults ARGS=…", description=__doc__)
    parser.add_argument("--row", action="append", default=[], metavar="F17", help="only this row; may be repeated")
    parser.add_argument("--no-run", action="store_true", help="believe the markers: do not run the claiming tests")
    parser.add_argument("--no-guards", action="store_true", help="do not take guards out")
    parser.add_argument("--write", action="store_true", help="write docs/faults.md and do nothing else")
    parser.add_argument("--jobs", type=int, default=2, help="guards looked at at the same time (default: 2)")
    given = parser.parse_args(words)
    if given.write:
        PAGE.write_text(page(rows(), collecting.collect(run=False)))
        print(f"wrote {PAGE}")
        return 0
    listed = {number: row for number, row in rows().items() if not given.row or number in given.row}
    claimed = collecting.collect(run=not given.no_run, select=_files(given.row), quiet=given.no_run)
    problems = report(listed, claimed, ran=not given.no_run)
    chosen = [guard for guard in guards() if guard.row in listed]
    if not given.no_guards and chosen:
        problems += take_out(chosen, given.jobs)
    for problem in problems:
        print(f"FAILED {problem}")
    return 1 if problems else 0


def _files(wanted: Sequence[str]) -> list[str]:
    """Test files that claim the rows, so that a run for one row does not run the others' tests."""
    if not wanted:
        return []
    return sorted({claim.test for claim in collecting.collect(run=False) if claim.row in wanted})


def report(listed: Mapping[str, Row], claimed: Sequence[Claim], *, ran: bool) -> list[str]:
    """Print every row, and return what is wrong."""
    problems = []
    found = by_row(claimed)
    for row in listed.values():
        claims = found.get(row.id, [])
        good = [claim for claim in claims if not claim.failed and (claim.passed or not ran)]
        print(f"{row.id:4} {row.area:5} {'claimed' if good else 'open':8} {row.case}")
        for claim in claims:
            counts = f"{claim.passed} passed, {claim.failed} failed, {claim.skipped} skipped" if ran else "not run"
            print(f"       {claim.test} ({counts})")
            if claim.failed:
                problems.append(f"{row.id}: {claim.test} failed")
        if not good:
            print(f"       {row.open or 'no reason given'}")
            if row.area == "ota" or not row.open:
                problems.append(f"{row.id} is open: {row.case}")
    problems += [f"{number} is claimed and not in the list" for number in found if number not in rows()]
    good_rows = sum(1 for row in listed if any(c.passed or not ran for c in found.get(row, ())))
    print(f"{good_rows} of {len(listed)} rows are claimed")
    return problems


def take_out(chosen: Sequence[Guard], jobs: int) -> list[str]:
    """Print what became of each guard, and return those whose absence nobody noticed."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(max(1, jobs)):
            copies.put(Copy(Path(folder) / str(number)))
        first = copies.get()
        failed = first.passes(test for guard in chosen for test in guard.tests)
        copies.put(first)
        if failed:
            print(failed)
            return ["the guards' tests do not pass as it is; no guard was taken out"]

        def judge(guard: Guard) -> Verdict:
            copy = copies.get()
            try:
                return copy.judge(guard)
            finally:
                copies.put(copy)

        problems = []
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            for verdict in pool.map(judge, chosen):
                detail = f" ({verdict.detail})" if verdict.detail else ""
                print(f"{verdict.outcome:8} {verdict.guard.name}{detail} {verdict.seconds:.1f} s")
                if verdict.outcome != "killed":
                    problems.append(f"{verdict.outcome}: {verdict.guard.name}{detail}")
    print(f"{len(chosen) - len(problems)} of {len(chosen)} guards killed")
    return problems


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
