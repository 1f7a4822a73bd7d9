"""Updates that meet: two sources of one line, two lines and one accelerator, and an update that hangs or is stopped."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner

from ota.client.machine import State
from ota.client.ports import UpdateEvent
from ota.client.updater import Updater
from ota.errors import OtaError, Reason, Rejected, TransferError
from ota.payload import key_id
from tests.fakes.host import golden_for
from tests.ota.client.conftest import LINE, Device, model, run


async def until(true: Callable[[], Any]) -> None:
    while not true():
        await asyncio.sleep(0.001)


async def reaching(updater: Updater, state: State) -> asyncio.Task[list[UpdateEvent]]:
    """A check that is under way, with its line in `state`."""
    task = asyncio.create_task(updater.check())
    await until(lambda: updater.record.line(LINE).state is state)
    return task


# -- time-outs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "limit", "outcome"),
    [
        ("self_test", "testing_timeout_s", "failed"),
        ("activate", "activating_timeout_s", "rolled_back"),
        ("probation", "probation_timeout_s", "rolled_back"),
    ],
)
def test_a_host_that_never_answers_ends_the_update_and_leaves_the_old_release(
    committed: Device, step: str, limit: str, outcome: str
) -> None:
    committed.release("1.1.0")
    committed.host.hold[step, "1.1.0"] = asyncio.Event()
    committed.with_limits(**{limit: 0.05})
    updater = committed.reboot()
    event = committed.check(updater)
    assert (event.outcome, event.reason) == (outcome, Reason.STATE_TIMEOUT)
    assert event.hint
    assert committed.serving == "1.0.0"
    assert not updater.record.line(LINE).quarantine
    committed.host.hold.clear()
    assert committed.check(updater).outcome == "committed"


def test_a_candidate_that_hangs_in_every_trial_is_quarantined_after_the_last(committed: Device) -> None:
    committed.release("1.1.0")
    committed.host.hold["self_test", "1.1.0"] = asyncio.Event()
    committed.with_limits(testing_timeout_s=0.02)
    updater = committed.reboot()

    async def scenario() -> list[Reason | None]:
        return [(await updater.check())[-1].reason for _ in range(5)]

    reasons = run(scenario())
    assert reasons == [Reason.STATE_TIMEOUT] * 3 + [Reason.INTERRUPTED, Reason.QUARANTINED]


def test_a_decoding_that_never_ends_fails_without_blaming_the_release(committed: Device) -> None:
    committed.release("1.1.0")
    committed.with_limits(verifying_timeout_s=0.05)
    updater = committed.reboot()

    async def never(*_: object) -> int:
        await asyncio.Event().wait()
        return -1

    committed.host.transform = never  # type: ignore[method-assign]
    event = committed.check(updater)
    assert (event.outcome, event.reason) == ("failed", Reason.STATE_TIMEOUT)
    assert not updater.record.line(LINE).quarantine


def test_a_roll_back_that_never_ends_is_told_and_ends(committed: Device) -> None:
    committed.release("1.1.0")
    committed.with_limits(probation_timeout_s=0.02, revert_timeout_s=0.02)
    committed.host.hold["probation", "1.1.0"] = committed.host.hold["revert", "1.0.0"] = asyncio.Event()
    updater = committed.reboot()
    assert committed.check(updater).outcome == "rolled_back"
    assert any("does not serve" in event.message for event in committed.events)
    assert updater.record.line(LINE).state is State.IDLE


# -- stopping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["self_test", "activate", "probation"])
def test_an_update_that_is_cancelled_says_so_and_the_old_release_serves(committed: Device, step: str) -> None:
    committed.release("1.1.0")
    updater = committed.reboot()
    committed.host.hold[step, "1.1.0"] = asyncio.Event()
    state = {"self_test": State.TESTING, "activate": State.ACTIVATING, "probation": State.PROBATION}[step]

    async def scenario() -> list[UpdateEvent]:
        round_ = await reaching(updater, state)
        assert await updater.cancel(LINE)
        assert not await updater.cancel(LINE)
        return await round_

    (event,) = run(scenario())
    assert (event.outcome, event.reason, event.version) == ("failed", Reason.OPERATOR, "1.1.0")
    assert committed.serving == "1.0.0"
    assert updater.record.line(LINE).state is State.IDLE
    committed.host.hold.clear()
    assert committed.check(updater).outcome == "committed"


def test_a_line_is_free_again_after_an_update_that_was_cancelled_twice_while_it_cleared_up(committed: Device) -> None:
    committed.release("1.1.0")
    updater = committed.reboot()
    clearing, cleared = asyncio.Event(), asyncio.Event()

    async def slow_to_leave(_: object) -> Any:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            clearing.set()
            try:
                await asyncio.sleep(0.05)
            finally:
                cleared.set()
            raise

    original = committed.host.self_test
    committed.host.self_test = slow_to_leave  # type: ignore[method-assign, assignment]

    async def scenario() -> None:
        round_ = await reaching(updater, State.TESTING)
        round_.cancel()
        await clearing.wait()
        round_.cancel()
        await asyncio.gather(round_, return_exceptions=True)
        await cleared.wait()
        await asyncio.sleep(0)
        committed.host.self_test = original  # type: ignore[method-assign]
        assert (await updater.check())[-1].outcome == "committed"

    run(scenario())


def test_a_revert_that_was_interrupted_is_made_up_for_before_anything_else(committed: Device) -> None:
    committed.release("1.1.0")
    updater = committed.reboot()
    committed.host.hold["probation", "1.1.0"] = asyncio.Event()

    async def scenario() -> None:
        round_ = await reaching(updater, State.PROBATION)
        gate = committed.host.hold["revert", "1.0.0"] = asyncio.Event()
        stopping = asyncio.create_task(updater.cancel(LINE))
        await until(lambda: committed.host.calls[-1][0] == "revert")
        stopping.cancel()
        await asyncio.gather(round_, stopping, return_exceptions=True)
        assert committed.serving == "1.1.0"  # by accident
        gate.set()
        committed.host.hold.clear()
        committed.transport.unreachable = True
        await updater.check()
        assert [call[:3] for call in committed.host.calls[-4:]] == [
            ("revert", LINE, "1.0.0"), ("self_test", LINE, "1.1.0"), ("activate", LINE, "1.1.0"),
            ("probation", LINE, "1.1.0"),
        ]  # fmt: skip

    run(scenario())


def _gives_up(device: Device) -> Updater:
    """An update that fails in its probation and whose roll-back waits at `hold["revert", "1.0.0"]`."""
    device.release("1.1.0")
    device.host.faults["probation", "1.1.0"] = Rejected(Reason.WORKER_CRASHED, "it died")
    device.host.hold["revert", "1.0.0"] = asyncio.Event()
    return device.reboot()


async def _reverting(device: Device, updater: Updater) -> asyncio.Task[list[UpdateEvent]]:
    round_ = asyncio.create_task(updater.check())
    await until(lambda: device.host.calls[-1][0] == "revert")
    return round_


def test_a_failed_update_that_is_cancelled_while_it_goes_back_still_goes_back(committed: Device) -> None:
    updater = _gives_up(committed)

    async def scenario() -> None:
        round_ = await _reverting(committed, updater)
        stopping = asyncio.create_task(updater.cancel(LINE))
        await until(lambda: committed.host.calls[-2][0] == "revert")
        committed.host.hold["revert", "1.0.0"].set()
        await asyncio.gather(round_, stopping)

    run(scenario())
    assert committed.serving == "1.0.0"
    line = updater.record.line(LINE)
    assert (line.state, list(line.quarantine.values())) == (State.IDLE, [Reason.WORKER_CRASHED])


def test_crashes_of_a_candidate_that_is_being_replaced_do_not_stop_that(committed: Device) -> None:
    updater = _gives_up(committed)

    async def scenario() -> list[UpdateEvent]:
        round_ = await _reverting(committed, updater)
        (candidate,) = updater.record.line(LINE).quarantine
        assert await updater.unfit(LINE, candidate, CRASHES) is None
        committed.host.hold["revert", "1.0.0"].set()
        return await round_

    (event,) = run(scenario())
    assert (event.outcome, event.reason, committed.serving) == ("rolled_back", Reason.WORKER_CRASHED, "1.0.0")


def test_an_update_that_does_not_end_keeps_its_own_line_alone(device: Device) -> None:
    person = device.release("1.0.0", grant=False)
    data = model(77)
    meter = device.repository.build("meter", "2.0.0", {"int8": data}, golden_for(data))
    device.grant(person)
    device.with_limits(cancel_timeout_s=0.02, lock_wait_s=0.02)
    updater = device.reboot()
    leave = asyncio.Event()
    original = device.host.self_test

    async def deaf(candidate: Any) -> Any:
        if candidate.line != LINE:
            return await original(candidate)
        while not leave.is_set():
            try:
                await leave.wait()
            except asyncio.CancelledError:
                continue
        raise asyncio.CancelledError

    device.host.self_test = deaf  # type: ignore[method-assign]

    async def scenario() -> None:
        round_ = await reaching(updater, State.TESTING)
        with pytest.raises(OtaError, match="does not end") as stuck:
            await updater.cancel(LINE)
        assert stuck.value.reason is Reason.BUSY
        device.grant(person, meter)
        assert [(event.line, event.outcome) for event in await updater.check()] == [("meter", "committed")]
        leave.set()
        await round_

    run(scenario())


# -- the accelerator ---------------------------------------------------------------------------------------------------


def _two_lines(device: Device) -> Updater:
    person = device.release("1.0.0", grant=False)
    data = model(77)
    device.grant(person, device.repository.build("meter", "2.0.0", {"int8": data}, golden_for(data)))
    device.host.accelerators = ["tpu"]
    return device.reboot()


def test_two_lines_try_their_candidates_on_one_accelerator_one_after_the_other(device: Device) -> None:
    updater = _two_lines(device)
    gate = device.host.hold["self_test", "1.0.0"] = device.host.hold["self_test", "2.0.0"] = asyncio.Event()

    async def scenario() -> None:
        round_ = asyncio.create_task(updater.check())
        await until(lambda: any(view.name == "tpu" and view.waiting for view in updater.locks()))
        (held,) = [view for view in updater.locks() if view.name == "tpu"]
        assert {held.owner, *held.waiting} == {LINE, "meter"}
        assert [call[0] for call in device.host.calls] == ["self_test"]
        # who waits has no attempt on its record
        assert updater.record.line(held.waiting[0]).attempts == 0
        gate.set()
        assert {event.outcome for event in await round_} == {"committed"}

    run(scenario())
    steps = [call[0] for call in device.host.calls if call[0] != "probation"]
    assert steps == ["self_test", "activate", "self_test", "activate"]


def test_an_accelerator_that_does_not_come_free_postpones_the_trial_and_fetches_nothing_again(device: Device) -> None:
    device.with_limits(lock_wait_s=0.05)
    updater = _two_lines(device)
    gate = device.host.hold["activate", "1.0.0"] = device.host.hold["activate", "2.0.0"] = asyncio.Event()

    async def scenario() -> None:
        round_ = asyncio.create_task(updater.check())
        await until(lambda: any(event.reason is Reason.BUSY for event in device.events))
        gate.set()
        ended = await round_
        assert sorted(event.outcome or "" for event in ended) == ["committed", "failed"]
        asked = len(device.transport.asked)
        assert "committed" in {event.outcome for event in await updater.check()}
        assert len(device.transport.asked) == asked

    run(scenario())


def test_a_waiting_candidate_that_finds_its_accelerator_in_use_goes_on_waiting(committed: Device) -> None:
    committed.release("1.1.0")
    committed.with_limits(lock_wait_s=0.02)
    updater = committed.reboot()
    committed.host.hold["probation", "1.1.0"] = asyncio.Event()
    committed.host.accelerators = ["tpu"]

    async def scenario() -> None:
        await reaching(updater, State.PROBATION)
        await updater.cancel(LINE)
        committed.host.hold.clear()
        async with updater._locks.exclusive("tpu", "another", wait_s=1, timeout_s=5):
            event = (await updater.check())[-1]
        assert (event.outcome, event.reason) == ("failed", Reason.BUSY)
        assert updater.record.line(LINE).attempts == 1
        assert (await updater.check())[-1].outcome == "committed"

    run(scenario())


def test_a_candidate_waiting_for_a_line_that_the_device_has_no_more_does_not_wait_for_ever(committed: Device) -> None:
    committed.release("1.1.0")
    updater = committed.reboot()
    committed.host.hold["probation", "1.1.0"] = asyncio.Event()

    async def interrupted() -> None:
        await reaching(updater, State.PROBATION)
        await updater.cancel(LINE)

    run(interrupted())
    assert updater.record.line(LINE).candidate is not None

    def unknown(_: object) -> list[str]:
        raise Rejected(Reason.INCOMPATIBLE, "this device has no line 'person'")

    committed.host.exclusive = unknown  # type: ignore[method-assign]
    event = committed.check(updater)
    assert (event.reason, committed.serving) == (Reason.INCOMPATIBLE, "1.0.0")
    line = updater.record.line(LINE)
    assert (line.candidate, dict(line.quarantine)) == (None, {})


# -- a stick and the network -------------------------------------------------------------------------------------------


@pytest.fixture
def stick(committed: Device, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a stick with what is granted now."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        committed.repository.write(folder, committed.identity.device)
        return folder

    return make


@pytest.mark.fault("F65")
def test_a_newer_release_on_a_stick_takes_the_place_of_a_running_update(
    committed: Device, stick: Callable[[str], Path]
) -> None:
    older = committed.release("1.1.0", grant=False)
    committed.release("1.2.0")
    newer = stick("newer")
    committed.grant(older)
    updater = committed.reboot()
    committed.host.hold["probation", "1.1.0"] = asyncio.Event()

    async def scenario() -> tuple[list[UpdateEvent], list[UpdateEvent]]:
        round_ = await reaching(updater, State.PROBATION)
        return await updater.sideload(newer), await round_

    sideloaded, online = run(scenario())
    assert [(event.version, event.outcome) for event in sideloaded] == [("1.2.0", "committed")]
    assert [(event.version, event.outcome, event.reason) for event in online] == [
        ("1.1.0", "failed", Reason.SUPERSEDED)
    ]
    assert "1.2.0" in online[0].message
    assert committed.serving == "1.2.0"


@pytest.mark.fault("F65")
def test_an_older_release_on_a_stick_gives_way_to_the_running_update_and_says_so(
    committed: Device, stick: Callable[[str], Path]
) -> None:
    committed.release("1.1.0")
    older = stick("older")
    committed.release("1.2.0")
    updater = committed.reboot()
    gate = committed.host.hold["probation", "1.2.0"] = asyncio.Event()

    async def scenario() -> tuple[list[UpdateEvent], list[UpdateEvent]]:
        round_ = await reaching(updater, State.PROBATION)
        sideloaded = await updater.sideload(older)
        gate.set()
        return sideloaded, await round_

    (refused,), (online,) = run(scenario())
    assert (refused.version, refused.outcome, refused.reason) == ("1.1.0", "failed", Reason.SUPERSEDED)
    assert "1.2.0" in refused.message
    assert refused.hint
    assert online.outcome == "committed"
    assert committed.serving == "1.2.0"


def test_a_stick_whose_release_may_not_run_here_does_not_disturb_the_running_update(
    committed: Device, stick: Callable[[str], Path]
) -> None:
    older = committed.release("1.1.0", grant=False)
    committed.release("1.2.0", edit=lambda release: release.update(requires={"agent": ">=9.0", "profiles": []}))
    useless = stick("useless")
    committed.grant(older)
    updater = committed.reboot()
    gate = committed.host.hold["probation", "1.1.0"] = asyncio.Event()

    async def scenario() -> tuple[list[UpdateEvent], list[UpdateEvent]]:
        round_ = await reaching(updater, State.PROBATION)
        sideloaded = await updater.sideload(useless)
        gate.set()
        return sideloaded, await round_

    (refused,), (online,) = run(scenario())
    assert refused.reason is Reason.INCOMPATIBLE
    assert online.outcome == "committed"


def test_a_newer_release_that_still_waits_for_its_line_does_not_make_room_for_an_older_one(
    committed: Device, stick: Callable[[str], Path]
) -> None:
    oldest = committed.release("1.1.0", grant=False)
    middle = committed.release("1.2.0", grant=False)
    committed.release("1.3.0")
    newest = stick("newest")
    committed.grant(middle)
    older = stick("older")
    committed.grant(oldest)
    updater = committed.reboot()
    committed.host.hold["probation", "1.1.0"] = asyncio.Event()
    gate = committed.host.hold["revert", "1.0.0"] = asyncio.Event()

    async def scenario() -> tuple[list[UpdateEvent], list[UpdateEvent]]:
        round_ = await reaching(updater, State.PROBATION)
        first = asyncio.create_task(updater.sideload(newest))
        await until(lambda: ("revert", LINE, "1.0.0", "int8") in committed.host.calls)
        second = await updater.sideload(older)
        gate.set()
        await round_
        return await first, second

    (first,), (second,) = run(scenario())
    assert (first.version, first.outcome) == ("1.3.0", "committed")
    assert (second.version, second.reason) == ("1.2.0", Reason.SUPERSEDED)


def _part_of(device: Device) -> list[str]:
    assert isinstance(device.disk, Path)
    return [path.name for path in (device.disk / "inbox").iterdir() if path.suffix == ".part"]


@pytest.mark.parametrize("on_it", ["installed", "older"])
def test_a_stick_that_brings_nothing_newer_leaves_what_waits_for_its_trial_alone(
    committed: Device, stick: Callable[[str], Path], on_it: str
) -> None:
    if on_it == "older":
        committed.release("1.1.0")
    folder = stick(on_it)
    committed.release("1.2.0")
    committed.host.faults["self_test", "1.2.0"] = Rejected(Reason.BUSY, "no room for a trial")
    updater = committed.reboot()
    assert committed.check(updater).reason is Reason.BUSY
    (event,) = run(updater.sideload(folder))
    told = {"installed": ("up_to_date", None), "older": ("failed", Reason.SUPERSEDED)}
    assert (event.outcome, event.reason) == told[on_it]
    waiting = updater.record.line(LINE).candidate
    assert waiting is not None
    assert waiting.version == "1.2.0"
    committed.host.faults.clear()
    committed.transports = ()
    assert committed.check(committed.reboot()).reason is None
    assert committed.serving == "1.2.0"


def test_a_newer_release_on_a_stick_takes_the_place_of_what_waits_for_its_trial(
    committed: Device, stick: Callable[[str], Path]
) -> None:
    older = committed.release("1.1.0", grant=False)
    committed.release("1.2.0")
    newer = stick("newer")
    committed.grant(older)
    committed.host.faults["self_test", "1.1.0"] = Rejected(Reason.BUSY, "no room for a trial")
    updater = committed.reboot()
    assert committed.check(updater).reason is Reason.BUSY
    (event,) = run(updater.sideload(newer))
    assert (event.version, event.outcome, committed.serving) == ("1.2.0", "committed", "1.2.0")


def test_a_stick_that_is_refused_costs_nothing_of_what_was_fetched(
    committed: Device, stick: Callable[[str], Path]
) -> None:
    committed.release("1.1.0", edit=lambda release: release.update(requires={"agent": ">=9.0", "profiles": []}))
    useless = stick("useless")
    committed.release("1.2.0")
    updater = committed.reboot()

    async def scenario() -> list[str]:
        round_ = await reaching(updater, State.FETCHING)
        await until(lambda: _part_of(committed))
        await updater.cancel(LINE)
        await round_
        return _part_of(committed)

    fetched = run(scenario())
    (event,) = run(updater.sideload(useless))
    assert (event.version, event.reason) == ("1.1.0", Reason.INCOMPATIBLE)
    assert _part_of(committed) == fetched
    assert updater.record.line(LINE).pending_version == "1.2.0"


def test_a_refusal_names_the_release_that_is_refused_and_not_the_one_that_was_wanted_before(committed: Device) -> None:
    first = committed.release("1.1.0")
    updater = committed.reboot()

    async def scenario() -> None:
        round_ = await reaching(updater, State.FETCHING)
        await updater.cancel(LINE)
        await round_

    run(scenario())
    assert updater.record.line(LINE).pending_sha256 == hashlib.sha256(first.data).hexdigest()
    committed.release("1.2.0", edit=lambda release: release.update(requires={"agent": ">=9.0", "profiles": []}))
    event = committed.check(updater)
    assert (event.version, event.outcome, event.reason) == ("1.2.0", "rejected", Reason.INCOMPATIBLE)


@pytest.mark.fault("F64")
def test_one_stick_twice_at_once_is_installed_once_and_then_is_installed_already(
    committed: Device, stick: Callable[[str], Path]
) -> None:
    committed.release("1.1.0")
    folder = stick("same")
    updater = committed.reboot()

    gate = committed.host.hold["self_test", "1.1.0"] = asyncio.Event()

    async def scenario() -> tuple[list[UpdateEvent], list[UpdateEvent], list[UpdateEvent]]:
        both = [asyncio.create_task(updater.sideload(folder)) for _ in range(2)]
        # either may come first
        (ended,), (running,) = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        gate.set()
        return await running, await ended, await updater.sideload(folder)

    first, second, third = run(scenario())
    assert first[-1].outcome == "committed"
    assert (second[-1].outcome, second[-1].reason) == ("failed", Reason.BUSY)
    assert (third[-1].outcome, third[-1].version) == ("up_to_date", "1.1.0")
    assert len([call for call in committed.host.calls if call[:3] == ("self_test", LINE, "1.1.0")]) == 1


def test_a_look_leaves_a_running_update_alone_and_says_nothing_of_it(committed: Device) -> None:
    committed.release("1.1.0")
    updater = committed.reboot()
    gate = committed.host.hold["probation", "1.1.0"] = asyncio.Event()

    async def scenario() -> None:
        round_ = await reaching(updater, State.PROBATION)
        assert await updater.check() == []
        gate.set()
        assert (await round_)[-1].outcome == "committed"

    run(scenario())


@pytest.mark.fault("F36")
def test_a_download_of_what_is_not_assigned_any_more_makes_room_for_what_is(committed: Device) -> None:
    committed.release("1.1.0")
    updater = committed.reboot()
    stalled = asyncio.Event()
    original = committed.transport.block

    async def slow(*args: Any) -> bytes:
        if not stalled.is_set():
            stalled.set()
            await asyncio.sleep(0.1)
        return await original(*args)

    committed.transport.block = slow  # type: ignore[method-assign]

    async def scenario() -> None:
        round_ = asyncio.create_task(updater.check())
        await stalled.wait()
        committed.release("1.2.0")
        assert [(event.version, event.outcome) for event in await updater.check()] == [("1.2.0", "committed")]
        assert [event.reason for event in await round_] == [Reason.SUPERSEDED]

    run(scenario())
    assert committed.serving == "1.2.0"


def _fetched_slowly(device: Device, meanwhile: Callable[[], object]) -> UpdateEvent:
    """An update during whose download something happens, so slow that the assignment is asked for again."""
    device.with_limits(recheck_s=0.0)
    updater = device.reboot()
    original, done = device.transport.block, []

    async def block(*args: Any) -> bytes:
        if not done:
            done.append(meanwhile())
        return await original(*args)

    device.transport.block = block  # type: ignore[method-assign]
    return device.check(updater)


@pytest.mark.fault("F36")
def test_a_release_whose_key_was_rotated_away_during_its_download_is_not_tried(committed: Device) -> None:
    built = committed.release("1.1.0")
    simulator = committed.repository

    def rotate() -> None:
        role = f"release-{LINE}"
        delegations = simulator.top.signed.delegations
        assert delegations is not None
        assert delegations.roles is not None
        key = CryptoSigner.generate_ed25519()
        simulator.signers[role] = key
        delegations.roles[role].keyids = [key.public_key.keyid]
        delegations.keys[key.public_key.keyid] = key.public_key
        del simulator.roles[role].signed.targets[built.path]
        simulator.publish()

    event = _fetched_slowly(committed, rotate)
    assert (event.version, event.outcome, event.reason) == ("1.1.0", "failed", Reason.METADATA_MISMATCH)
    assert ("self_test", LINE, "1.1.0") not in [call[:3] for call in committed.host.calls]
    assert committed.serving == "1.0.0"
    # what was fetched is not at fault: listed again, it is taken without a byte
    simulator.list_release(built)
    asked = len(committed.transport.asked)
    assert committed.check().outcome == "committed"
    assert len(committed.transport.asked) == asked


@pytest.mark.fault("F36")
def test_a_release_withdrawn_during_its_download_is_not_tried_and_nothing_blames_it(committed: Device) -> None:
    committed.release("1.1.0")
    event = _fetched_slowly(committed, committed.grant)
    assert (event.version, event.outcome, event.reason) == ("1.1.0", "failed", Reason.SUPERSEDED)
    assert committed.serving == "1.0.0"
    assert run(committed.reboot().check()) == []


def test_who_cannot_be_asked_again_after_a_download_takes_nothing_back(committed: Device) -> None:
    committed.release("1.1.0")
    original = committed.transport.metadata

    async def away(*args: Any) -> bytes:
        raise TransferError(Reason.SOURCE_UNREACHABLE, "the broker is away")

    def leave() -> None:
        committed.transport.metadata = away  # type: ignore[method-assign]

    event = _fetched_slowly(committed, leave)
    committed.transport.metadata = original  # type: ignore[method-assign]
    assert event.outcome == "committed"


# -- what a release does after its commit ------------------------------------------------------------------------------


def _installed(device: Device) -> Updater:
    device.release("1.1.0")
    updater = device.reboot()
    assert device.check(updater).outcome == "committed"
    device.events.clear()
    return updater


CRASHES = OtaError(Reason.WORKER_CRASHED, "5 crashes in 600 s")


@pytest.mark.fault("F74")
def test_a_committed_release_that_keeps_crashing_is_rolled_back_quarantined_and_told_once(committed: Device) -> None:
    updater = _installed(committed)
    active = updater.record.line(LINE).active
    assert active is not None
    event = run(updater.unfit(LINE, active.release_sha256, CRASHES))
    assert event is not None
    assert (event.outcome, event.reason, committed.serving) == ("rolled_back", Reason.WORKER_CRASHED, "1.0.0")
    assert "5 crashes in 600 s" in event.message
    assert run(updater.unfit(LINE, active.release_sha256, CRASHES)) is None
    assert [e.outcome for e in committed.events] == ["rolled_back"]
    again = committed.check(committed.reboot())
    assert (again.reason, committed.serving) == (Reason.QUARANTINED, "1.0.0")


def test_a_crashing_release_is_not_kept_by_an_update_under_way(committed: Device) -> None:
    updater = _installed(committed)
    active = updater.record.line(LINE).active
    assert active is not None
    committed.release("1.2.0")
    committed.host.hold["self_test", "1.2.0"] = asyncio.Event()

    async def scenario() -> list[UpdateEvent]:
        round_ = await reaching(updater, State.TESTING)
        event = await updater.unfit(LINE, active.release_sha256, CRASHES)
        assert event is not None
        assert event.outcome == "rolled_back"
        return await round_

    (stopped,) = run(scenario())
    assert stopped.reason is Reason.SUPERSEDED
    assert committed.serving == "1.0.0"
    committed.host.hold.clear()
    assert committed.check(updater).outcome == "committed"
    assert committed.serving == "1.2.0"


def test_without_a_release_before_it_a_crashing_one_stays(committed: Device) -> None:
    updater = committed.reboot()
    active = updater.record.line(LINE).active
    assert active is not None
    with pytest.raises(OtaError) as nothing:
        run(updater.unfit(LINE, active.release_sha256, CRASHES))
    assert nothing.value.reason is Reason.NOT_FOUND
    assert committed.serving == "1.0.0"


# -- an expelled device ------------------------------------------------------------------------------------------------


@pytest.mark.fault("F52")
def test_a_device_that_is_revoked_ends_its_updates_says_so_once_and_installs_nothing_more(
    committed: Device, stick: Callable[[str], Path]
) -> None:
    committed.release("1.1.0")
    folder = stick("before")
    told = []
    updater = committed.reboot()
    updater._on_revoked = lambda: told.append(1)
    committed.host.hold["self_test", "1.1.0"] = asyncio.Event()

    async def scenario() -> tuple[list[UpdateEvent], ...]:
        round_ = await reaching(updater, State.TESTING)
        committed.repository.grant(
            committed.identity.device,
            committed.key,
            edit=lambda desired: desired.unrecognized_fields.update(revoked=True),
        )
        return await updater.check(), await round_, await updater.check(), await updater.sideload(folder)

    for events in run(scenario()):
        assert [event.reason for event in events] == [Reason.DEVICE_REVOKED]
    assert told == [1]
    assert committed.serving == "1.0.0"


def test_a_replayed_word_that_revoked_the_board_before_does_not_reach_the_one_that_took_its_place(
    committed: Device,
) -> None:
    def about(keys: list[str]) -> list[UpdateEvent]:
        committed.repository.grant(
            committed.identity.device,
            committed.key,
            edit=lambda desired: desired.unrecognized_fields.update(revoked=True, revoked_keys=keys),
        )
        return run(updater.check())

    told = []
    updater = committed.reboot()
    updater._on_revoked = lambda: told.append(1)
    assert [event.reason for event in about(["0123456789abcdef"])] == [Reason.NOT_FOR_THIS_DEVICE]
    assert told == []
    own = key_id(committed.key.public_key().public_bytes_raw())
    assert [event.reason for event in about(["0123456789abcdef", own])] == [Reason.DEVICE_REVOKED]
    assert told == [1]
