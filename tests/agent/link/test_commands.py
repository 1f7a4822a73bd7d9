"""Which commands are admitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.daemon.commands import (
    MAX_COMMAND_BYTES,
    Check,
    Command,
    Gate,
    GateLimits,
    Hint,
    Refusal,
    Report,
    Rollback,
    parse_hint,
)
from agent.daemon.seen import Seen
from agent.errors import Reason
from ota.client.fsops import Fs

NOW = 1_800_000_000
GOOD = {"v": 1, "id": "c-1", "action": "check", "line": "person", "expires_at": NOW + 60}


def _command(**changes: Any) -> bytes:
    body = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    return json.dumps(body).encode()


def _admit(gate: Gate, payload: bytes, *, retained: bool = False, at_s: float = 0.0) -> Command | Refusal | None:
    return gate.admit(payload, retained=retained, wall_s=NOW, now_s=at_s)


@pytest.mark.parametrize(
    ("payload", "command"),
    [
        (_command(), Check("c-1", "person")),
        (_command(line=...), Check("c-1", None)),
        (_command(line=None), Check("c-1", None)),
        (_command(action="rollback"), Rollback("c-1", "person")),
        (_command(action="report", line=...), Report("c-1")),
    ],
)
def test_good_commands_are_admitted(payload: bytes, command: Command) -> None:
    assert _admit(Gate(), payload) == command


@pytest.mark.fault("F84")
@pytest.mark.parametrize(
    ("payload", "reason", "number"),
    [
        (b"", Reason.BAD_MESSAGE, ""),
        (b"check", Reason.BAD_MESSAGE, ""),
        (b"\xff\xfe\x00", Reason.BAD_MESSAGE, ""),
        (b"[]", Reason.BAD_MESSAGE, ""),
        (b"[" * 4000, Reason.BAD_MESSAGE, ""),
        (b'{"a":' * 600 + b"1" + b"}" * 600, Reason.BAD_MESSAGE, ""),
        (b" " * (MAX_COMMAND_BYTES + 1), Reason.BAD_MESSAGE, ""),
        (b"x" * 10_000_000, Reason.BAD_MESSAGE, ""),
        (b'{"v":1,"id":"a","id":"b"}', Reason.BAD_MESSAGE, ""),
        (b'{"v":1,"expires_at":' + b"9" * 3000 + b"}", Reason.BAD_MESSAGE, ""),
        (_command(v=2), Reason.BAD_MESSAGE, ""),
        (_command(v=True), Reason.BAD_MESSAGE, ""),
        (_command(id=...), Reason.BAD_MESSAGE, ""),
        (_command(id=7), Reason.BAD_MESSAGE, ""),
        (_command(id="x" * 65), Reason.BAD_MESSAGE, ""),
        (_command(id="a\nb"), Reason.BAD_MESSAGE, ""),
        (_command(action="install"), Reason.UNKNOWN_COMMAND, "c-1"),
        (_command(action=["check"]), Reason.UNKNOWN_COMMAND, "c-1"),
        (_command(action=...), Reason.UNKNOWN_COMMAND, "c-1"),
        (_command(url="https://elsewhere.example"), Reason.BAD_MESSAGE, "c-1"),
        (_command(line="../person"), Reason.BAD_MESSAGE, "c-1"),
        (_command(line=5), Reason.BAD_MESSAGE, "c-1"),
        (_command(expires_at=...), Reason.BAD_MESSAGE, "c-1"),
        (_command(expires_at="tomorrow"), Reason.BAD_MESSAGE, "c-1"),
        (_command(expires_at=1.5e18), Reason.BAD_MESSAGE, "c-1"),
        (_command(expires_at=True), Reason.BAD_MESSAGE, "c-1"),
        (_command(action="rollback", line=...), Reason.BAD_MESSAGE, "c-1"),
        (_command(action="report"), Reason.BAD_MESSAGE, "c-1"),
    ],
)
def test_bad_commands_are_refused_with_a_reason_and_their_id_where_they_have_one(
    payload: bytes, reason: Reason, number: str
) -> None:
    refusal = _admit(Gate(), payload)
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.id) == (reason, number)
    assert len(refusal.message) < 300
    assert refusal.message.isprintable()


@pytest.mark.fault("F82")
def test_a_stored_or_expired_command_does_nothing_and_is_answered() -> None:
    gate = Gate()
    retained = _admit(gate, _command(), retained=True)
    assert isinstance(retained, Refusal)
    assert retained.reason is Reason.COMMAND_RETAINED
    for expired in (NOW, NOW - 1, 0):
        refusal = _admit(gate, _command(expires_at=expired))
        assert isinstance(refusal, Refusal)
        assert refusal.reason is Reason.COMMAND_EXPIRED
    assert _admit(gate, _command()) == Check("c-1", "person"), "the id of a refused command is not used up"


def test_the_same_command_again_is_neither_carried_out_nor_answered() -> None:
    gate = Gate()
    assert isinstance(_admit(gate, _command()), Check)
    assert _admit(gate, _command()) is None
    assert _admit(gate, _command(action="rollback")) is None, "the id counts"
    assert gate.duplicates == 2


def test_a_bounded_number_of_ids_is_remembered() -> None:
    gate = Gate(GateLimits(burst=10_000), Seen(remembered=100))
    for number in range(1000):
        assert isinstance(_admit(gate, _command(id=f"c-{number}")), Check)
    assert _admit(gate, _command(id="c-999")) is None
    assert isinstance(_admit(gate, _command(id="c-0")), Check), "forgotten"


@pytest.mark.fault("F81")
def test_a_command_is_not_carried_out_again_after_a_restart(tmp_path: Path) -> None:
    assert isinstance(_admit(Gate(seen=Seen(Fs(tmp_path))), _command(action="rollback")), Rollback)
    again = Gate(seen=Seen(Fs(tmp_path)))
    assert _admit(again, _command(action="rollback")) is None
    assert again.duplicates == 1
    assert isinstance(_admit(again, _command(id="c-2")), Check)


@pytest.mark.fault("F81")
def test_a_command_that_cannot_be_remembered_is_refused(tmp_path: Path) -> None:
    gate = Gate(seen=Seen(Fs(tmp_path / "gone")))
    refusal = _admit(gate, _command(action="rollback"))
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.STATE_UNWRITABLE
    (tmp_path / "gone").mkdir()
    assert isinstance(_admit(gate, _command(action="rollback")), Rollback)


def test_of_too_many_commands_the_expired_ones_are_forgotten_first(tmp_path: Path) -> None:
    seen = Seen(Fs(tmp_path), remembered=3)
    for number, until in (("long", 900), ("short", 10), ("longer", 950)):
        seen.add(number, until, 0)
    seen.add("next", 990, 20)
    kept = Seen(Fs(tmp_path), remembered=3)
    assert [number in kept for number in ("long", "short", "longer", "next")] == [True, False, True, True]


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"seen":[["a"]]}', b"\xff" * 100, b" " * 70_000])
def test_a_damaged_memory_of_commands_is_an_empty_one(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "commands.json").write_bytes(data)
    seen = Seen(Fs(tmp_path))
    assert "c-1" not in seen
    seen.add("c-1", 10, 0)
    assert "c-1" in Seen(Fs(tmp_path))


@pytest.mark.fault("F85")
def test_a_flood_of_commands_is_cut_to_the_rate_and_not_answered_one_by_one() -> None:
    gate = Gate(GateLimits(burst=5, per_minute=60))
    verdicts = [_admit(gate, _command(id=f"c-{number}")) for number in range(205)]
    assert sum(isinstance(verdict, Check) for verdict in verdicts) == 5
    refusals = [verdict for verdict in verdicts if isinstance(verdict, Refusal)]
    assert len(refusals) == 2
    assert refusals[0].reason is Reason.COMMAND_FLOOD
    assert gate.flooded == 200
    assert isinstance(_admit(gate, _command(id="later"), at_s=1.0), Check), "one a second again"


@given(st.binary(max_size=300))
def test_no_bytes_are_taken_for_a_command_or_end_in_an_exception(payload: bytes) -> None:
    assert isinstance(_admit(Gate(), payload), Refusal)
    assert parse_hint(payload) is None


@given(
    st.dictionaries(
        st.sampled_from(["v", "id", "action", "line", "expires_at", "extra"]),
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.just("check"), st.just(1)),
    )
)
def test_any_json_object_is_admitted_only_with_a_valid_id_action_and_time(body: dict[str, Any]) -> None:
    verdict = _admit(Gate(), json.dumps(body).encode())
    if not isinstance(verdict, Refusal):
        assert verdict is not None
        assert body["expires_at"] > NOW
        assert body["v"] == 1


def test_hints_are_read_strictly() -> None:
    assert parse_hint(b'{"v":1,"line":"person","spread_s":30}') == Hint("person", 30)
    assert parse_hint(b'{"v":1,"line":null,"spread_s":0}') == Hint(None, 0)
    for bad in (
        b'{"v":1,"line":null}',
        b'{"v":1,"line":null,"spread_s":-1}',
        b'{"v":1,"line":null,"spread_s":99999999}',
        b'{"v":1,"line":null,"spread_s":true}',
        b'{"v":1,"line":"../x","spread_s":1}',
        b'{"v":1,"line":null,"spread_s":1,"url":"x"}',
        b"[" * 500,
        b"",
        b"x" * 600,
    ):
        assert parse_hint(bad) is None
