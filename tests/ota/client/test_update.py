"""The whole way of an update against a simulated repository: what commits, and that nothing else does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tuf.api.metadata import TargetFile, Targets

from ota import payload
from ota.client.machine import State
from ota.errors import OtaError, PayloadError, Reason, Rejected, StoreError
from ota.release import LEAF_BYTES
from tests.fakes.host import golden_for
from tests.ota.client.conftest import DEVICE, LINE, Device, model, run
from tests.ota.client.simulator import Built, SimulatedTransport, sha256


def test_a_first_release_is_fetched_tried_and_committed(device: Device) -> None:
    built = device.release("1.0.0")
    event = device.check()
    assert (event.outcome, event.version, event.reason) == ("committed", "1.0.0", None)
    assert device.host.serving[LINE] == ("1.0.0", built.plain["int8"])
    assert [call[0] for call in device.host.calls] == ["self_test", "activate", "probation"]
    assert event.probation is not None
    assert event.tested is not None


def test_the_state_directory_holds_no_plaintext_and_no_leftovers(committed: Device) -> None:
    plain = committed.host.serving[LINE][1]
    files = [path for path in committed.disk.rglob("*") if path.is_file()]
    assert not any(plain[1000:1064] in path.read_bytes() for path in files)
    assert not [path for path in files if "inbox" in path.parts or path.suffix == ".tmp"]


def test_states_are_reported_in_the_order_of_the_machine(device: Device) -> None:
    device.release("1.0.0")
    device.check()
    states = [event.state for event in device.events if event.line == LINE]
    assert states == [
        "checking", "fetching", "verifying", "staging", "verifying", "staging", "testing", "activating",
        "probation", "idle",
    ]  # fmt: skip


def test_an_installed_release_is_not_fetched_again(committed: Device) -> None:
    asked = len(committed.transport.asked)
    assert committed.check().outcome == "up_to_date"
    assert len(committed.transport.asked) == asked


def test_a_check_that_finds_nothing_writes_nothing(committed: Device) -> None:
    updater = committed.reboot()
    run(updater.check())
    before = {path: path.stat().st_mtime_ns for path in committed.disk.rglob("*")}
    run(updater.check())
    assert {path: path.stat().st_mtime_ns for path in committed.disk.rglob("*")} == before


def test_a_device_without_an_assignment_does_nothing(device: Device) -> None:
    device.release("1.0.0", grant=False)
    assert run(device.reboot().check()) == []
    assert device.serving == ""


def test_the_previous_release_is_kept_and_the_one_before_it_collected(committed: Device) -> None:
    for version in ("1.1.0", "1.2.0"):
        committed.release(version)
        assert committed.check().outcome == "committed"
    record = committed.reboot().record.line(LINE)
    assert record.active is not None
    assert record.previous is not None
    assert (record.active.version, record.previous.version) == ("1.2.0", "1.1.0")
    committed.check()
    stored = {path.stem for path in (committed.disk / "store").iterdir()}
    assert sha256(model(100)) not in stored
    assert {sha256(model(110)), sha256(model(120))} <= stored


def test_lines_do_not_wait_for_each_other(device: Device) -> None:
    person = device.release("1.0.0", grant=False)
    data = model(77)
    meter = device.repository.build("meter", "2.0.0", {"int8": data}, golden_for(data))
    device.grant(person, meter)
    gate = device.host.hold["probation", "1.0.0"] = asyncio.Event()

    async def scenario() -> None:
        updater = device.boot()
        round_ = asyncio.create_task(updater.check())
        while "meter" not in device.host.serving or updater.record.line("meter").state is not State.IDLE:
            await asyncio.sleep(0.001)
        while updater.record.line(LINE).state is not State.PROBATION:
            await asyncio.sleep(0.001)
        assert (await updater.check(LINE))[-1].reason is Reason.BUSY
        gate.set()
        assert {event.outcome for event in await round_} == {"committed"}

    run(scenario())


# -- deltas ------------------------------------------------------------------------------------------------------------


def _tuned(data: bytes) -> bytes:
    return data[:50_000] + bytes(200) + data[50_200:]


def test_a_delta_from_the_installed_release_is_fetched_instead_of_the_full_payload(committed: Device) -> None:
    old = committed.repository.built[LINE, "1.0.0"]
    committed.release("1.1.0", data=_tuned(old.plain["int8"]), bases=[old])
    before = committed.transport.sent_bytes
    event = committed.check()
    assert event.outcome == "committed"
    assert "zstd-patch" in committed.host.transforms
    assert committed.transport.sent_bytes - before == event.traffic.fetched_bytes
    assert event.traffic.delta_bytes <= event.traffic.fetched_bytes < event.traffic.full_bytes / 10
    assert committed.host.serving[LINE][1] == _tuned(old.plain["int8"])


@pytest.mark.parametrize("fault", ["other_result", "crash", "missing", "flipped_blocks", "base_damaged"])
def test_a_delta_that_fails_falls_back_to_the_full_payload_once_and_says_so(committed: Device, fault: str) -> None:
    old = committed.repository.built[LINE, "1.0.0"]
    new = _tuned(old.plain["int8"])

    def tamper(name: str, kind: str, plain: bytes) -> bytes:
        return plain[:-1] + b"?" if kind.startswith("delta") and fault == "other_result" and name == "int8" else plain

    committed.release("1.1.0", data=new, bases=[old], tamper=tamper)
    updater = committed.reboot()
    expected = Reason.DELTA_MISMATCH
    if fault == "crash":
        expected = Reason.WORKER_CRASHED
        committed.host.faults["transform", "zstd-patch"] = Rejected(Reason.WORKER_CRASHED, "SIGSEGV")
    if fault == "missing":
        expected = Reason.NOT_FOUND
        full = {c["full"]["sha256"] for c in _files(committed, "1.1.0")}
        for digest in {d["payload"]["sha256"] for c in _files(committed, "1.1.0") for d in c["deltas"]} - full:
            del committed.repository.payloads[digest]
    if fault == "flipped_blocks":
        expected = Reason.TRANSFER_CORRUPT
        deltas = {d["payload"]["sha256"] for c in _files(committed, "1.1.0") for d in c["deltas"]}
        committed.transport.on_block = lambda digest, _, data: (data[:-1] + b"?") if digest in deltas else data
    if fault == "base_damaged":
        expected = Reason.PAYLOAD_CORRUPT
        path = committed.disk / "store" / f"{sha256(old.plain['int8'])}.cbs"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    event = committed.check(updater)
    assert event.outcome == "committed"
    assert committed.host.serving[LINE] == ("1.1.0", new)
    assert expected.value in committed.reasons


def _files(device: Device, version: str) -> list[dict[str, Any]]:
    document = json.loads(device.repository.built[LINE, version].data)
    return [*document["components"], document["golden"]]


# -- refusals: every one leaves 1.0.0 serving --------------------------------------------------------------------------


def _refused(device: Device, reason: Reason, outcome: str = "rejected") -> None:
    served = device.host.serving[LINE]
    event = device.check()
    assert (event.outcome, event.reason) == (outcome, reason), event
    assert device.host.serving[LINE] == served
    assert device.reboot().active(LINE).version == "1.0.0"
    assert device.serving == "1.0.0"


@pytest.mark.fault("F46")
@pytest.mark.parametrize(
    "requires", [{"agent": ">=9.0", "profiles": []}, {"agent": "", "profiles": ["jetson-orin-nano"]}]
)
def test_a_release_for_other_devices_is_refused_before_anything_is_downloaded(
    committed: Device, requires: dict[str, object]
) -> None:
    asked = len(committed.transport.asked)
    committed.release("1.1.0", edit=lambda release: release.update(requires=requires))
    _refused(committed, Reason.INCOMPATIBLE)
    assert len(committed.transport.asked) == asked


@pytest.mark.fault("F41")
def test_an_older_release_is_refused_even_if_the_director_assigns_it(committed: Device) -> None:
    old = committed.release("0.9.0", counter=1, grant=False)
    committed.grant(old)
    _refused(committed, Reason.COUNTER_ROLLBACK)


def _order_back(device: Device, counter: Any) -> None:
    device.repository.roles[f"release-{LINE}"].signed.unrecognized_fields["allow_rollback_to"] = counter
    device.repository.publish()


@pytest.fixture
def went_back(committed: Device) -> Device:
    """A device at counter 3 that the director told to run the release with counter 2."""
    committed.release("1.1.0")
    committed.release("1.2.0")
    assert committed.check().outcome == "committed"
    committed.grant(committed.repository.built[LINE, "1.1.0"])
    event = committed.check()
    assert (event.outcome, event.reason) == ("rejected", Reason.COUNTER_ROLLBACK)
    return committed


@pytest.mark.fault("F41")
@pytest.mark.parametrize("counter", [3, 4, 0])
def test_an_order_to_go_back_covers_no_release_below_it(went_back: Device, counter: int) -> None:
    _order_back(went_back, counter)
    event = went_back.check()
    assert (event.outcome, event.reason) == ("rejected", Reason.COUNTER_ROLLBACK)
    assert went_back.serving == "1.2.0"


@pytest.mark.fault("F41")
def test_an_order_of_the_release_role_lets_a_device_go_back_and_forward_again(went_back: Device) -> None:
    _order_back(went_back, 2)
    assert went_back.check().outcome == "committed"
    assert went_back.serving == "1.1.0"
    assert went_back.boot().record.line(LINE).floor_counter == 3  # going back lowers no floor
    went_back.repository.roles[f"release-{LINE}"].signed.unrecognized_fields.clear()
    went_back.repository.publish()
    assert went_back.check().outcome == "up_to_date"
    went_back.grant(went_back.repository.built[LINE, "1.2.0"])
    assert went_back.check().outcome == "committed"
    assert went_back.serving == "1.2.0"


@pytest.mark.fault("F41")
def test_an_order_to_go_back_does_not_reach_devices_that_came_further_since(went_back: Device, tmp_path: Path) -> None:
    _order_back(went_back, 1)
    stick = tmp_path / "stick"
    went_back.repository.write(stick, DEVICE)
    went_back.repository.roles[f"release-{LINE}"].signed.unrecognized_fields.clear()
    went_back.release("1.3.0")
    assert went_back.check().outcome == "committed"
    event = run(went_back.reboot().sideload(stick))[-1]
    assert (event.outcome, event.reason) == ("rejected", Reason.COUNTER_ROLLBACK)
    assert went_back.serving == "1.3.0"


@pytest.mark.fault("F41")
def test_an_order_to_go_back_in_the_directors_document_is_worth_nothing(went_back: Device) -> None:
    older = went_back.repository.built[LINE, "1.1.0"]
    went_back.grant(older, edit=lambda desired: desired.unrecognized_fields.update(allow_rollback_to=1))
    event = went_back.check()
    assert (event.outcome, event.reason) == ("rejected", Reason.COUNTER_ROLLBACK)


@pytest.mark.parametrize("counter", [-1, True, "2", None, 1 << 53])
def test_an_order_to_go_back_that_is_no_counter_refuses_the_line(went_back: Device, counter: object) -> None:
    _order_back(went_back, counter)
    event = went_back.check()
    assert (event.outcome, event.reason) == ("rejected", Reason.METADATA_MISMATCH)


@pytest.mark.fault("F47")
def test_keys_granted_to_another_device_do_not_open_here(committed: Device) -> None:
    built = committed.release("1.1.0", grant=False)
    committed.grant(built, grants_for="cam-2")
    asked = len(committed.transport.asked)
    _refused(committed, Reason.NOT_FOR_THIS_DEVICE)
    assert len(committed.transport.asked) == asked


@pytest.mark.fault("F48")
def test_a_key_granted_for_another_release_does_not_open(committed: Device) -> None:
    built = committed.release("1.1.0", grant=False)
    other = committed.release("1.2.0", grant=False)
    committed.grant(built)
    right = dict(built.ceks)
    committed.grant(other)

    def swap(desired: Targets) -> None:
        grants = desired.unrecognized_fields["grants"]
        values = list(grants.values())
        grants.clear()
        grants.update(zip(right, values, strict=True))

    other.ceks = dict(zip(other.ceks, right.values(), strict=True))
    committed.grant(other, edit=lambda desired: _retarget(desired, built, swap))
    _refused(committed, Reason.NOT_FOR_THIS_DEVICE)


def _retarget(desired: Targets, built: Built, swap: Callable[[Targets], None]) -> None:
    desired.targets = {built.path: TargetFile.from_data(built.path, built.data, ["sha256"])}
    swap(desired)


def test_a_release_without_a_grant_is_refused(committed: Device) -> None:
    built = committed.release("1.1.0", grant=False)
    committed.grant(built, edit=lambda desired: desired.unrecognized_fields.update(grants={}))
    _refused(committed, Reason.NO_GRANT)


@pytest.mark.fault("F51")
def test_a_grant_for_a_key_that_was_rotated_away_asks_for_a_new_grant(committed: Device) -> None:
    built = committed.release("1.1.0", grant=False)
    committed.repository.grant(DEVICE, X25519PrivateKey.generate(), built)
    _refused(committed, Reason.NO_GRANT)


@pytest.mark.fault("F51")
def test_during_a_rotation_grants_for_the_old_and_the_new_key_both_open(committed: Device) -> None:
    old, committed.key = committed.key, X25519PrivateKey.generate()
    committed.older_key = old
    for version, key in (("1.1.0", old), ("1.2.0", committed.key)):
        committed.repository.grant(DEVICE, key, committed.release(version, grant=False))
        assert committed.check().outcome == "committed"
    assert committed.serving == "1.2.0"


@pytest.mark.fault("F50")
def test_a_payload_that_authenticates_but_is_another_file_is_refused_and_quarantined(committed: Device) -> None:
    committed.release("1.1.0", tamper=lambda name, kind, plain: bytes(len(plain)) if name == "int8" else plain)
    _refused(committed, Reason.PAYLOAD_CORRUPT)
    asked = len(committed.transport.asked)
    _refused(committed, Reason.QUARANTINED)
    assert len(committed.transport.asked) == asked


def test_a_payload_longer_than_signed_is_refused(committed: Device) -> None:
    committed.release("1.1.0", codec="raw", tamper=lambda name, kind, plain: plain + b"more")
    _refused(committed, Reason.PAYLOAD_TRUNCATED)


@pytest.mark.fault("F49")
@pytest.mark.parametrize("length", [56 + 3 * 16400, 56 + 2 * 16400 + 16, 100_000])
def test_ciphertext_that_was_cut_before_it_was_signed_gives_nothing(committed: Device, length: int) -> None:
    built = committed.release("1.1.0", grant=False)

    def cut(release: dict[str, Any]) -> None:
        full = release["components"][0]["full"]
        data = committed.repository.payloads[full["sha256"]][:length]
        committed.repository.payloads[sha256(data)] = data
        full.update(sha256=sha256(data), length=len(data), leaves=list(payload.leaves(data)))

    committed.release("1.1.1", data=built.plain["int8"], edit=cut)
    border = (length - 56) % 16400 < 16
    _refused(committed, Reason.PAYLOAD_TRUNCATED if border else Reason.PAYLOAD_CORRUPT)


@pytest.mark.fault("F45")
@pytest.mark.parametrize(("key", "value"), [("enc", "none"), ("codec", "lzma")])
def test_unknown_encryption_or_codec_is_refused(committed: Device, key: str, value: str) -> None:
    committed.release("1.1.0", edit=lambda release: release["components"][0]["full"].update({key: value}))
    _refused(committed, Reason.UNSUPPORTED)


def test_a_release_json_that_is_not_the_signed_one_is_refused(committed: Device) -> None:
    built = committed.release("1.1.0")
    committed.repository.targets[sha256(built.data)] = built.data.replace(b"Apache", b"apache")
    _refused(committed, Reason.METADATA_MISMATCH)


def test_a_release_json_that_describes_another_version_is_refused(committed: Device) -> None:
    committed.release("1.1.0", edit=lambda release: release.update(version="7.0.0"))
    _refused(committed, Reason.BAD_RELEASE)


@pytest.mark.parametrize("reason", [Reason.GOLDEN_MISMATCH, Reason.WORKER_CRASHED, Reason.OVER_BUDGET])
def test_a_candidate_that_fails_its_self_test_is_rejected_and_quarantined(committed: Device, reason: Reason) -> None:
    if reason is Reason.GOLDEN_MISMATCH:
        data = model(5)
        committed.grant(committed.repository.build(LINE, "1.1.0", {"int8": data}, golden_for(model(6))))
    else:
        committed.release("1.1.0")
        committed.host.faults["self_test", "1.1.0"] = Rejected(reason, "unfit")
    _refused(committed, reason)
    assert ("activate", LINE, "1.1.0", "int8") not in committed.host.calls
    _refused(committed, Reason.QUARANTINED)


@pytest.mark.parametrize("step", ["activate", "probation"])
def test_a_candidate_that_fails_after_activation_is_rolled_back_and_quarantined(committed: Device, step: str) -> None:
    committed.release("1.1.0")
    committed.host.faults[step, "1.1.0"] = Rejected(Reason.WORKER_CRASHED, "SIGSEGV")
    updater = committed.reboot()
    event = committed.check(updater)
    assert (event.outcome, event.reason) == ("rolled_back", Reason.WORKER_CRASHED)
    assert committed.serving == "1.0.0"
    assert committed.host.calls[-1] == ("revert", LINE, "1.0.0", "int8")
    assert committed.check(updater).reason is Reason.QUARANTINED
    committed.release("1.2.0")
    assert committed.check(updater).outcome == "committed"


def test_the_devices_own_trouble_in_probation_rolls_back_without_blaming_the_release(committed: Device) -> None:
    committed.release("1.1.0")
    committed.host.faults["probation", "1.1.0"] = StoreError(Reason.IO_ERROR, "disk")
    updater = committed.reboot()
    event = committed.check(updater)
    assert (event.outcome, committed.serving) == ("rolled_back", "1.0.0")
    assert not updater.record.line(LINE).quarantine
    committed.host.faults.clear()
    assert committed.check(updater).outcome == "committed"


def test_a_busy_host_postpones_the_trial_without_counting_it_or_fetching_again(committed: Device) -> None:
    committed.release("1.1.0")
    committed.host.faults["self_test", "1.1.0"] = Rejected(Reason.BUSY, "the accelerator is lent")
    updater = committed.reboot()
    for _ in range(5):
        event = committed.check(updater)
        assert (event.outcome, event.reason) == ("failed", Reason.BUSY)
    asked = len(committed.transport.asked)
    committed.host.faults.clear()
    assert committed.check(updater).outcome == "committed"
    assert len(committed.transport.asked) == asked


def test_a_release_refused_for_the_boards_own_trouble_is_not_quarantined_and_comes_when_that_is_mended(
    committed: Device,
) -> None:
    committed.release("1.1.0")
    committed.host.faults["self_test", "1.1.0"] = Rejected(Reason.NO_DELEGATE, "the driver is not up", retry=True)
    updater = committed.reboot()
    for _ in range(5):
        event = committed.check(updater)
        assert (event.outcome, event.reason, committed.serving) == ("failed", Reason.NO_DELEGATE, "1.0.0")
    assert not updater.record.line(LINE).quarantine
    committed.host.faults.clear()
    assert committed.check(updater).outcome == "committed"


def test_the_next_component_is_fetched_only_after_the_first_was_refused(committed: Device) -> None:
    good, bad = model(8), model(9)
    built = committed.repository.build(LINE, "1.1.0", {"npu": bad, "int8": good}, golden_for(good))
    committed.grant(built)
    event = committed.check()
    assert event.outcome == "committed"
    assert committed.host.serving[LINE][1] == good
    tested = [call[3] for call in committed.host.calls if call[0] == "self_test" and call[2] == "1.1.0"]
    assert tested == ["npu", "int8"]
    assert Reason.GOLDEN_MISMATCH.value in committed.reasons


def test_a_release_nothing_here_can_run_is_refused_without_download(committed: Device) -> None:
    committed.release("1.1.0")
    committed.host.delegates = ["fp16"]
    asked = len(committed.transport.asked)
    _refused(committed, Reason.NO_DELEGATE)
    assert len(committed.transport.asked) == asked


@pytest.mark.fault("F9")
def test_a_release_that_does_not_fit_the_disk_is_refused_before_the_download(committed: Device) -> None:
    committed.release("1.1.0")
    committed.with_limits(reserve_bytes=1 << 60)
    asked = len(committed.transport.asked)
    _refused(committed, Reason.NO_SPACE, outcome="failed")
    assert len(committed.transport.asked) == asked


@pytest.mark.fault("F27")
def test_an_interrupted_download_of_a_withdrawn_release_is_discarded(committed: Device) -> None:
    withdrawn = committed.release("1.1.0")
    committed.transport.cut_after = 4
    assert committed.check().reason is Reason.SOURCE_UNREACHABLE
    assert list((committed.disk / "inbox").iterdir())
    committed.transport.cut_after = None
    del committed.repository.targets[sha256(withdrawn.data)]
    committed.release("1.2.0")
    assert committed.check().outcome == "committed"
    assert not list((committed.disk / "inbox").iterdir())
    assert committed.serving == "1.2.0"


def test_a_second_transport_takes_over_half_way(committed: Device) -> None:
    built = committed.release("1.1.0")
    second = SimulatedTransport(committed.repository, DEVICE, name="second")
    committed.transport.cut_after = 2
    committed.transports = (committed.transport, second)
    before = committed.transport.sent_bytes
    assert committed.check().outcome == "committed"
    sealed = sum(len(committed.repository.payloads[c["full"]["sha256"]]) for c in _files(committed, "1.1.0"))
    assert committed.transport.sent_bytes - before + second.sent_bytes <= sealed + 3 * LEAF_BYTES
    assert committed.host.serving[LINE][1] == built.plain["int8"]


# -- operators ---------------------------------------------------------------------------------------------------------


def test_an_operator_rolls_back_and_the_release_is_not_tried_again_until_allowed(committed: Device) -> None:
    committed.release("1.1.0")
    updater = committed.reboot()
    committed.check(updater)
    event = run(updater.rollback(LINE))
    assert (event.outcome, event.reason, committed.serving) == ("rolled_back", Reason.OPERATOR, "1.0.0")
    assert committed.check(updater).reason is Reason.QUARANTINED
    with pytest.raises(OtaError) as none_left:
        run(updater.rollback(LINE))
    assert none_left.value.reason is Reason.NOT_FOUND
    updater.retry(LINE)
    assert committed.check(updater).outcome == "committed"
    assert committed.serving == "1.1.0"


@pytest.mark.parametrize("step", ["self_test", "activate", "probation"])
def test_a_cancelled_update_leaves_the_old_release_serving_and_goes_on_later(committed: Device, step: str) -> None:
    committed.release("1.1.0")
    updater = committed.reboot()
    committed.host.hold[step, "1.1.0"] = asyncio.Event()

    async def scenario() -> None:
        round_ = asyncio.create_task(updater.check())
        while not any(call[0] == step and call[2] == "1.1.0" for call in committed.host.calls):
            await asyncio.sleep(0.001)
        assert await updater.cancel(LINE)
        await round_

    run(scenario())
    assert committed.serving == "1.0.0"
    assert updater.record.line(LINE).state is State.IDLE
    committed.host.hold.clear()
    committed.transport.unreachable = True
    assert run(updater.check())[-1].outcome == "committed"


@pytest.mark.fault("F12")
def test_an_active_release_that_rotted_is_replaced_by_the_previous_one_and_fetched_again(committed: Device) -> None:
    built = committed.release("1.1.0")
    committed.check()
    path = committed.disk / "store" / f"{sha256(built.plain['int8'])}.cbs"
    rotten = bytearray(path.read_bytes())
    rotten[5000] ^= 1
    path.write_bytes(rotten)
    updater = committed.reboot()
    assert committed.serving == "1.0.0"
    assert Reason.PAYLOAD_CORRUPT.value in committed.reasons
    assert committed.check(updater).outcome == "committed"
    assert committed.host.serving[LINE] == ("1.1.0", built.plain["int8"])


def test_a_storage_key_that_changed_opens_nothing_and_the_release_is_fetched_again(committed: Device) -> None:
    committed.storage_key = b"t" * 32
    updater = committed.reboot()
    assert committed.serving == ""
    assert committed.check(updater).outcome == "committed"
    assert committed.serving == "1.0.0"


def test_a_transform_that_crashes_on_a_full_payload_rejects_the_release(committed: Device) -> None:
    committed.release("1.1.0")
    committed.host.faults["transform", "zstd"] = PayloadError(Reason.PAYLOAD_CORRUPT, "not a frame")
    _refused(committed, Reason.PAYLOAD_CORRUPT)


def test_exploring_fetches_every_component_once_and_commits_the_one_the_self_test_prefers(device: Device) -> None:
    device.host.explore = True
    models = {"fp16": model(3), "int8": model(4)}
    device.grant(device.repository.build(LINE, "1.0.0", models, golden_for(*models.values())))
    ended = device.check()
    assert ended.outcome == "committed"
    assert ended.tested is not None
    assert ended.tested.component == "int8"
    active = device.boot().record.line(LINE).active
    assert active is not None
    assert active.component == "int8"
    stored = {path.name.partition(".")[0] for path in device.disk.rglob("*.cbs")}
    assert stored == {active.plain_sha256, active.golden_sha256}, "what lost was not collected"
