"""A factory reset is finished whatever cuts it short, and an expelled device stays expelled."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agent import client, config, service
from agent.daemon import askers, reset, revoked
from agent.daemon.enrolling import opened
from agent.daemon.keys import FileKeys
from agent.errors import ConfigError, ControlError
from ota.client import keyring
from ota.client.fsops import Fs
from ota.errors import OtaError, StoreError

CANARY = b"what the old owner would not like to leave"


class Cut(BaseException):
    """The power went."""


def fill(state: Path) -> None:
    """A state directory as a life leaves it, with a canary in every kind of place."""
    FileKeys(state / "keys").create()
    (state / "keys" / "ring.cbs").write_bytes(CANARY)
    sealed = ("store/a.cbs", "inbox/c.part", "compiled/d.cmp", "captures/e.cap")
    for name in (*sealed, "releases/b.json", "enrolment/ca.crt", "meta/main/root.json"):
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_bytes(CANARY)
    for name in ("journal.a", "commands.json", "agent.toml"):
        (state / name).write_bytes(CANARY)
    (state / "link").symlink_to("/etc")
    (state / "lock").touch()


@contextlib.asynccontextmanager
async def expelled(state: Path) -> AsyncIterator[config.Config]:
    """A revoked device that answers people; yields where they find it."""
    (state / "agent.toml").write_text('state_dir = "."\nrun_dir = "run"\n')
    loaded = config.load(state / "agent.toml")
    revoked.mark(state)
    device = revoked.RevokedDevice(loaded, {})
    serving = asyncio.create_task(device.serve())
    try:
        while not loaded.control_socket.exists():
            await asyncio.sleep(0.01)
        yield loaded
    finally:
        device.leaving.set()
        await serving


def left(state: Path) -> set[str]:
    return {path.relative_to(state).as_posix() for path in state.rglob("*")}


def cutting_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Every call that changes the disk is counted, and the `number`-th ends the process before it happens."""
    calls = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                raise Cut
            return real(*args, **kwargs)

        return call

    for name in ("unlink", "rename", "fsync", "rmdir", "pwrite", "mkdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return lambda: calls[0]


def test_every_cut_ends_in_the_old_life_or_in_a_finished_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number, ends = 0, {"old": 0, "reset": 0}
    while True:
        number += 1
        state = tmp_path / f"at{number}"
        state.mkdir()
        fill(state)
        before = left(state)
        with monkeypatch.context() as patched:
            calls = cutting_at(patched, number)
            try:
                reset.begin(state, owner=True)
                reset.finish(state)
                done = True
            except Cut:
                done = False
            made = calls()
        if done and made < number:
            break
        begun = reset.pending(state)
        finished = reset.finish(state)
        if begun or finished or done or "last-reset.json" in left(state):
            assert left(state) - {"last-reset.json.tmp"} == {"lock", "last-reset.json"}, number
            ends["reset"] += 1
        else:
            assert left(state) - {"reset.json.tmp"} == before, number
            ends["old"] += 1
        assert not reset.finish(state)
    assert ends["old"] >= 1
    assert ends["reset"] >= 20


def test_nothing_outside_the_state_directory_is_touched(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    state = tmp_path / "state"
    state.mkdir()
    fill(state)
    (state / "store" / "out").symlink_to(outside)
    (state / "keys" / "out").symlink_to(outside / "kept")
    reset.begin(state, owner=True)
    # a link among the keys cannot be overwritten, which is told; the next start goes on without it
    with pytest.raises(StoreError):
        reset.finish(state)
    assert reset.finish(state)
    assert (outside / "kept").exists()
    assert left(state) == {"lock", "last-reset.json"}


def test_a_folder_among_the_keys_does_not_hinder_a_reset_for_ever(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "keys" / "backup").mkdir()
    (tmp_path / "keys" / "backup" / "storage.key").write_bytes(CANARY)
    reset.begin(tmp_path, owner=True)
    with pytest.raises(StoreError):
        reset.finish(tmp_path)
    assert reset.finish(tmp_path)
    assert left(tmp_path) == {"lock", "last-reset.json"}


def test_a_full_disk_does_not_save_the_keys_of_an_expelled_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    real = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        # overwriting in place needs no room
        if any(data) and (tmp_path / "store" / "a.cbs").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    revoked.mark(tmp_path)
    assert revoked.is_marked(tmp_path)
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["wiped"]


def test_a_technician_may_not_reset_an_expelled_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        async with expelled(tmp_path) as loaded:
            await asyncio.to_thread(client.ask, loaded, "POST", "/reset", {"owner": False})

    for operator in (False, True):
        monkeypatch.setattr(askers, "of_user", lambda uid, may=operator: askers.Asker(uid, "somebody", may))
        if operator:
            asyncio.run(ask())
        else:
            with pytest.raises(ControlError) as caught:
                asyncio.run(ask())
            assert (caught.value.reason.value, bool(caught.value.hint)) == ("not_permitted", True)
        assert reset.pending(tmp_path) is operator


def test_whatever_an_expelled_device_is_asked_it_says_why_it_does_not(tmp_path: Path) -> None:
    asked = ["/cancel", "/check", "/config", "/keys/rotate", "/keys/seal", "/retry", "/rollback", "/sideload"]

    async def ask() -> None:
        shown = [("GET", path) for path in ("/config", "/keys", "/modules")]
        async with expelled(tmp_path) as loaded:
            for method, path in [*shown, *(("POST", path) for path in asked)]:
                with pytest.raises(OtaError) as caught:
                    await asyncio.to_thread(client.ask, loaded, method, path)
                assert (caught.value.reason.value, caught.value.hint) == ("device_revoked", revoked.HINT), path

    asyncio.run(ask())


def test_an_operator_who_may_not_look_into_the_state_directory_can_wait_for_the_end_of_a_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "agent.toml").write_text('state_dir = "state/inner"\n')
    loaded = config.load(tmp_path / "agent.toml")
    (tmp_path / "state" / "inner").mkdir(parents=True)
    answers = iter([True, False])
    monkeypatch.setattr(client, "daemon_runs", lambda _: next(answers))
    (tmp_path / "state").chmod(0o000)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            reset.pending(loaded.state_dir)
        client.wait_until_gone(loaded)
    finally:
        os.seteuid(user)
        (tmp_path / "state").chmod(0o700)
    assert next(answers, None) is None


def test_the_record_of_a_reset_names_the_owner_only_when_it_stays_his(tmp_path: Path) -> None:
    for owner in (True, False):
        state = tmp_path / str(owner)
        state.mkdir()
        reset.begin(state, owner=owner)
        assert reset.finish(state)
        told = reset.last(state)
        assert told is not None
        assert told["device"] == ""  # this one was not enrolled
        assert told["wall_s"] > 1_700_000_000
        assert reset.last(state) is None


def test_a_new_life_begins_with_other_keys(tmp_path: Path) -> None:
    with opened(tmp_path) as custody:
        old = custody.create()
    reset.begin(tmp_path, owner=False)
    with opened(tmp_path) as custody:  # finishes the reset first
        new = custody.create()
    assert old.storage != new.storage
    assert not keyring.is_wiped(Fs(tmp_path))


def test_every_cut_of_an_expulsion_ends_in_an_expelled_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = 0
    while True:
        number += 1
        state = tmp_path / f"at{number}"
        state.mkdir()
        fill(state)
        with monkeypatch.context() as patched:
            calls = cutting_at(patched, number)
            try:
                revoked.mark(state)
                done = True
            except Cut:
                done = False
            made = calls()
        if done and made < number:
            break
        if not revoked.is_marked(state):
            assert (state / "keys" / "ring.cbs").read_bytes() == CANARY
            continue
        revoked.wipe(state)
        assert [path.name for path in (state / "keys").iterdir()] == ["wiped"]
        assert [name for name in ("store", "inbox", "compiled", "captures") if list((state / name).iterdir())] == []
    assert number > 10


def test_beside_a_dead_daemon_an_expelled_device_opens_no_key_although_a_cut_spared_them(tmp_path: Path) -> None:
    """The cut came between the mark and the end of the keys, and the daemon was not started since."""
    state = tmp_path / "state"
    loaded = config.parse({"state_dir": str(state), "run_dir": str(tmp_path / "run")}, tmp_path / "agent.toml")

    def install() -> object:
        asker = askers.of_user(os.getuid())
        beside = service.sideload_beside(loaded, {}, tmp_path, asker, allow_expired=False)
        return asyncio.run(beside)

    def show() -> object:
        return service.keys_once(loaded, {}, "show", storage=True, hpke=False, keep_tls=False)

    def settings() -> object:
        return service.config_once(loaded, None)

    for act in (install, show, settings):
        FileKeys(state / "keys").create()
        Fs(state).write_atomic(revoked.MARK, b'{"v":1}')
        with pytest.raises(ControlError) as caught:
            act()
        assert (caught.value.reason.value, caught.value.hint) == ("device_revoked", revoked.HINT)
        assert [path.name for path in (state / "keys").iterdir()] == ["wiped"]
        shutil.rmtree(state)


def test_an_expelled_device_is_not_enrolled_again_before_it_was_reset(tmp_path: Path) -> None:
    FileKeys(tmp_path / "keys").create()
    revoked.mark(tmp_path)
    with pytest.raises(ConfigError) as caught, opened(tmp_path):
        pass
    assert (caught.value.reason.value, "reset" in caught.value.hint) == ("device_revoked", True)
    assert json.loads((tmp_path / revoked.MARK).read_bytes())["v"] == 1
    reset.begin(tmp_path, owner=False)
    with opened(tmp_path) as custody:
        custody.create()
