"""The fault list (faults.toml), the guards of its rows (guards.toml), and the page that shows both (docs/faults.md)."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tests.meta.claims import ROOT, Claim

AREAS = {
    "ota": "Releases, transfer, trust, custody",
    "link": "The link and the fleet",
    "agent": "Processes and models",
}
KINDS = {
    "U": "unit",
    "C": "every state a power cut can leave",
    "I": "against a real broker",
    "S": "process or sandbox",
}
PAGE = ROOT / "docs" / "faults.md"
_FOLDER = ROOT / "tests" / "meta"


@dataclass(frozen=True)
class Row:
    """One case; `open` says why no test claims it yet, empty where one does."""

    id: str
    area: str
    kind: str
    case: str
    expected: str
    reasons: tuple[str, ...]
    open: str


@dataclass(frozen=True)
class Guard:
    """A definite piece of code that protects from a row's case.

    Attributes:
        find: text that stands in `file` exactly once.
        replace: what takes its place, so that the guard is gone or inverted.
        tests: they must fail then; at least one of them claims the row.
    """

    row: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        """What stands in a report: the row, the file and the first line of the guard."""
        return f"{self.row} {self.file}: {self.find.strip().splitlines()[0].strip()[:70]}"


def rows() -> dict[str, Row]:
    """Every row, in the order of the list."""
    data = tomllib.loads((_FOLDER / "faults.toml").read_text())
    return {
        number: Row(
            number, row["area"], row["kind"], row["case"], row["expected"], tuple(row["reasons"]), row.get("open", "")
        )
        for number, row in data.items()
    }


def guards() -> list[Guard]:
    """Every guard, in the order of the file."""
    data = tomllib.loads((_FOLDER / "guards.toml").read_text())
    return [
        Guard(item["row"], item["file"], item["find"], item["replace"], tuple(item["tests"])) for item in data["guard"]
    ]


def by_row(claims: Iterable[Claim]) -> dict[str, list[Claim]]:
    """Claims by the row they are for."""
    found: dict[str, list[Claim]] = {}
    for claim in claims:
        found.setdefault(claim.row, []).append(claim)
    return found


def page(listed: Mapping[str, Row], claims: Iterable[Claim]) -> str:
    """docs/faults.md."""
    claimed = by_row(claims)
    text = [
        "# Faults and attacks\n",
        "What the product must survive, what it does then, and the tests that show it. In every case the committed",
        "release keeps serving, no unverified byte reaches a parser of models, the state is consistent after a",
        "restart, and the failure is reported once, with a stable reason ([reasons](reference/reasons.md)).\n",
        "`make faults` writes this page (`ARGS=--write`), runs the tests named here, and takes guards out of the code",
        "to see them fail (`tests/meta/guards.toml`). "
        + "; ".join(f"**{kind}** {meaning}" for kind, meaning in KINDS.items())
        + ".\n",
    ]
    for area, title in AREAS.items():
        text += [f"## {title}\n", "| | case | what happens | reason | tests |", "|---|---|---|---|---|"]
        for row in listed.values():
            if row.area != area:
                continue
            tests = "<br>".join(f"`{claim.test.removeprefix('tests/')}`" for claim in claimed.get(row.id, ()))
            reasons = ", ".join(f"`{reason}`" for reason in row.reasons) or "–"
            text.append(
                f"| {row.id} {row.kind} | {row.case} | {row.expected} | {reasons} | {tests or f'open: {row.open}'} |"
            )
        text.append("")
    return "\n".join(text).rstrip("\n") + "\n"
