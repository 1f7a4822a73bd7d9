"""The fault list: well-formed, claimed where it has to be, shown on its page; and a sample of its guards, taken out.

`make faults` runs all claiming tests and takes out all guards; this is the part that every run of the suite affords.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from agent.errors import Reason as AgentReason
from ota.errors import Reason as OtaReason
from tests.meta.claims import ROOT, Claim, collect
from tests.meta.faults import report
from tests.meta.mutation import Copy
from tests.meta.rows import AREAS, KINDS, PAGE, Guard, Row, by_row, guards, page, rows

# one of trust, one of transfer, one of the release's own words: seconds each
SAMPLE = ("ota/client/workflow.py", "ota/client/transfer.py", "ota/release.py")


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return collect(run=False)


def test_rows_are_numbered_and_say_what_happens() -> None:
    listed = rows()
    assert list(listed) == [f"F{number}" for number in range(1, len(listed) + 1)]
    assert len(listed) >= 96
    for row in listed.values():
        assert row.area in AREAS
        assert row.kind in KINDS
        assert row.case
        assert row.expected
        known = {reason.value for reason in (*OtaReason, *AgentReason)}
        assert set(row.reasons) <= known, row.id


def test_every_row_of_ota_is_claimed_and_every_open_row_says_why(claims: list[Claim]) -> None:
    claimed = by_row(claims)
    assert set(claimed) <= set(rows())
    unclaimed = [row for row in rows().values() if row.id not in claimed]
    assert not [row.id for row in unclaimed if row.area == "ota"]
    assert not [row.id for row in unclaimed if not row.open]
    assert not [row.id for row in rows().values() if row.open and row.id in claimed], "they are open no longer"


def test_a_test_that_claims_a_row_with_a_reason_names_that_reason(claims: list[Claim]) -> None:
    """At least one of a row's tests; that it also asserts it, only reading can tell."""
    claimed = by_row(claims)
    silent = []
    for row in rows().values():
        words = {word for claim in claimed.get(row.id, ()) for word in claim.words}
        names = {reason.upper() for reason in row.reasons} | set(row.reasons)
        if row.reasons and row.id in claimed and not names & words:
            silent.append(row.id)
    assert not silent


def test_the_page_is_current(claims: list[Claim]) -> None:
    assert PAGE.read_text() == page(rows(), claims), "make faults ARGS=--write"


def test_every_guard_stands_once_in_its_file_and_is_missed_by_a_test_of_its_row(claims: list[Claim]) -> None:
    claimed = {row: {claim.test for claim in found} for row, found in by_row(claims).items()}
    wrong = []
    for guard in guards():
        text = (ROOT / guard.file).read_text()
        if text.count(guard.find) != 1:
            wrong.append(f"{guard.name}: stands {text.count(guard.find)} times in its file")
        elif not _parses(text.replace(guard.find, guard.replace)):
            wrong.append(f"{guard.name}: nothing that runs is left without it")
        if not set(guard.tests) & claimed.get(guard.row, set()):
            wrong.append(f"{guard.name}: none of its tests claims {guard.row}")
    assert not wrong
    assert len(guards()) >= 40


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def test_a_guard_that_is_taken_out_is_missed(tmp_path: Path) -> None:
    copy = Copy(tmp_path)
    for file in SAMPLE:
        guard = next(guard for guard in guards() if guard.file == file)
        assert copy.judge(guard).outcome == "killed", guard.name


def test_a_change_that_no_test_notices_survives_and_one_that_cannot_be_made_is_invalid(tmp_path: Path) -> None:
    """Otherwise everything would count as killed."""
    copy = Copy(tmp_path)
    tests = ("tests/meta/test_threats.py::test_every_attacker_has_a_section",)
    unnoticed = Guard("F1", "ota/client/guard.py", "from __future__ import annotations", "import os", tests)
    assert copy.judge(unnoticed).outcome == "survived"
    absent = Guard("F1", "ota/client/guard.py", "no such text", "", tests)
    broken = Guard("F1", "ota/client/guard.py", "from __future__ import annotations", "def (", tests)
    assert {copy.judge(guard).outcome for guard in (absent, broken)} == {"invalid"}
    assert (copy.root / "ota/client/guard.py").read_text() == (ROOT / "ota/client/guard.py").read_text()


# -- claiming ----------------------------------------------------------------------------------------------------------

CLAIMING = """
import pytest

@pytest.mark.fault("F1")
def test_passes():
    assert "payload_corrupt"

@pytest.mark.fault("F2")
@pytest.mark.skip(reason="x")
def test_is_skipped_by_its_mark():
    pass

@pytest.mark.fault("F3")
def test_skips_while_it_runs():
    pytest.skip("x")

@pytest.mark.fault("F4")
@pytest.mark.xfail(strict=False)
def test_is_expected_to_fail():
    assert False

@pytest.mark.fault("F5")
def test_fails():
    assert False

@pytest.mark.parametrize("case", [1, pytest.param(2, marks=pytest.mark.fault("F6"))])
def test_one_case(case):
    if case == 3:
        pytest.skip("x")

@pytest.fixture
def broken():
    yield
    raise RuntimeError

@pytest.mark.fault("F7")
def test_whose_fixture_fails_at_the_end(broken):
    pass

def test_that_claims_nothing():
    assert False
"""


def test_only_tests_that_pass_claim_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "test_claims.py"
    path.write_text(CLAIMING)
    found = collect(run=True, select=[str(path)])
    counts = {claim.row: (claim.passed, claim.failed, claim.skipped) for claim in found}
    assert counts == {"F1": (1, 0, 0), "F3": (0, 0, 1), "F5": (0, 1, 0), "F6": (1, 0, 0), "F7": (0, 1, 0)}
    assert "payload_corrupt" in found[0].words
    listed = {f"F{n}": Row(f"F{n}", "ota", "U", "case", "expected", (), "") for n in range(1, 8)}
    problems = report(listed, found, ran=True)
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if " claimed " in line] == ["F1", "F6"]
    assert {problem.split()[0].rstrip(":") for problem in problems} == {"F2", "F3", "F4", "F5", "F7"}


def test_a_marker_with_a_range_of_rows_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "test_claims.py"
    path.write_text('import pytest\n\n@pytest.mark.fault("F1-F9")\ndef test_x():\n    pass\n')
    with pytest.raises(RuntimeError, match="one row"):
        collect(run=False, select=[str(path)])
