"""What `edge-agent status` tells a person of an update in every state: what happens, and what to do next."""

from __future__ import annotations

from typing import Any

import pytest

from agent import screen
from ota.client.machine import State

UPDATE = {
    "state": "idle", "version": "", "waits_for": "", "last_version": "", "outcome": "", "reason": "", "message": "",
    "hint": "",
}  # fmt: skip


def shown(capsys: pytest.CaptureFixture[str], window_opens_in_s: int = 0, **update: str) -> list[str]:
    line: dict[str, Any] = {
        "version": "1.0.0", "delegate": "onnx:cpu", "fps": 30.0, "p50_ms": 2.0, "verdicts": [], "rules": {},
        "update": UPDATE | update,
        "selection": {"objective": "latency", "proxy": "", "fell": [], "stale": "", "trying": []},
    }  # fmt: skip
    screen.status(
        {
            "device": {"id": "cam-1", "profile": "generic-x86_64", "agent": "0.1.0"},
            "isolation": "unit",
            "custody": {"kind": "file", "worth": ""},
            "link": {"state": "connected", "message": "", "broker": "broker:8883"},
            "certificate": None,
            "sources": {},
            "lines": {"parts": line},
            "fetching": {"window_opens_in_s": window_opens_in_s},
            "locks": [],
            "conditions": [],
        }
    )
    lines = capsys.readouterr().out.splitlines()
    return lines[next(number for number, text in enumerate(lines) if text.startswith("line ")) :]


def test_a_line_at_rest_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys) == ["line       parts  1.0.0 on onnx:cpu  30.0 fps  p50 2.00 ms  update idle"]


@pytest.mark.parametrize("state", [state for state in State if state is not State.IDLE])
def test_an_update_under_way_names_its_step_and_its_version(state: State, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, state=state.value, version="1.1.0")[0].endswith(f"update {state.value} 1.1.0")


def test_what_was_fetched_and_waits_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, version="1.1.0")[0].endswith("update idle, 1.1.0 goes on by itself")


def test_what_the_policy_holds_back_says_until_when_and_what_else_can_be_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = shown(capsys, 7000, version="1.1.0", waits_for="outside_window")[1]
    assert "opens in 1 h 57 min" in line
    assert "stick" in shown(capsys, version="1.1.0", waits_for="metered")[1]


def test_an_update_that_ended_badly_says_what_to_do_next_and_nothing_a_terminal_obeys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = shown(capsys, outcome="rejected", reason="no_grant", message="no \x1b[2Jkey", hint="ask for \x07 a grant")
    assert lines[1].strip() == "last update: rejected (no_grant) no \\x1b[2Jkey"
    assert lines[2].strip() == "hint: ask for \\x07 a grant"
