"""The real updater on a disk that forgets: the power goes at every single call, and what is left is booted.

What must hold is stated in `scene`. Here every cut of every scene is looked at, of its states at most `BOUND`;
`python tests/crash/run.py --all` looks at all of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.errors import Reason
from ota.release import LEAF_BYTES
from tests.crash import scenes
from tests.crash.memory import CAPACITY_BYTES, Fate, MemoryDisk, Possibilities
from tests.crash.scene import LIMITS, Maker, Moment, Scene, exactly, like
from tests.crash.survey import HEADING, Survey, survey
from tests.fakes.host import FakeHost
from tests.ota.client.conftest import LINE
from tests.ota.client.simulator import sha256 as digest

BOUND = 4
CLAIMS = {
    scenes.first_install: ["F1"],
    scenes.update: ["F1"],
    scenes.delta_update: ["F1"],
    scenes.third_update: ["F3"],
    scenes.operator_rollback: ["F6"],
    scenes.probation_fails: ["F6"],
    scenes.metadata: ["F4"],
    scenes.key_rotation: ["F5"],
}


def survived(scene: Scene, bound: int = BOUND, *, every: int = 1) -> Survey:
    """Demand that a recorded scene survives its cuts; prints the counts."""
    found = survey(scene, bound, every=every)
    print(f"\n{HEADING}\n{found.row()}")
    assert not found.violations, "\n".join(found.violations[:10])
    assert found.booted > 10
    return found


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=make.__name__, marks=[pytest.mark.fault(row) for row in CLAIMS.get(make, ())])
        for make in scenes.SCENES
    ],
)
def test_a_cut_at_every_call_leaves_a_working_release_and_a_completing_retry(make: Maker, tmp_path: Path) -> None:
    survived(make(tmp_path).record())


@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("make", [scenes.update, scenes.third_update], ids=lambda make: make.__name__)
def test_a_second_cut_during_the_recovery_from_the_first_is_survived(make: Maker, at: float, tmp_path: Path) -> None:
    survived(scenes.second_cut(make, tmp_path, at).record(), every=2)


def version_of(moment: Moment) -> str:
    """The version that the line's record names as active."""
    active = moment.record.line(LINE).active
    return "" if active is None else active.version


# -- the order of things: single claims, sharper than the survey -------------------------------------------------------


@pytest.mark.fault("F2")
def test_a_cut_before_the_state_is_written_leaves_payloads_that_are_reused_not_fetched_again(tmp_path: Path) -> None:
    scene = scenes.update(tmp_path).record()
    all_bytes = scene.moments[-1].fetched_bytes
    staged = [m for m in scene.moments if m.fetched_bytes == all_bytes and version_of(m) == "1.0.0"]
    assert len(staged) > 10
    booted = [scene.booted(moment.disk.after_cut()) for moment in staged]
    free = 0
    for device in booted:
        updater = device.reboot()
        assert device.serving == "1.0.0"
        assert device.check(updater).outcome in ("committed", "up_to_date")
        assert device.transport.sent_bytes <= LIMITS.flush_blocks * LEAF_BYTES
        free += device.transport.sent_bytes == 0
    assert free > len(staged) // 2


@pytest.mark.fault("F3")
def test_the_release_that_a_commit_makes_superfluous_is_removed_after_the_next_boot(tmp_path: Path) -> None:
    """The cut comes when all three records name the new release and nothing was removed yet."""
    scene = scenes.third_update(tmp_path).record()
    oldest = scene.device.repository.built[LINE, "1.0.0"]
    name = f"releases/{digest(oldest.data)}.json"
    kept = [m for m in scene.moments if name in dict(m.disk.files())]
    committed = [m for m in kept if version_of(m) == "1.2.0"]
    assert committed
    device = scene.booted(committed[-1].disk.after_cut())
    device.reboot()
    assert device.serving == "1.2.0"
    assert isinstance(device.disk, MemoryDisk)
    assert name not in dict(device.disk.files())
    assert device.disk.used_bytes() <= scene.moments[-1].disk.used_bytes()


@pytest.mark.fault("F7")
def test_a_cut_at_every_call_of_a_trial_finds_it_counted(tmp_path: Path) -> None:
    scene = scenes.update(tmp_path).record()
    trial = [moment for moment in scene.moments if moment.record.line(LINE).attempts and not moment.committed]
    assert trial
    for moment in trial:
        possible = Possibilities(moment.disk)
        for picks in possible.picks(64, 7):
            device = scene.booted(possible.disk(picks))
            updater = device.reboot()
            assert device.serving == "1.1.0" or updater.record.line(LINE).attempts == 1


