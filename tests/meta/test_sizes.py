"""Large modules and functions are exceptions with a name and a reason (sizes.toml)."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator

from tests.meta.sources import ROOT, modules

MODULE_LINES = 400
FUNCTION_LINES = 60


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(qualified name, lines) of every function below `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, (child.end_lineno or child.lineno) - child.lineno + 1
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from functions(child, f"{prefix}{child.name}.")
        else:
            yield from functions(child, prefix)


def too_large() -> dict[str, int]:
    found = {}
    for path in modules().values():
        place, text = str(path.relative_to(ROOT)), path.read_text()
        lines = len(text.splitlines())
        if lines > MODULE_LINES:
            found[place] = lines
        found |= {f"{place}:{name}": n for name, n in functions(ast.parse(text)) if n > FUNCTION_LINES}
    return found


def test_large_places_are_listed_with_a_reason_and_do_not_grow() -> None:
    listed = tomllib.loads((ROOT / "tests/meta/sizes.toml").read_text())
    found = too_large()
    unlisted = {place: n for place, n in found.items() if n > listed.get(place, {"lines": 0})["lines"]}
    assert not unlisted, f"split these, or list them with a reason: {unlisted}"
    assert not set(listed) - set(found), f"no longer large, take them off the list: {set(listed) - set(found)}"
    assert all(len(entry["reason"]) > 20 for entry in listed.values())


def test_methods_and_nested_functions_are_measured() -> None:
    tree = ast.parse("class A:\n    def f(self):\n        def g():\n            pass\n        return g\n")
    assert dict(functions(tree)) == {"A.f": 4, "A.f.g": 2}
