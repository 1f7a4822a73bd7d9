"""Captures: sealed on arrival, within budgets, of no use without the operator's key."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from agent import memfd
from agent.daemon.captures import FOLDER, Captures
from agent.ruleconfig import CaptureConfig
from ota import capture
from ota.client.fsops import Fs
from ota.errors import PayloadError, Reason

PRIVATE = X25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = PRIVATE.public_key().public_bytes_raw()
FACTS = {"line": "person", "rule": "gate", "score": 0.91}


class Moments:
    """A clock that somebody turns."""

    def __init__(self) -> None:
        self.s = 0.0

    def now(self) -> datetime.datetime:
        return datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=self.s)


def captures(root: Path, moments: Moments, **changes: object) -> Captures:
    config = CaptureConfig(**{"operator_key": PUBLIC, **changes})
    return Captures(Fs(root), config, "cam-1", clock=lambda: moments.s, now=moments.now)


def keep(kept: Captures, picture: bytes) -> str:
    fd = memfd.of_bytes("picture", picture)
    try:
        return kept.keep(fd, FACTS)
    finally:
        os.close(fd)


def test_a_kept_picture_opens_with_the_operators_key_and_lies_nowhere_in_clear(tmp_path: Path) -> None:
    picture = os.urandom(50_000)
    name = keep(captures(tmp_path, Moments()), picture)
    [path] = (tmp_path / FOLDER).iterdir()
    assert path.name == f"{name}{capture.SUFFIX}"
    assert capture.NAME_PATTERN.fullmatch(name)
    assert picture[:64] not in path.read_bytes()
    header, opened = capture.open_with(path.read_bytes(), PRIVATE)
    assert opened == picture
    assert {**FACTS, "device": "cam-1", "name": name}.items() <= header.items()


def test_without_an_operators_key_nothing_is_kept(tmp_path: Path) -> None:
    assert keep(captures(tmp_path, Moments(), operator_key=b""), b"jpeg") == ""
    assert not (tmp_path / FOLDER).exists()


def test_the_oldest_make_room_for_the_newest(tmp_path: Path) -> None:
    moments = Moments()
    kept = captures(tmp_path, moments, max_mb=1.0)
    names = []
    for _ in range(6):
        moments.s += 1
        names.append(keep(kept, os.urandom(300_000)))
    left = sorted(path.stem for path in (tmp_path / FOLDER).iterdir())
    assert left == names[-3:]


def test_no_more_than_the_budget_of_an_hour_is_kept(tmp_path: Path) -> None:
    moments = Moments()
    kept = captures(tmp_path, moments, max_per_hour=2)
    assert [bool(keep(kept, b"jpeg")) for _ in range(3)] == [True, True, False]
    assert kept.refused == 1
    moments.s += 3601
    assert keep(kept, b"jpeg")


def test_a_picture_that_no_budget_holds_costs_none_of_the_others(tmp_path: Path) -> None:
    kept = captures(tmp_path, Moments(), max_mb=1.0)
    name = keep(kept, os.urandom(300_000))
    assert keep(kept, os.urandom(1_000_000)) == ""
    assert [path.stem for path in (tmp_path / FOLDER).iterdir()] == [name]
    assert kept.refused == 1


def test_captures_leave_the_disk_that_state_and_updates_need(tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    kept = Captures(
        Fs(tmp_path), CaptureConfig(PUBLIC), "cam-1", clock=lambda: 0.0, now=lambda: now, reserve_bytes=1 << 60
    )
    assert keep(kept, b"jpeg") == ""
    assert kept.refused == 1


def test_an_empty_picture_or_one_beyond_the_limit_is_not_kept(tmp_path: Path) -> None:
    kept = captures(tmp_path, Moments())
    fd = memfd.create("huge", capture.MAX_PICTURE_BYTES + 1)
    memfd.seal(fd)
    assert kept.keep(fd, FACTS) == ""
    os.close(fd)
    assert keep(kept, b"") == ""


def test_another_key_is_told_so(tmp_path: Path) -> None:
    sealed = capture.seal(b"jpeg", PUBLIC, FACTS)
    with pytest.raises(PayloadError) as caught:
        capture.open_with(sealed, X25519PrivateKey.generate())
    assert caught.value.reason is Reason.NOT_FOR_THIS_DEVICE


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_byte_of_a_capture_can_be_changed(position: int, flip: int) -> None:
    sealed = bytearray(SEALED)
    sealed[position % len(sealed)] ^= flip
    try:
        header, picture = capture.open_with(bytes(sealed), PRIVATE)
    except PayloadError:
        return
    # a change that JSON does not see, such as another spelling of the same header
    assert picture == b"jpeg" * 50
    assert header.items() >= FACTS.items()


SEALED = capture.seal(b"jpeg" * 50, PUBLIC, FACTS)


@given(st.binary(max_size=300))
def test_what_is_no_capture_is_refused_with_its_reason(data: bytes) -> None:
    with pytest.raises(PayloadError):
        capture.open_with(data, PRIVATE)


def test_a_truncated_capture_is_refused() -> None:
    for cut in (1, 20, len(SEALED) // 2):
        with pytest.raises(PayloadError):
            capture.open_with(SEALED[:-cut], PRIVATE)
