"""Everything that a device may be doing when its power goes, one function each; what must hold then is in `scene`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from agent import config
from agent.daemon import settings as daemon_settings
from ota.client import keyring, settings
from ota.client.configuration import Configuration
from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.client.keyring import Keyring, Ring
from ota.client.reseal import finish_rotation, rotate_storage
from ota.client.updater import Updater
from ota.errors import Reason, Rejected
from ota.release import LEAF_BYTES
from tests.crash.forgery import forged_root_refused, rotate_root
from tests.crash.memory import MemoryDisk, Possibilities
from tests.crash.scene import (
    ENDED_WELL,
    LIMITS,
    CrashDevice,
    Maker,
    Moment,
    Scene,
    checked,
    committed,
    fresh,
    like,
    opened,
    told,
    with_releases,
)
from tests.fakes.host import FakeHost
from tests.ota.client.conftest import DEVICE, LINE, model, run
from tests.ota.client.simulator import Simulator, sha256

OTHER_LINE = "gauge"


class Gone(BaseException):
    """The process is gone: raised from inside the host, nothing of the updater handles it."""


def first_install(_: Path) -> Scene:
    """Nothing but an enrolment: directories, root and the first release; its root was rotated since."""
    device = fresh()
    attack = rotate_root(device)
    device.release("1.0.0", data=like("1.0.0"))
    return Scene("first install", device, committed, checked, "", "1.0.0", "1.0.0", also=forged_root_refused(attack))


def update(_: Path) -> Scene:
    """One release by another."""
    device = with_releases("1.0.0")
    device.release("1.1.0", data=like("1.1.0"))
    return Scene("update", device, committed, checked, "1.0.0", "1.1.0", "1.1.0")


def delta_update(_: Path) -> Scene:
    """One release by another that differs in a few bytes and comes as a delta."""
    device = with_releases("1.0.0")
    base = device.repository.built[LINE, "1.0.0"]
    data = like("1.0.0")[:-64] + bytes(64)
    device.release("1.1.0", data=data, bases=[base])

    def by_delta(device: CrashDevice, updater: Updater) -> None:
        committed(device, updater)
        assert "zstd-patch" in device.host.transforms

    return Scene("delta update", device, by_delta, checked, "1.0.0", "1.1.0", "1.1.0")


def third_update(_: Path) -> Scene:
    """An update that makes a release superfluous, whose files are collected; two components, one of them refused."""
    device = with_releases("1.0.0", "1.1.0")
    good = like("1.2.0")
    built = device.repository.build(
        LINE, "1.2.0", {"bad": model(9, 3000), "int8": good}, sha256(good).encode(), codec="raw"
    )
    device.grant(built)
    return Scene("update and collection", device, committed, checked, "1.1.0", "1.2.0", "1.2.0")


def two_lines(_: Path) -> Scene:
    """Two lines updated at the same time, with one journal between them."""
    device = with_releases("1.0.0")
    data = model(77, 5000)
    built = [
        device.release("1.1.0", data=like("1.1.0"), grant=False),
        device.repository.build(OTHER_LINE, "1.0.0", {"int8": data}, sha256(data).encode()),
    ]
    device.grant(*built)

    def both(device: CrashDevice, updater: Updater) -> None:
        for event in run(updater.check()):
            assert event.outcome in ENDED_WELL, told(event)
        assert device.host.serving[OTHER_LINE][0] == "1.0.0"

    return Scene("two lines", device, both, both, "1.0.0", "1.1.0", "1.1.0")


def operator_rollback(_: Path) -> Scene:
    """A person goes back to the release before; the newer one must not come again, a still newer one must."""
    device = with_releases("1.0.0", "1.1.0")

    def act(device: CrashDevice, updater: Updater) -> None:
        assert run(updater.rollback(LINE)).outcome == "rolled_back"

    def retry(device: CrashDevice, updater: Updater) -> None:
        if device.serving == "1.1.0":
            act(device, updater)
        event = device.check(updater)
        assert event.reason is Reason.QUARANTINED, f"1.1.0 would come back: {told(event)}"

    failing = frozenset({"1.1.0"})
    return Scene("operator roll-back", device, act, retry, "1.1.0", "1.0.0", "1.0.0", failing)


def probation_fails(_: Path) -> Scene:
    """A release that fails in its probation: automatic roll-back, then the one that mends it."""
    device = with_releases("1.0.0")
    device.release("1.1.0", data=like("1.1.0"))
    broken = device.repository.frozen()
    device.release("1.2.0", data=like("1.2.0"))
    mended = device.repository.frozen()
    device.host.faults["probation", "1.1.0"] = Rejected(Reason.WORKER_CRASHED, "SIGSEGV")
    device.repository = broken
    device.transport.repository = broken

    def act(device: CrashDevice, updater: Updater) -> None:
        event = device.check(updater)
        assert (event.outcome, event.reason) == ("rolled_back", Reason.WORKER_CRASHED), told(event)
        assert device.serving == "1.0.0"

    def retry(device: CrashDevice, updater: Updater) -> None:
        for _ in range(2):
            event = device.check(updater)
            assert device.serving == "1.0.0"
        assert event.reason is Reason.QUARANTINED, f"1.1.0 would come back: {told(event)}"
        device.transport.repository = mended
        committed(device, updater)

    failing = frozenset({"1.1.0"})
    return Scene("automatic roll-back", device, act, retry, "1.0.0", "1.0.0", "1.2.0", failing)


def metadata(_: Path) -> Scene:
    """Metadata kept over a rotation of the root's and the timestamp's keys; afterwards a replay, and a root that a
    thief of the retired keys signed, must be refused."""
    device = with_releases("1.0.0")
    old = device.repository.frozen()
    attack = rotate_root(device)
    device.repository.rotate("timestamp")
    device.repository.publish()
    forged = forged_root_refused(attack)

    def also(scene: Scene, moment: Moment, device: CrashDevice, updater: Updater) -> None:
        forged(scene, moment, device, updater)
        if moment.done:
            device.transport.repository = old
            reason = device.check(updater).reason
            device.transport.repository = device.repository
            assert reason in (Reason.METADATA_ROLLBACK, Reason.BAD_SIGNATURE), f"a replay ends with {reason}"

    def up_to_date(device: CrashDevice, updater: Updater) -> None:
        assert device.check(updater).outcome == "up_to_date"

    return Scene("metadata", device, up_to_date, up_to_date, "1.0.0", "1.0.0", "1.0.0", also=also)


def sideload(folder: Path) -> Scene:
    """An update from a stick; no network."""
    device = with_releases("1.0.0")
    device.release("1.1.0", data=like("1.1.0"))
    stick = folder / "stick"
    device.repository.write(stick, DEVICE)

    def act(device: CrashDevice, updater: Updater) -> None:
        device.transport.unreachable = True
        event = run(updater.sideload(stick))[-1]
        assert event.outcome in ENDED_WELL, f"the sideload ends with {told(event)}"

    return Scene("sideload", device, act, act, "1.0.0", "1.1.0", "1.1.0")


def download(_: Path) -> Scene:
    """A payload of several blocks; after a cut at most a window and what was not flushed is fetched again."""
    device = with_releases("1.0.0")
    device.release("1.1.0", data=model(3, 8 * LEAF_BYTES), codec="raw")
    before = device.transport.sent_bytes

    def retry(device: CrashDevice, updater: Updater) -> None:
        checked(device, updater)

    def also(scene: Scene, moment: Moment, device: CrashDevice, updater: Updater) -> None:
        checked(device, updater)
        spent = moment.fetched_bytes - before + device.transport.sent_bytes
        total = scene.moments[-1].fetched_bytes - before
        allowed = total + (LIMITS.window_blocks + LIMITS.flush_blocks) * LEAF_BYTES
        assert spent <= allowed, f"{spent} bytes fetched for {total}"

    return Scene("download", device, committed, retry, "1.0.0", "1.1.0", "1.1.0", also=also)


def withdrawn(_: Path) -> Scene:
    """A staged candidate, waiting for room, is replaced by a newer release: its files are collected."""
    device = with_releases("1.0.0")
    device.release("1.1.0", data=like("1.1.0"))
    device.host.faults["self_test", "1.1.0"] = Rejected(Reason.BUSY, "no room")
    assert device.check(device.reboot()).reason is Reason.BUSY
    device.release("1.2.0", data=like("1.2.0"))
    return Scene("withdrawn candidate", device, committed, checked, "1.0.0", "1.2.0", "1.2.0")


def interrupted_trial(_: Path) -> Scene:
    """A candidate whose probation was interrupted before is tried again, without network."""
    device = with_releases("1.0.0")
    device.release("1.1.0", data=like("1.1.0"))
    device.host.faults["probation", "1.1.0"] = Gone()  # type: ignore[assignment]
    try:
        device.check(device.reboot())
    except Gone:
        pass
    device.host.faults.clear()

    def act(device: CrashDevice, updater: Updater) -> None:
        device.transport.unreachable = True
        run(updater.check())
        assert device.serving == "1.1.0"

    return Scene("interrupted trial", device, act, checked, "1.0.0", "1.1.0", "1.1.0")


def rotten_store(_: Path) -> Scene:
    """Bit rot in the active model: found at boot, the release before serves, the active one is fetched again."""
    device = with_releases("1.0.0", "1.1.0")
    active = Journal(Fs(device.disk)).record.line(LINE).active  # type: ignore[arg-type]
    assert active is not None
    path = f"store/{active.plain_sha256}.cbs"
    device.disk.write(path, 5000, b"rot")  # type: ignore[union-attr]
    return Scene("rotten store", device, committed, checked, "1.0.0", "1.1.0", "1.1.0")


def rotten_records(_: Path) -> Scene:
    """An update, and after the cut bit rot takes both slots of the journal: the copy of the last commit must serve."""
    device = with_releases("1.0.0")
    device.release("1.1.0", data=like("1.1.0"))
    slots = (("state/record.a", "state/record.b"),)
    return Scene("rotten records", device, committed, checked, "1.0.0", "1.1.0", "1.1.0", spoils=slots)


def second_cut(first: Maker, folder: Path, at: float) -> Scene:
    """What a device does after the power went in another scene, `at` that share of its moments, and left half of what
    was not synced: so that the power can go again while it recovers."""
    before = first(folder).record()
    moment = before.moments[int(at * (len(before.moments) - 1))]
    possible = Possibilities(moment.disk)
    disk = possible.disk(tuple(number % options for number, options in enumerate(possible.options)))
    device = replace(before.device, disk=disk, host=FakeHost(faults=dict(before.device.host.faults)), events=[])
    device.transport.unreachable = before.device.transport.unreachable
    serves = before.after if moment.committed else before.before
    again = replace(before, name=f"{before.name}, again", device=device, act=before.retry, moments=[], _done=False)
    return replace(again, before=serves, after=before.goal)


class RotatingDevice(CrashDevice):
    """A device with a key ring, which its custody seals under a key of its own."""

    custody_key = b"c" * 32
    keyring: Keyring

    def boot(self) -> Updater:
        self.keyring = Keyring(Fs(self.disk), self.custody_key)
        self.storage_key = self.keyring.ring.storage[0]
        updater = super().boot()
        updater._store.use_keys(self.keyring.ring.storage)
        return updater


def key_rotation(_: Path) -> Scene:
    """A new storage key: the ring, then every file of two releases sealed anew. After the cut bit rot takes one of the
    ring's two copies, each in turn."""
    device = RotatingDevice(MemoryDisk(), Simulator(), limits=LIMITS)
    for version in ("1.0.0", "1.1.0"):
        device.release(version, data=like(version))
        committed(device, device.reboot())
    Keyring(Fs(device.disk), device.custody_key).save(Ring((device.custody_key,)))

    def act(device: CrashDevice, updater: Updater) -> None:
        assert isinstance(device, RotatingDevice)
        assert run(rotate_storage(device.keyring, updater._store)).files == 4

    def retry(device: CrashDevice, updater: Updater) -> None:
        assert isinstance(device, RotatingDevice)
        assert not run(finish_rotation(device.keyring, updater._store)).damaged
        assert len(device.keyring.ring.storage) == 1, "a retired key stays in the ring"
        assert not updater._store.stale(), "a file stays under a retired key"
        opened(updater)
        checked(device, updater)

    def also(scene: Scene, moment: Moment, device: CrashDevice, updater: Updater) -> None:
        opened(updater)
        assert isinstance(device, RotatingDevice)
        assert not moment.done or device.custody_key not in device.keyring.ring.storage, "the retired key is back"

    copies = ((keyring.RING,), (keyring.COPY,))
    return Scene("key rotation", device, act, retry, "1.1.0", "1.1.0", "1.1.0", spoils=copies, also=also)