@pytest.mark.fault("F11")
def test_blocks_that_come_back_as_zeros_are_fetched_again_and_no_others(tmp_path: Path) -> None:
    """Delayed allocation: the part has its length and its map claims the blocks, but some hold nothing."""
    scene = scenes.download(tmp_path).record()
    looked_at = 0
    for moment in scene.moments:
        parts = [(path, file) for path, file in moment.disk.files() if path.endswith(".part") and file.pending]
        if not parts or len(parts[0][1].durable) < LEAF_BYTES:
            continue
        path, file = parts[0]
        whole = set(range(len(file.durable) // LEAF_BYTES))
        new = [write.offset for write in file.pending if write.offset >= len(file.durable)]
        for write in file.pending:
            file.durable = write.applied(file.durable, Fate.ZEROS)
        file.content, file.pending = file.durable, []
        moment.disk.settle()
        device = scene.booted(moment.disk)
        event = device.check()
        assert event.outcome == "committed"
        sha256 = path.removeprefix("inbox/").removesuffix(".part")
        asked = {offset // LEAF_BYTES for wanted, offset in device.transport.asked if wanted == sha256}
        assert {offset // LEAF_BYTES for offset in new} <= asked
        assert not whole & asked, "a block that was whole is fetched again"
        looked_at += bool(new)
    assert looked_at >= 3


@pytest.mark.fault("F15")
@pytest.mark.parametrize("step", ["self_test", "activate", "probation"])
def test_a_release_that_cuts_the_power_each_time_is_quarantined_after_three_trials(step: str, tmp_path: Path) -> None:
    device = scenes.update(tmp_path).device
    device.host.faults[step, "1.1.0"] = scenes.Gone()  # type: ignore[assignment]
    trials = 0
    for _ in range(6):
        updater = device.reboot()
        assert device.serving == "1.0.0"
        try:
            assert device.check(updater).reason in (Reason.QUARANTINED, None)
        except scenes.Gone:
            trials += 1
        assert isinstance(device.disk, MemoryDisk)
        device.disk = device.disk.after_cut()
    assert trials == LIMITS.trial_attempts
    quarantine = Journal(Fs(device.disk)).record.line(LINE).quarantine
    assert list(quarantine.values()) == [Reason.INTERRUPTED]


def test_a_removed_file_that_a_cut_brings_back_is_removed_again_and_never_used(tmp_path: Path) -> None:
    """`Fs.remove` is not durable on purpose. Everything that the update removed is put back, stale and whole, after
    the commit: what serves is untouched, the leftovers are gone after the next boot, the next update uses none."""
    scene = scenes.third_update(tmp_path).record()
    end = scene.moments[-1].disk
    present = {path for path, _ in end.files()}
    removed: dict[str, bytes] = {}
    for moment in scene.moments:
        removed |= {path: file.content for path, file in moment.disk.files() if path not in present}
    end.capacity_bytes = CAPACITY_BYTES
    kinds = {path.rpartition(".")[2] for path in removed}
    assert kinds >= {"cbs", "json", "part", "map", "tmp"}
    for path, content in removed.items():
        end.write(path, 0, content)
    end.settle()
    device = scene.booted(end)
    updater = device.reboot()
    assert device.serving == "1.2.0"
    assert device.check(updater).outcome == "up_to_date"
    exactly(end)
    device.release("1.3.0", data=like("1.3.0"))
    assert device.check(updater).outcome == "committed"
    exactly(end)


def test_a_release_whose_trial_was_cut_short_still_gets_its_next_component(tmp_path: Path) -> None:
    """Found by the survey: the first component fails its self-test, and the power went during that very test."""
    scene = scenes.third_update(tmp_path)
    device = scene.device
    device.host.faults["self_test", "1.2.0"] = scenes.Gone()  # type: ignore[assignment]
    with pytest.raises(scenes.Gone):
        device.check(device.reboot())
    again = replace(device, disk=scene.disk.after_cut(), host=FakeHost(), events=[])
    assert again.check().outcome == "committed"
    assert again.serving == "1.2.0"
