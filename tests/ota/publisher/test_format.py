"""FORMAT.md says what the code does: its examples are read by the code, its numbers are compared with the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ota import payload, release
from ota.publisher import settings
from ota.publisher.create import create
from ota.publisher.spec import load

TEXT = (Path(__file__).resolve().parents[3] / "ota/FORMAT.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_repo_toml_shown_is_the_one_that_init_writes() -> None:
    assert blocks("toml")[0].encode() == settings.to_toml(settings.Settings())


def test_the_spec_shown_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(blocks("toml")[1])
    spec = load(tmp_path / "spec.toml")
    assert (spec.line, len(spec.components), spec.budgets.rss_bytes) == ("parts", 1, 250_000_000)


@pytest.mark.parametrize(
    "pattern", [release.LINE_PATTERN, release.VERSION_PATTERN, release.COMPONENT_PATTERN, release.DEVICE_PATTERN]
)
def test_the_grammars_shown_are_the_ones_in_force(pattern: re.Pattern[str]) -> None:
    assert f"`{pattern.pattern}`" in TEXT


@pytest.mark.parametrize("length", [1, 16383, 16384, 16385, 100_000])
def test_the_length_formula_of_a_sealed_payload_holds(length: int) -> None:
    assert len(payload.seal(bytes(length), bytes(32), b"")) == 56 + length + 16 * (length // 16384 + 1)


def test_the_contexts_shown_are_the_ones_in_force() -> None:
    for context in (
        payload.payload_context("line", "version", "component", "kind", "plain_sha256", 0),
        payload.grant_info("device", "line", "version", "cek_id"),
    ):
        first, *rest = context.decode().split("\0")
        names = [name if name != "0" else "plain_length" for name in rest]
        assert f'"{first}" \\0 ' + " \\0 ".join(names) in TEXT


def test_every_file_of_a_new_repository_stands_in_the_table(tmp_path: Path) -> None:
    repository = create(tmp_path / "r")
    for path in repository.path.rglob("*"):
        if path.is_file():
            name = re.sub(r"^\d+\.", "N.", path.name)
            assert f"`{name}`" in TEXT or f"/{name}`" in TEXT, f"{name} is not in FORMAT.md"