AGENT_TOML = """\
state_dir = "state"
run_dir = "run"
[[source]]
name = "belt"
kind = "video"
path = "clip.avi"
[[line]]
name = "person"
source = "belt"
"""
WANTED = AGENT_TOML.replace("clip.avi", "other.avi")


def settings_change(folder: Path, *, works: bool = True) -> Scene:
    """The fleet's settings take the place of the device's own file after a trial, or are taken back when they fail."""
    device = with_releases("1.0.0")
    path = folder / "agent.toml"
    path.write_text(AGENT_TOML)
    own = config.load(path)
    own_sha256, wanted = daemon_settings.file_sha256(own), sha256(WANTED.encode())
    Configuration(Fs(device.disk), Journal(Fs(device.disk)))

    def chosen(kept: Configuration, *, restarted: bool) -> daemon_settings.Chosen:
        return daemon_settings.choose(own, own_sha256, kept, daemon_settings.MAX_ATTEMPTS, restarted=restarted)

    def act(device: CrashDevice, updater: Updater) -> None:
        kept = Configuration(updater._fs, updater._journal)
        chosen(kept, restarted=True)
        kept.propose(WANTED.encode(), own_sha256, settings.Origin.FLEET, ("link",))
        ended(kept, chosen(kept, restarted=False))

    def ended(kept: Configuration, used: daemon_settings.Chosen) -> None:
        assert used.trial, "not on trial"
        assert used.config.sources[0].options["path"].endswith("other.avi")
        failed = settings.TrialFailed(Reason.SETTINGS_FAILED)
        kept.apply(settings.TrialPassed() if works else failed)

    def also(scene: Scene, moment: Moment, device: CrashDevice, updater: Updater) -> None:
        kept = Configuration(updater._fs, updater._journal)
        assert kept.record.attempts >= min(moment.record.settings.attempts, moment.saving.settings.attempts)
        used = chosen(kept, restarted=True)
        if moment.done:
            assert not used.trial, "the trial begins again"
            assert used.sha256 == (wanted if works else ""), "other settings are in force than were reported"
        if used.trial:
            ended(kept, used)
        elif kept.record.fleet != wanted:
            kept.propose(WANTED.encode(), own_sha256, settings.Origin.FLEET, ("link",))
            ended(kept, chosen(kept, restarted=False))

    def retry(device: CrashDevice, updater: Updater) -> None:
        again = Configuration(Fs(device.disk), Journal(Fs(device.disk)))
        used = chosen(again, restarted=True)
        assert (used.sha256, used.trial) == (wanted if works else "", False), "the settings do not come to rest"
        assert dict(again.record.quarantine) == ({} if works else {wanted: Reason.SETTINGS_FAILED})
        assert device.disk.names("config") == ([f"{wanted}.toml"] if works else [])  # type: ignore[union-attr]
        checked(device, updater)

    name = "settings" if works else "settings that fail"
    return Scene(name, device, act, retry, "1.0.0", "1.0.0", "1.0.0", also=also)


def failing_settings(folder: Path) -> Scene:
    """As `settings_change`, with settings that do not work."""
    return settings_change(folder, works=False)


SCENES: tuple[Maker, ...] = (
    first_install,
    update,
    delta_update,
    third_update,
    two_lines,
    operator_rollback,
    probation_fails,
    metadata,
    sideload,
    download,
    withdrawn,
    interrupted_trial,
    rotten_store,
    rotten_records,
    key_rotation,
    settings_change,
    failing_settings,
)
