"""A broker, block server, stick or web server that lies as it likes: it can delay and withhold, and nothing else.

The source is free to give an old document, another one, one with changed bytes, nothing, or silence, differently for
every question. Whatever it does, a device never serves what was not signed for it, never goes back, and follows an
honest source again afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ota.errors import Reason, TransferError
from tests.ota.client.conftest import DEVICE, LINE, Device, model
from tests.ota.client.simulator import SimulatedTransport, Simulator

VERSIONS = ("1.0.0", "1.1.0", "1.2.0")
LIES = ("truth", "truth", "truth", "old", "other", "flipped", "cut", "longer", "absent", "unreachable")


@dataclass
class LyingTransport(SimulatedTransport):
    """Answers each question as `rng` decides; `seen` are earlier publications to replay from."""

    rng: random.Random = field(default_factory=random.Random)
    seen: list[Simulator] = field(default_factory=list)

    def _lie(self, truth: bytes | None, old: list[bytes | None], others: Mapping[object, bytes]) -> bytes:
        kind = self.rng.choice(LIES)
        if kind == "unreachable":
            raise TransferError(Reason.SOURCE_UNREACHABLE, "the source says nothing", retry=True)
        answers = {"old": self.rng.choice(old) if old else None, "other": self.rng.choice([*others.values()])}
        data = answers.get(kind, truth)
        if data is None or kind == "absent":
            raise TransferError(Reason.NOT_FOUND, "the source says that it has none")
        at = self.rng.randrange(len(data) or 1)
        return {
            "flipped": data[:at] + bytes([data[at] ^ 1 << self.rng.randrange(8)]) + data[at + 1 :],
            "cut": data[:at],
            "longer": data + data[:at],
        }.get(kind, data)

    async def metadata(self, role: str, version: int | None, max_bytes: int) -> bytes:
        found = self.repository.documents
        old = [repository.documents.get((role, version)) for repository in self.seen]
        data = self._lie(found.get((role, version)), old, found)
        return self._found(data, role, max_bytes)

    async def desired(self, max_bytes: int) -> bytes:
        old = [repository.desired.get(self.device) for repository in self.seen]
        data = self._lie(self.repository.desired.get(self.device), old, self.repository.desired)
        return self._found(data, "desired", max_bytes)

    async def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        data = self._lie(self.repository.targets.get(sha256), [], self.repository.targets)
        return self._found(data, path, max_bytes)

    async def block(self, sha256: str, offset: int, length: int) -> bytes:
        pieces = {name: data[offset : offset + length] for name, data in self.repository.payloads.items()}
        return self._lie(pieces.get(sha256), [], pieces)


def _publish(device: Device, version: str) -> None:
    device.release(version, data=model(int(version.replace(".", "")), 70_000), codec="raw")
    # another device's assignment lies at the same source
    other = device.repository.built[LINE, version]
    device.repository.grant("cam-2", device.key, other)


@pytest.mark.fault("F90")
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32))
def test_whatever_a_source_answers_a_device_serves_only_what_was_signed_for_it_and_never_goes_back(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    root: Path = tmp_path_factory.mktemp("state")
    device = Device(root, Simulator())
    _publish(device, VERSIONS[0])
    assert device.check().outcome == "committed"
    seen = [device.repository.frozen()]
    for version in VERSIONS[1:]:
        _publish(device, version)
        seen.append(device.repository.frozen())
    device.transports = (LyingTransport(device.repository, DEVICE, rng=random.Random(seed), seen=seen),)
    served = 0
    for _ in range(6):
        device.check()
        version, plain = device.host.serving[LINE]
        assert plain == device.repository.built[LINE, version].plain["int8"]
        assert VERSIONS.index(version) >= served, f"went back from {VERSIONS[served]} to {version}"
        served = VERSIONS.index(version)
        assert device.boot().record.line(LINE).floor_counter == served + 1
    device.transports = (device.transport,)
    for _ in range(2):
        device.check()
    assert device.serving == VERSIONS[-1], device.events[-3:]


@pytest.mark.fault("F90")
def test_a_broker_that_replays_the_day_of_the_first_release_is_named_and_believed_in_nothing(committed: Device) -> None:
    old = committed.repository.frozen()
    committed.release("1.1.0")
    assert committed.check().outcome == "committed"
    committed.transports = (SimulatedTransport(old, DEVICE),)
    assert committed.check().reason is Reason.METADATA_ROLLBACK
    assert committed.serving == "1.1.0"


@pytest.mark.fault("F90")
def test_a_broker_with_a_repository_of_its_own_installs_nothing(committed: Device) -> None:
    own = Simulator()
    built = own.build(LINE, "9.0.0", {"int8": b"of the broker"}, b"golden", counter=99)
    own.grant(DEVICE, committed.key, built)
    committed.transports = (SimulatedTransport(own, DEVICE),)
    assert committed.check().reason is Reason.BAD_SIGNATURE
    assert committed.serving == "1.0.0"


def test_the_liar_of_these_tests_does_lie(committed: Device) -> None:
    """Otherwise they would show nothing."""
    _publish(committed, "1.1.0")
    seen = [committed.repository.frozen()]
    reasons = set()
    for seed in range(40):
        committed.transports = (LyingTransport(committed.repository, DEVICE, rng=random.Random(seed), seen=seen),)
        reasons |= {event.reason for event in [committed.check()] if event.reason is not None}
    assert len(reasons) >= 4, reasons


@pytest.mark.fault("F83")
def test_the_signed_document_decides_in_whatever_order_the_news_of_it_come(committed: Device) -> None:
    """Commands and hints carry no version: what is installed is what the newest document says, never an older one."""
    committed.release("1.1.0")
    older = committed.repository.frozen()
    committed.release("1.2.0")
    assert committed.check().outcome == "committed"
    assert committed.serving == "1.2.0"
    committed.repository.desired[DEVICE] = older.desired[DEVICE]
    for _ in range(2):
        assert committed.check().reason is Reason.METADATA_ROLLBACK
        assert committed.serving == "1.2.0"
