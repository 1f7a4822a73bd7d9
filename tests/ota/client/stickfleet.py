"""A publisher with sticks and devices beside it, all in this process, each with a clock that a test moves by hand."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.client.limits import Limits
from ota.client.ports import DeviceKeys, Identity, Transport, UpdateEvent
from ota.client.transports.directory import DirectoryTransport
from ota.client.updater import Updater
from ota.publisher import director, sticks
from ota.publisher.build import build_release
from ota.publisher.create import create
from ota.publisher.publish import publish
from ota.publisher.repository import Repository
from ota.publisher.sideload import Sideload, write_sideload
from ota.publisher.spec import parse as parse_spec
from tests.fakes.host import FakeHost, golden_for
from tests.ota.client.conftest import FAST, QuickDisk, model
from tests.ota.client.simulator import kid_of
from tests.ota.publisher.conftest import FACTS, FakeDevice, ManualClock, spec_table

LINE = "person"


class Fleet:
    """A publisher with its own clock, and as many devices as a test enrols."""

    def __init__(self, root: Path, *, own_root: bool = True) -> None:
        self.root = root
        self.clock = ManualClock()
        self.repository: Repository = create(root / "repository", now=self.clock)
        if own_root:
            sticks.create(self.repository)
        self._made = 0

    def release(
        self, version: str, *, grant_to: tuple[str, ...] = (), seed: int = 0, line: str = LINE, size: int = 5_000
    ) -> bytes:
        data = model(seed or int(version.replace(".", "")) or 1, size)
        (self.root / "int8.tflite").write_bytes(data)
        (self.root / "image.png").write_bytes(b"picture")
        build_release(
            self.repository,
            parse_spec(spec_table(version=version, line=line), self.root, model=self.root / "int8.tflite"),
            facts=[FACTS],
            golden=golden_for(data),
            tolerance={"atol": {"int8.tflite": [0.01]}, "margin": 0.1},
        )
        publish(self.repository)
        for device in grant_to:
            director.grant(self.repository, device, line, version)
        return data

    def stick(self, device: str, suffix: str = "") -> Path:
        self._made += 1
        path = self.root / f"stick{self._made}{suffix}"
        self.last: Sideload = write_sideload(self.repository, device, path)
        return path


@dataclass
class Device:
    """A device of the fleet with a clock of its own. A new updater for every act: each is a fresh start."""

    fleet: Fleet
    name: str = "cam-1"
    clock: ManualClock = field(default_factory=ManualClock)
    host: FakeHost = field(default_factory=FakeHost)
    events: list[UpdateEvent] = field(default_factory=list)
    limits: Limits = FAST

    def __post_init__(self) -> None:
        self.own = FakeDevice(self.name)
        bundle = json.loads(self.own.enroll(self.fleet.repository).bundle)
        self.root = bundle["root"].encode()
        self.stick_root = bundle["sideload_root"].encode() if "sideload_root" in bundle else None
        self.state = self.fleet.root / self.name
        self.state.mkdir()

    def updater(self) -> Updater:
        online: list[Transport] = [DirectoryTransport(self.fleet.repository.path, self.name)]
        return Updater(
            Fs(QuickDisk(self.state)),
            Identity(self.name, "generic-x86_64", "0.1.0"),
            DeviceKeys({kid_of(self.own.hpke): self.own.hpke}, bytes(32)),
            self.root,
            online,
            self.host,
            self.clock,
            random.Random(0),
            self.limits,
            self.events.append,
        )

    def look(self) -> UpdateEvent:
        """Over the network."""
        return asyncio.run(self.updater().check())[-1]

    def plug(self, stick: Path, **options: bool) -> UpdateEvent:
        """From a stick."""
        return asyncio.run(self.updater().sideload(stick, self.stick_root, **options))[-1]

    @property
    def serving(self) -> str:
        return self.host.serving.get(LINE, ("", b""))[0]

    def floors(self) -> dict[str, set[str]]:
        """Roles that have a floor, by kind of repository."""
        floors = Journal(Fs(self.state)).record.floors
        return {name.partition("-")[0]: set(roles) for name, roles in floors.items()}

    def main_floors(self) -> dict[str, int]:
        return {role: floor.version for role, floor in Journal(Fs(self.state)).record.floors["main"].items()}
