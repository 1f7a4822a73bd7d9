"""The real publisher's repository, read by the real client through a directory: both halves agree on every format."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from pathlib import Path

import pytest

from ota.client.fsops import Fs
from ota.client.ports import DeviceKeys, Identity, UpdateEvent
from ota.client.transports.directory import DirectoryTransport
from ota.client.updater import Updater
from ota.errors import Reason
from ota.publisher.build import build_release
from ota.publisher.create import create
from ota.publisher.director import grant
from ota.publisher.publish import publish
from ota.publisher.repository import Repository, system_clock
from ota.publisher.rotate import rotate
from ota.publisher.spec import parse as parse_spec
from tests.fakes.host import FakeHost, golden_for
from tests.ota.client.conftest import FAST, QuickDisk, model
from tests.ota.client.simulator import kid_of
from tests.ota.publisher.conftest import FACTS, FakeDevice, spec_table


class Pair:
    """A publisher and one enrolled device."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repository: Repository = create(root / "repository")
        self.device = FakeDevice("cam-1")
        bundle = json.loads(self.device.enroll(self.repository).bundle)
        (root / "state").mkdir()
        self.host = FakeHost()
        self.events: list[UpdateEvent] = []
        self.updater = Updater(
            Fs(QuickDisk(root / "state")),
            Identity("cam-1", "generic-x86_64", "0.1.0"),
            DeviceKeys({kid_of(self.device.hpke): self.device.hpke}, bytes(32)),
            bundle["root"].encode(),
            [DirectoryTransport(self.repository.path, "cam-1")],
            self.host,
            system_clock,
            random.Random(0),
            FAST,
            self.events.append,
        )

    def release(self, version: str, data: bytes, counter: int | None = None) -> None:
        path = self.root / "int8.tflite"
        path.write_bytes(data)
        (self.root / "image.png").write_bytes(b"picture")
        spec = parse_spec(spec_table(version=version), self.root, model=path)
        build_release(
            self.repository,
            spec,
            facts=[FACTS],
            golden=golden_for(data),
            tolerance={"atol": {"int8.tflite": [0.01]}, "margin": 0.1},
            counter=counter,
        )
        publish(self.repository)

    def check(self) -> UpdateEvent:
        return asyncio.run(self.updater.check())[-1]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def test_a_published_and_granted_release_is_installed_and_its_successor_comes_as_a_delta(pair: Pair) -> None:
    first = model(1)
    pair.release("1.0.0", first)
    grant(pair.repository, "cam-1", "person", "1.0.0")
    event = pair.check()
    assert event.outcome == "committed", event
    assert pair.host.serving["person"] == ("1.0.0", first)
    second = first[:1000] + bytes(100) + first[1100:]
    pair.release("1.1.0", second)
    grant(pair.repository, "cam-1", "person", "1.1.0")
    event = pair.check()
    assert event.outcome == "committed", event
    assert pair.host.serving["person"] == ("1.1.0", second)
    assert "zstd-patch" in pair.host.transforms
    assert event.traffic.fetched_bytes < event.traffic.full_bytes / 10
    assert pair.check().outcome == "up_to_date"


def test_a_published_release_that_was_not_granted_is_not_installed(pair: Pair) -> None:
    pair.release("1.0.0", model(1))
    assert asyncio.run(pair.updater.check()) == []
    assert not pair.host.serving


def test_the_director_cannot_send_a_device_back(pair: Pair) -> None:
    for version, seed in (("1.0.0", 1), ("1.1.0", 2)):
        pair.release(version, model(seed))
    grant(pair.repository, "cam-1", "person", "1.1.0")
    assert pair.check().outcome == "committed"
    grant(pair.repository, "cam-1", "person", "1.0.0")
    assert pair.check().reason is Reason.COUNTER_ROLLBACK
    assert pair.host.serving["person"][0] == "1.1.0"


def test_a_repository_restored_from_a_backup_reaches_its_devices_after_the_rotation_that_the_hint_names(
    pair: Pair,
) -> None:
    place = pair.repository.path
    pair.release("1.0.0", model(1))
    grant(pair.repository, "cam-1", "person", "1.0.0")
    shutil.copytree(place, pair.root / "backup")
    pair.release("1.1.0", model(2))
    grant(pair.repository, "cam-1", "person", "1.1.0")
    pair.release("1.2.0", model(3))
    assert pair.check().outcome == "committed"
    shutil.rmtree(place)
    shutil.copytree(pair.root / "backup", place)
    publish(pair.repository)
    event = pair.check()
    assert event.reason is Reason.METADATA_ROLLBACK
    for name in ("snapshot", "timestamp", "director"):
        assert name in event.hint
        rotate(pair.repository, name)
    pair.release("1.3.0", model(4), counter=3)
    grant(pair.repository, "cam-1", "person", "1.3.0")
    assert pair.check().outcome == "committed"
    assert pair.host.serving["person"] == ("1.3.0", model(4))
