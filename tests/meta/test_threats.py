"""ota/THREATS.md names an attacker in every section, and behind every line a test, or that nothing defends."""

from __future__ import annotations

import ast
import re

import pytest

from tests.meta.sources import ROOT

TEXT = (ROOT / "ota" / "THREATS.md").read_text()
SECTIONS = {
    *("Assumptions", "Guarantees", "A stolen timestamp or snapshot key", "A stolen director key"),
    *("A stolen release key", "One stolen root key", "A stolen device", "A copied SD card", "A hostile broker"),
    *("A hostile block server", "A hostile stick", "A malicious technician", "A hostile web server"),
    *("A compromised worker", "A compromised publisher host", "A clock attacker"),
}
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def lines_of(section: str) -> list[str]:
    """The list items of a section, each with its continuation lines."""
    body = TEXT.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return [" ".join(item.split()) for item in re.split(r"^- ", body, flags=re.M)[1:]]


def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_attacker_has_a_section() -> None:
    assert set(re.findall(r"^## (.+)$", TEXT, re.M)) == SECTIONS


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_every_line_names_a_test_or_says_that_nothing_defends(section: str) -> None:
    items = lines_of(section)
    assert items
    bare = [item for item in items if not NAMED.search(item) and "not defended" not in item]
    assert not bare


def test_every_test_that_is_named_exists() -> None:
    named = set(NAMED.findall(TEXT))
    assert len(named) > 40
    missing = [f"{path}::{name}" for path, name in sorted(named) if name not in functions(path)]
    assert not missing
