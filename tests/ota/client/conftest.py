"""One simulated device with its repository; everything a test may want to break is an attribute."""

from __future__ import annotations

import asyncio
import datetime
import random
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ota.client.fsops import Disk, Fs
from ota.client.limits import Limits
from ota.client.policy import Gate
from ota.client.ports import DeviceKeys, Identity, Transport, UpdateEvent
from ota.client.updater import Updater
from tests.fakes.host import FakeHost, golden_for
from tests.ota.client.simulator import NOW, Built, SimulatedTransport, Simulator, kid_of

DEVICE = "cam-1"
LINE = "person"
FAST = Limits(
    # the simulator's days lie before it
    built=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
    block_timeout_s=0.2,
    retry_base_s=0.001,
    retry_cap_s=0.002,
    metadata_timeout_s=2.0,
    stall_s=2.0,
    reserve_bytes=1 << 16,
)
_T = TypeVar("_T")


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run to the end, within a minute."""

    async def bounded() -> _T:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(bounded())


def model(seed: int, size: int = 200_000) -> bytes:
    """Bytes that do not compress, the same for the same seed."""
    return random.Random(seed).randbytes(size)


class QuickDisk(Disk):
    """A real directory without waiting for the disk: what fsync is worth is tested in tests/crash."""

    def fsync(self, path: str) -> None:
        pass

    def fsync_dir(self, path: str) -> None:
        pass


@dataclass
class Device:
    """A device under test. `boot()` makes a new process of it: a new updater on the same disk."""

    disk: Disk | Path
    repository: Simulator
    limits: Limits = FAST
    host: FakeHost = field(default_factory=FakeHost)
    now: datetime.datetime = NOW
    identity: Identity = field(default_factory=lambda: Identity(DEVICE, "generic-x86_64", "0.1.0"))
    key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    older_key: X25519PrivateKey | None = None
    storage_key: bytes = b"s" * 32
    events: list[UpdateEvent] = field(default_factory=list)
    transports: Sequence[Transport] = ()
    gate: Gate | None = None

    def __post_init__(self) -> None:
        self.pinned_root = self.repository.documents["root", 1]
        self.transport = SimulatedTransport(self.repository, DEVICE)
        self.transports = (self.transport,)

    def boot(self) -> Updater:
        return Updater(
            Fs(QuickDisk(self.disk) if isinstance(self.disk, Path) else self.disk),
            self.identity,
            DeviceKeys({kid_of(key): key for key in (self.older_key, self.key) if key}, self.storage_key),
            self.pinned_root,
            self.transports,
            self.host,
            lambda: self.now,
            random.Random(1),
            self.limits,
            self.events.append,
            gate=self.gate,
        )

    def reboot(self) -> Updater:
        """A new process: nothing serves until the committed releases are started."""
        updater = self.boot()
        self.host.serving.clear()

        async def start() -> None:
            await updater.recover()
            for line in updater.record.lines:
                await self.host.start(updater.active(line))

        run(start())
        return updater

    def check(self, updater: Updater | None = None) -> UpdateEvent:
        """One check; the last event of the line, or the device's."""
        return run((updater or self.reboot()).check())[-1]

    def release(self, version: str, seed: int = 0, *, grant: bool = True, **options: Any) -> Built:
        """Publish a release with one component whose golden vectors it passes, and grant it."""
        data = options.pop("data", None) or model(seed or int(version.replace(".", "")))
        built = self.repository.build(LINE, version, {"int8": data}, golden_for(data), **options)
        if grant:
            self.grant(built)
        return built

    def grant(self, *built: Built, **options: Any) -> None:
        self.repository.grant(DEVICE, self.key, *built, **options)

    def with_limits(self, **changes: Any) -> None:
        self.limits = replace(self.limits, **changes)

    @property
    def serving(self) -> str:
        """Version that serves on the line, empty for none."""
        return self.host.serving.get(LINE, ("", b""))[0]

    @property
    def reasons(self) -> list[str]:
        return [event.reason.value for event in self.events if event.reason is not None]


@pytest.fixture
def device(tmp_path: Path) -> Device:
    """A device with nothing installed and an empty repository."""
    root = tmp_path / "state"
    root.mkdir()
    return Device(root, Simulator())


@pytest.fixture
def committed(device: Device) -> Device:
    """A device that runs release 1.0.0."""
    device.release("1.0.0")
    event = device.check()
    assert event.outcome == "committed", event
    device.events.clear()
    return device
