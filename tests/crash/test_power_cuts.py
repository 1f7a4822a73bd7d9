"""The real updater on a disk that forgets: the power goes at every single call, and every state left is booted.

What must hold in each: it boots; what was reported as committed serves; before that the old release does; a trial was
counted before it began; metadata floors hold; nothing temporary stays; and the next check completes the update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.client.machine import State
from ota.client.updater import Updater
from ota.errors import Reason, StoreError
from ota.release import LEAF_BYTES
from tests.crash.memory import EXTREMES, Choice, MemoryDisk, mixtures
from tests.fakes.host import FakeHost
from tests.ota.client.conftest import FAST, LINE, Device, model, run
from tests.ota.client.simulator import Simulator

SMALL = 3 * LEAF_BYTES
LIMITS = replace(FAST, flush_blocks=1, reserve_bytes=1)


@dataclass
class Moment:
    """What the world knew when the power went."""

    disk: MemoryDisk
    outcomes: tuple[str, ...]
    tested: int
    rolled_back: bool
    fetched_bytes: int


@dataclass
class Scene:
    """A device on a memory disk, and every moment at which its power could go while `act` ran."""

    device: Device
    moments: list[Moment] = field(default_factory=list)
    rolled_back: bool = False

    def record(self, act: Callable[[Updater], None], skip: tuple[str, str] | None = None) -> None:
        """Run `act` after a boot, taking a snapshot before every call to the disk, and one at the end."""
        disk = self.device.disk
        assert isinstance(disk, MemoryDisk)
        disk.skip = skip
        disk.on_call = self._moment
        act(self.device.reboot())
        self._moment()
        disk.on_call = None

    def _moment(self) -> None:
        device = self.device
        assert isinstance(device.disk, MemoryDisk)
        self.moments.append(
            Moment(
                device.disk.snapshot(),
                tuple(event.outcome for event in device.events if event.outcome and event.line == LINE),
                sum(1 for call in device.host.calls if call[0] == "self_test" and call[2] == "1.1.0"),
                self.rolled_back,
                device.transport.sent_bytes,
            )
        )

    def boot_after(self, moment: Moment, choice: Choice) -> tuple[Device, Updater]:
        """A device that finds what the cut left."""
        device = replace(self.device, disk=moment.disk.after_cut(choice), host=FakeHost(), events=[])
        return device, device.reboot()


def _scene(*, install: bool, delta: bool = False) -> Scene:
    disk = MemoryDisk()
    device = Device(disk, Simulator(), limits=LIMITS)
    if install:
        device.release("1.0.0", data=model(1, SMALL))
        assert device.check().outcome == "committed"
        _settle(disk)
    device.events.clear()
    return Scene(device)


def _settle(disk: MemoryDisk) -> None:
    """Time passes: the kernel writes back whatever was not synced."""
    disk.root = disk.after_cut(EXTREMES[5]).root


def _violations(
    scene: Scene, choices: list[Choice], judge: Callable[[Scene, Moment, Choice], str], *, first: bool = False
) -> list[str]:
    """What `judge` says of every distinct disk that a cut can leave, or only the first complaint."""
    found = []
    seen = set()
    for number, moment in enumerate(scene.moments):
        for choice in choices:
            left = moment.disk.after_cut(choice).fingerprint()
            known = (left, moment.outcomes, moment.tested, moment.rolled_back, moment.fetched_bytes)
            if known in seen:
                continue
            seen.add(known)
            try:
                problem = judge(scene, moment, choice)
            except (StoreError, AssertionError) as e:
                problem = repr(e)
            if problem:
                found.append(f"cut {number}/{len(scene.moments)} {choice}: {problem}")
                if first:
                    return found
    return found


# -- an update ---------------------------------------------------------------------------------------------------------


def _judge_update(scene: Scene, moment: Moment, choice: Choice) -> str:
    device, updater = scene.boot_after(moment, choice)
    committed = "committed" in moment.outcomes
    if committed and device.serving != "1.1.0":
        return f"1.1.0 was committed, {device.serving!r} serves"
    if device.serving not in ("1.0.0", "1.1.0"):
        return f"{device.serving!r} serves"
    line = updater.record.line(LINE)
    if line.state is not State.IDLE:
        return f"at rest in {line.state}"
    if not committed and device.serving == "1.0.0" and line.attempts < moment.tested:
        return f"{moment.tested} trials began, {line.attempts} are counted"
    disk = device.disk
    assert isinstance(disk, MemoryDisk)
    for folder in ("state", "store", "releases"):
        if any(name.endswith(".tmp") for name in Fs(disk).names(folder)):
            return f"a temporary file stays in {folder}"
    if device.check(updater).outcome not in ("committed", "up_to_date") or device.serving != "1.1.0":
        return f"the next check ends with {device.events[-1]}"
    kept = {name.partition(".")[0] for name in Fs(disk).names("store")}
    needed = {sha for item in updater.record.installed() for sha in (item.plain_sha256, item.golden_sha256)}
    return "" if kept == needed else f"{len(kept)} files stay, {len(needed)} are needed"


def _update_scene(skip: tuple[str, str] | None = None) -> Scene:
    scene = _scene(install=True)
    scene.device.release("1.1.0", data=model(2, SMALL))
    scene.record(lambda updater: _committed(scene.device, updater), skip)
    return scene


def _committed(device: Device, updater: Updater) -> None:
    assert device.check(updater).outcome == "committed"


@pytest.mark.fault("F1")
def test_a_cut_at_every_call_of_an_update_leaves_the_old_or_the_new_release_and_the_retry_completes() -> None:
    assert not _violations(_update_scene(), [*EXTREMES, *mixtures(2)], _judge_update)


@pytest.mark.fault("F2")
def test_a_cut_before_the_state_is_written_leaves_payloads_that_are_reused_not_fetched_again() -> None:
    scene = _update_scene()
    sealed = scene.moments[-1].fetched_bytes
    staged = [m for m in scene.moments if m.fetched_bytes == sealed and "committed" not in m.outcomes]
    assert len(staged) > 10
    device, updater = next(
        booted for m in reversed(staged) if (booted := scene.boot_after(m, EXTREMES[0]))[0].serving == "1.0.0"
    )
    assert device.check(updater).outcome == "committed"
    assert device.transport.sent_bytes == 0


@pytest.mark.fault("F7")
def test_a_cut_at_every_call_of_a_trial_finds_it_counted() -> None:
    scene = _update_scene()
    trial = [moment for moment in scene.moments if moment.tested and "committed" not in moment.outcomes]
    assert trial
    for moment in trial:
        for choice in EXTREMES:
            device, updater = scene.boot_after(moment, choice)
            assert device.serving == "1.1.0" or updater.record.line(LINE).attempts == 1


@pytest.mark.parametrize("skip", [("write_atomic", "fsync"), ("write_atomic", "fsync_dir")])
def test_an_update_without_one_of_its_fsyncs_is_caught(skip: tuple[str, str]) -> None:
    assert _violations(_update_scene(skip), EXTREMES, _judge_update, first=True)


# -- the first install: directories and the third copy -----------------------------------------------------------------


def _judge_install(scene: Scene, moment: Moment, choice: Choice) -> str:
    device, updater = scene.boot_after(moment, choice)
    if "committed" in moment.outcomes and device.serving != "1.0.0":
        return f"1.0.0 was committed, {device.serving!r} serves"
    if device.check(updater).outcome not in ("committed", "up_to_date"):
        return f"the next check ends with {device.events[-1]}"
    return ""


def _install_scene(skip: tuple[str, str] | None = None) -> Scene:
    scene = _scene(install=False)
    scene.device.release("1.0.0", data=model(1, SMALL))
    scene.record(lambda updater: _committed(scene.device, updater), skip)
    return scene


@pytest.mark.fault("F3")
def test_a_cut_at_every_call_of_the_first_install_ends_installed() -> None:
    assert not _violations(_install_scene(), EXTREMES, _judge_install)


def test_a_first_install_without_syncing_its_directories_is_caught() -> None:
    assert _violations(_install_scene(("make_dirs", "fsync_dir")), EXTREMES, _judge_install, first=True)


# -- rollback by an operator -------------------------------------------------------------------------------------------


@pytest.mark.fault("F6")
def test_a_cut_at_every_call_of_a_rollback_leaves_one_of_the_two_releases_and_the_older_once_it_was_reported() -> None:
    scene = _scene(install=True)
    device = scene.device
    device.release("1.1.0", data=model(2, SMALL))
    assert device.check().outcome == "committed"
    assert isinstance(device.disk, MemoryDisk)
    _settle(device.disk)
    device.events.clear()

    def roll_back(updater: Updater) -> None:
        run(updater.rollback(LINE))
        scene.rolled_back = True

    def judge(scene: Scene, moment: Moment, choice: Choice) -> str:
        device, updater = scene.boot_after(moment, choice)
        if device.serving == "1.0.0":
            return "" if device.check(updater).reason is Reason.QUARANTINED else "1.1.0 would come back"
        return "" if device.serving == "1.1.0" and not moment.rolled_back else f"{device.serving!r} serves"

    scene.record(roll_back)
    assert not _violations(scene, [*EXTREMES, *mixtures(2)], judge)


# -- metadata ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F4")
def test_a_cut_while_metadata_is_kept_never_lets_a_replay_through() -> None:
    scene = _scene(install=True)
    device = scene.device
    old = device.repository.frozen()
    for _ in range(2):
        device.repository.rotate("timestamp")
    device.repository.publish()
    scene.record(lambda updater: _up_to_date(device, updater))
    finished = scene.moments[-1]

    def judge(scene: Scene, moment: Moment, choice: Choice) -> str:
        device, updater = scene.boot_after(moment, choice)
        if moment is finished:
            device.repository.documents, kept = old.documents, device.repository.documents
            reason = device.check(updater).reason
            device.repository.documents = kept
            if reason not in (Reason.METADATA_ROLLBACK, Reason.BAD_SIGNATURE):
                return f"a replay ends with {reason}"
        return "" if device.check(updater).outcome == "up_to_date" else f"{device.events[-1]}"

    assert not _violations(scene, [*EXTREMES, *mixtures(2)], judge)


def _up_to_date(device: Device, updater: Updater) -> None:
    assert device.check(updater).outcome == "up_to_date"


# -- transfers ---------------------------------------------------------------------------------------------------------


def _transfer_losses(skip: tuple[str, str] | None = None, *, first: bool = False) -> list[str]:
    """Cuts during a download of eight blocks, made durable one by one."""
    scene = _scene(install=True)
    device = scene.device
    device.release("1.1.0", data=model(3, 8 * LEAF_BYTES), codec="raw")
    start = device.transport.sent_bytes
    scene.record(lambda updater: _committed(device, updater), skip)
    total = scene.moments[-1].fetched_bytes - start

    def judge(scene: Scene, moment: Moment, choice: Choice) -> str:
        device, updater = scene.boot_after(moment, choice)
        _committed_or_same(device, updater)
        spent = moment.fetched_bytes - start + device.transport.sent_bytes
        allowed = total + (LIMITS.window_blocks + LIMITS.flush_blocks) * LEAF_BYTES
        return "" if spent <= allowed else f"{spent} bytes for a payload of {total}"

    return _violations(scene, EXTREMES[:6], judge, first=first)


def _committed_or_same(device: Device, updater: Updater) -> None:
    assert device.check(updater).outcome in ("committed", "up_to_date")


@pytest.mark.fault("F11")
def test_a_cut_during_a_download_costs_at_most_a_window_and_what_was_not_flushed() -> None:
    assert not _transfer_losses()


@pytest.mark.parametrize("skip", [("flush", "fsync"), ("flush", "fsync_dir")])
def test_a_download_without_one_of_its_fsyncs_is_caught(skip: tuple[str, str]) -> None:
    assert _transfer_losses(skip, first=True)


# -- boot loops --------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F15")
@pytest.mark.parametrize("step", ["self_test", "activate", "probation"])
def test_a_release_that_cuts_the_power_each_time_is_quarantined_after_three_trials(step: str) -> None:
    class PowerCut(BaseException):
        pass

    scene = _scene(install=True)
    device = scene.device
    device.release("1.1.0", data=model(2, SMALL))
    device.host.faults[step, "1.1.0"] = PowerCut()  # type: ignore[assignment]
    trials = 0
    for _ in range(6):
        updater = device.reboot()
        assert device.serving == "1.0.0"
        try:
            assert device.check(updater).reason in (Reason.QUARANTINED, None)
        except PowerCut:
            trials += 1
        assert isinstance(device.disk, MemoryDisk)
        device.disk = device.disk.after_cut(EXTREMES[0])
    assert trials == LIMITS.trial_attempts
    assert Journal(Fs(device.disk)).record.line(LINE).quarantine
