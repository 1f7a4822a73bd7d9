"""A pytest plugin: which test claims which row of the fault list, and whether it really passed.

`-p tests.meta.claims --claims FILE` keeps only the tests that carry `@pytest.mark.fault("F17")` and writes to FILE what
became of them. One that is skipped, or expected to fail, claims nothing: neither by its mark nor while it runs.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
_ROW = re.compile(r"F[1-9][0-9]{0,2}")


@dataclass(frozen=True)
class Claim:
    """A test function and the rows it claims.

    Attributes:
        test: `tests/area/test_x.py::test_y`, without the parameters.
        passed, failed, skipped: how many of its parametrizations ended so; all 0 when nothing was run.
        words: what the function and what it refers to in its module spell out, for looking up reasons.
    """

    row: str
    test: str
    passed: int
    failed: int
    skipped: int
    words: tuple[str, ...]


def collect(*, run: bool, select: Sequence[str] = (), quiet: bool = True) -> list[Claim]:
    """The claims of the whole suite, or of the test files in `select`; with `run` the tests are run.

    Raises:
        RuntimeError: the suite could not be collected, or a marker is not one row's name.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "claims.json"
        command = [sys.executable, "-m", "pytest", "-p", "tests.meta.claims", "--claims", str(out), "-q", *select]
        command += [] if run else ["--collect-only"]
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1) or not out.exists():
            raise RuntimeError(f"pytest ended with {done.returncode}\n{done.stdout or ''}")
        return [Claim(**{**item, "words": tuple(item["words"])}) for item in json.loads(out.read_text())]


# -- the plugin --------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--claims", metavar="FILE", help="keep tests that claim a fault row, and write what became of them"
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--claims")
    if path:
        config.pluginmanager.register(_Recorder(Path(path)), "fault-claims")


class _Recorder:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._claims: dict[tuple[str, str], dict[str, Any]] = {}
        self._rows: dict[str, list[tuple[str, str]]] = {}
        self._outcomes: dict[str, str] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, rest = [], []
        for item in items:
            rows = [] if _claims_nothing(item) else [_row(marker) for marker in item.iter_markers("fault")]
            (kept if rows else rest).append(item)
            for row in rows:
                self._add(item, row)
        config.hook.pytest_deselected(items=rest)
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        before = self._outcomes.get(report.nodeid, "passed")
        outcome = "skipped" if hasattr(report, "wasxfail") else report.outcome
        order = ("passed", "skipped", "failed")
        self._outcomes[report.nodeid] = max(before, outcome, key=order.index)

    def pytest_sessionfinish(self) -> None:
        for nodeid, outcome in self._outcomes.items():
            for key in self._rows.get(nodeid, ()):
                self._claims[key][outcome] += 1
        self._path.write_text(json.dumps([self._claims[key] for key in sorted(self._claims)]))

    def _add(self, item: pytest.Item, row: str) -> None:
        test = item.nodeid.partition("[")[0]
        self._rows.setdefault(item.nodeid, []).append((row, test))
        empty = {"row": row, "test": test, "passed": 0, "failed": 0, "skipped": 0, "words": sorted(_words(item))}
        self._claims.setdefault((row, test), empty)


def _claims_nothing(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("skip", "xfail"))


def _row(marker: pytest.Mark) -> str:
    if len(marker.args) != 1 or marker.kwargs or not _ROW.fullmatch(str(marker.args[0])):
        raise pytest.UsageError(f"@pytest.mark.fault takes one row, such as 'F17', not {marker.args}")
    return str(marker.args[0])


def _words(item: pytest.Item) -> set[str]:
    """Names, attributes and texts in the source of a test and of what it refers to, in its own module and in those of
    the tests that it imports from."""
    function = getattr(item, "function", None)
    return set() if function is None else set(_reached(Path(item.path), function.__name__))


@functools.cache
def _reached(path: Path, name: str) -> frozenset[str]:
    found: set[str] = set()
    waiting, seen = [(path, name)], {(path, name)}
    while waiting:
        here, wanted = waiting.pop()
        defined, imported, modules = _definitions(here)
        if wanted in imported:
            waiting.append(imported[wanted])
        for part in ast.walk(defined[wanted]) if wanted in defined else ():
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                found.add(part.value)
            elif isinstance(part, ast.Attribute):
                found.add(part.attr)
                if isinstance(part.value, ast.Name) and part.value.id in modules:
                    place = modules[part.value.id], part.attr
                    waiting += [] if place in seen else [place]
                    seen.add(place)
            elif isinstance(part, ast.arg | ast.Name):
                place = here, part.arg if isinstance(part, ast.arg) else part.id
                if place not in seen:
                    seen.add(place)
                    waiting.append(place)
    return frozenset(found)


@functools.cache
def _definitions(path: Path) -> tuple[dict[str, ast.stmt], dict[str, tuple[Path, str]], dict[str, Path]]:
    """What a module defines, what it imports from other modules of the tests, and which of these it imports whole."""
    defined: dict[str, ast.stmt] = {}
    imported: dict[str, tuple[Path, str]] = {}
    modules: dict[str, Path] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined.update({target.id: node for target in targets if isinstance(target, ast.Name)})
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            source = ROOT.joinpath(*str(node.module).split(".")).with_suffix(".py")
            if source.exists():
                imported.update({alias.asname or alias.name: (source, alias.name) for alias in node.names})
            for alias in node.names:
                whole = source.with_suffix("") / f"{alias.name}.py"
                if whole.exists():
                    modules[alias.asname or alias.name] = whole
    return defined, imported, modules
