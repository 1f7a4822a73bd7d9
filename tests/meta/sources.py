"""The project's own modules and what they import, read from the syntax tree (nothing is executed)."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("agent", "ota")


def modules() -> Mapping[str, Path]:
    """Dotted name of every module of the product, with its file."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt) and _is_type_checking(child):
            continue
        yield child
        yield from _statements(child)


def imports(name: str, path: Path) -> set[str]:
    """Every dotted name that module `name` may load, wherever in it the import stands.

    `from a import b` gives a and a.b. Imports for type checkers alone do not count.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in _statements(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def closure(start: str) -> dict[str, tuple[str, ...]]:
    """Every name that loading `start` may load, with the chain of the project's modules that leads to it."""
    own = modules()
    chains: dict[str, tuple[str, ...]] = {start: (start,)}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        for wanted in sorted(imports(name, own[name])):
            parts = wanted.split(".")
            for depth in range(1, len(parts) + 1):  # a package's __init__ runs first
                loaded = ".".join(parts[:depth])
                if loaded in chains:
                    continue
                chains[loaded] = (*chains[name], loaded)
                if loaded in own:
                    waiting.append(loaded)
    return chains
