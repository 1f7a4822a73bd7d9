"""The walk along roots ends where the publisher says so, and nowhere else: three kinds of quiet, three reasons."""

from __future__ import annotations

import asyncio
import datetime
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ota import blocks
from ota.blocks import Request
from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.client.ports import Transport
from ota.client.repository import Refreshed, Repository
from ota.client.transports.mqtt import MqttTransport, Waits
from ota.errors import Reason, RootUnreachable, TransferError
from ota.mailbox import Received
from ota.publisher.serve import BlockServer
from tests.fakes.blocksource import MemorySource
from tests.ota.client.conftest import DEVICE, LINE, Device, QuickDisk, run
from tests.ota.client.simulator import SimulatedTransport, Simulator, sha256

WAITS = Waits(first_s=0.02, shortest_s=0.02, longest_s=0.03, attempts=2)


class Broker:
    """The shipped block server and the shipped transport with a broker between them that drops what `drops` says."""

    def __init__(self, simulator: Simulator, drops: Callable[[Request], bool] = lambda request: False) -> None:
        self.drops = drops
        self.asked: list[Request] = []
        source = MemorySource(metadata=simulator.documents, desired=simulator.desired, targets={}, payloads={})
        self._server = BlockServer(source, "edge", clock=lambda: 0.0)
        self.transport = MqttTransport(
            self, clock=lambda: asyncio.get_running_loop().time(), first_rid=random.getrandbits(32), waits=WAITS
        )

    def request(self, payload: bytes) -> bool:
        request = blocks.parse_request(payload)
        self.asked.append(request)
        if not self.drops(request):
            asyncio.get_running_loop().call_soon(self._answer, payload)
        return True

    def _answer(self, payload: bytes) -> None:
        answer = self._server.answer(Received(f"edge/v1/edge/{DEVICE}/blk/get", payload, 0, False, None, (), 0))
        if answer is not None:
            self.transport.received(answer.correlation, answer.user, answer.payload)


def _is_root(request: Request) -> bool:
    return isinstance(request.item, blocks.Metadata) and request.item.role == "root"


class Client:
    """A repository's client on a disk of its own."""

    def __init__(self, device: Device, folder: Path) -> None:
        folder.mkdir()
        self._device = device
        self.fs = Fs(QuickDisk(folder))
        self.journal = Journal(self.fs)
        self.repository = Repository(self.fs, self.journal, "main", device.pinned_root, device.limits)

    def refresh(self, *transports: Transport) -> Refreshed:
        return run(self.repository.refresh(transports, DEVICE, self._device.now))

    def refused(self, transports: Sequence[Transport]) -> TransferError:
        before = self.journal.record
        with pytest.raises(TransferError) as refused:
            self.refresh(*transports)
        assert self.journal.record == before
        return refused.value


@pytest.fixture
def client(device: Device, tmp_path: Path) -> Client:
    """A client that has never asked; the publisher has rotated a key since the client was enrolled."""
    device.repository.rotate("timestamp")
    device.release("1.0.0")
    return Client(device, tmp_path / "client")


def test_a_publisher_that_says_there_is_no_further_root_ends_the_walk(client: Client, device: Device) -> None:
    broker = Broker(device.repository)
    assert list(client.refresh(broker.transport).desired.assignments) == [LINE]
    assert [request.item.version for request in broker.asked if _is_root(request)] == [2, 3]  # type: ignore[union-attr]
    del device.repository.documents["timestamp", None]
    assert client.refused([Broker(device.repository).transport]).reason is Reason.NOT_FOUND


def test_silence_of_everything_is_a_time_out(client: Client, device: Device) -> None:
    broker = Broker(device.repository, lambda request: True)
    failure = client.refused([broker.transport])
    assert failure.reason is Reason.TRANSFER_TIMEOUT
    assert not isinstance(failure, RootUnreachable)
    assert {request.item for request in broker.asked} == {
        blocks.Metadata("root", 2),
        blocks.Metadata("timestamp", None),
    }


@pytest.mark.parametrize("dropped_from", [2, 3])
def test_a_broker_that_drops_requests_for_roots_alone_is_found_out(
    client: Client, device: Device, dropped_from: int
) -> None:
    device.repository.rotate("snapshot")
    device.repository.publish()

    def drops(request: Request) -> bool:
        return _is_root(request) and (request.item.version or 0) >= dropped_from  # type: ignore[union-attr]

    broker = Broker(device.repository, drops)
    with pytest.raises(RootUnreachable) as refused:
        client.refresh(broker.transport)
    assert refused.value.reason is Reason.ROOT_UNREACHABLE
    assert refused.value.retry
    # what was learnt on the way is kept, and nothing behind it was believed
    assert client.journal.record.floors.get("main", {}).keys() == ({"root"} if dropped_from == 3 else set())


def test_silence_behind_a_lost_connection_is_no_suspicion(client: Client, device: Device) -> None:
    transport = SimulatedTransport(device.repository, DEVICE, silent=frozenset({"root"}))
    original = transport.metadata

    async def metadata(role: str, version: int | None, max_bytes: int) -> bytes:
        if role != "root":
            raise TransferError(Reason.SOURCE_UNREACHABLE, "not connected", retry=True)
        return await original(role, version, max_bytes)

    transport.metadata = metadata  # type: ignore[method-assign]
    assert client.refused([transport]).reason is Reason.SOURCE_UNREACHABLE


def test_another_transport_completes_what_one_without_roots_cannot(client: Client, device: Device) -> None:
    broker = Broker(device.repository, _is_root)
    refreshed = client.refresh(broker.transport, SimulatedTransport(device.repository, DEVICE))
    assert refreshed.transport.name == "simulated"
    assert list(refreshed.desired.assignments) == [LINE]


def test_a_second_transport_without_roots_does_not_finish_either(client: Client, device: Device) -> None:
    first, second = (Broker(device.repository, _is_root) for _ in range(2))
    assert client.refused([first.transport, second.transport]).reason is Reason.ROOT_UNREACHABLE


class Failing(SimulatedTransport):
    """Answers for one role, by name, with `failure`."""

    role: str
    failure: TransferError

    async def metadata(self, role: str, version: int | None, max_bytes: int) -> bytes:
        if role == self.role:
            raise self.failure
        return await super().metadata(role, version, max_bytes)


def failing(device: Device, role: str, reason: Reason) -> Failing:
    transport = Failing(device.repository, DEVICE, name="failing")
    transport.role, transport.failure = role, TransferError(reason, "as the test wants it")
    return transport


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
@pytest.mark.parametrize("reason", ["transfer_corrupt", "server_refused", "server_untrusted", "unsupported"])
def test_a_transport_that_garbles_or_refuses_documents_is_passed_over_for_the_next(
    client: Client, device: Device, role: str, reason: str
) -> None:
    first = failing(device, role, Reason(reason))
    refreshed = client.refresh(first, SimulatedTransport(device.repository, DEVICE))
    assert refreshed.transport.name == "simulated"
    assert list(refreshed.desired.assignments) == [LINE]
    assert refreshed.passed_over is not None
    assert refreshed.passed_over.reason is Reason(reason)


@pytest.mark.parametrize("reason", ["source_unreachable", "transfer_timeout"])
def test_a_transport_that_is_only_out_of_reach_is_passed_over_without_a_word(
    client: Client, device: Device, reason: str
) -> None:
    first = failing(device, "timestamp", Reason(reason))
    assert client.refresh(first, SimulatedTransport(device.repository, DEVICE)).passed_over is None


def test_a_document_that_one_transport_lacks_is_had_from_another(client: Client, device: Device) -> None:
    first = failing(device, "snapshot", Reason.NOT_FOUND)
    assert client.refresh(first, SimulatedTransport(device.repository, DEVICE)).transport.name == "simulated"


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_said_of_the_repository_is_reported_rather_than_a_failure_on_the_way(
    client: Client, device: Device, turned: bool
) -> None:
    ways = [failing(device, "timestamp", reason) for reason in (Reason.SOURCE_UNREACHABLE, Reason.NOT_FOUND)]
    with pytest.raises(TransferError) as refused:
        client.refresh(*(ways[::-1] if turned else ways))
    assert refused.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize("lie", ["bad_json", "bad_signature", "metadata_rollback", "timestamp_expired"])
def test_a_source_that_lies_is_named_and_keeps_no_device_from_an_honest_one(committed: Device, lie: str) -> None:
    honest = committed.repository
    hostile = SimulatedTransport(honest.frozen(), DEVICE, name="hostile")
    documents = hostile.repository.documents
    if lie == "metadata_rollback":
        for _ in range(2):
            honest.publish()
            committed.check()
    elif lie == "timestamp_expired":
        committed.now += datetime.timedelta(days=31)
        later = committed.now + datetime.timedelta(days=30)
        for document in (honest.root, honest.top, honest.snapshot, honest.timestamp, *honest.roles.values()):
            document.signed.expires = later
        honest.next_root()
        hostile.repository.documents["root", 2] = honest.documents["root", 2]
        honest.publish()
        committed.release("1.1.0", grant=False)
    else:
        damage = b"{" if lie == "bad_json" else documents["timestamp", None].replace(b'"version":', b'"x":1,"version":')
        documents["timestamp", None] = damage
    committed.grant(committed.release("1.2.0", grant=False), expires=committed.now + datetime.timedelta(days=9))
    committed.events.clear()
    committed.transports = (hostile, committed.transport)
    assert committed.check().outcome == "committed"
    assert committed.serving == "1.2.0"
    named = [event for event in committed.events if event.reason is not None]
    assert [(event.line, event.outcome, event.reason) for event in named] == [("*", None, Reason(lie))]
    assert named[0].message.startswith("hostile was passed over: ")
    assert named[0].hint


@pytest.mark.parametrize("lie", ["metadata_mismatch", "not_found"])
def test_a_line_that_one_source_garbles_or_withholds_is_had_from_another(committed: Device, lie: str) -> None:
    committed.release("1.1.0")
    hostile = SimulatedTransport(committed.repository.frozen(), DEVICE, name="hostile")
    role = (f"release-{LINE}", committed.repository.roles[f"release-{LINE}"].signed.version)
    if lie == "metadata_mismatch":
        hostile.repository.documents[role] = b"{"
    else:
        del hostile.repository.documents[role]
    committed.transports = (hostile, committed.transport)
    assert committed.check().outcome == "committed"
    assert committed.serving == "1.1.0"
    assert [(event.line, event.reason) for event in committed.events if event.reason] == [("*", Reason(lie))]


@pytest.mark.parametrize("lie", [b"{", b"", None], ids=["cut", "empty", "changed"])
def test_a_release_that_one_source_garbles_is_had_from_another(committed: Device, lie: bytes | None) -> None:
    built = committed.release("1.1.0")
    hostile = SimulatedTransport(committed.repository.frozen(), DEVICE, name="hostile")
    signed = built.data
    hostile.repository.targets[sha256(signed)] = signed.replace(b"1.1.0", b"1.1.1") if lie is None else lie
    committed.transports = (hostile, committed.transport)
    assert committed.check().outcome == "committed"
    assert committed.serving == "1.1.0"
    named = [event for event in committed.events if event.reason is not None]
    assert [(event.line, event.outcome, event.reason) for event in named] == [(LINE, None, Reason.METADATA_MISMATCH)]
    assert "hostile" in named[0].message


def test_a_source_without_a_document_for_a_new_device_is_not_the_last_one_asked(device: Device) -> None:
    device.release("1.0.0")
    empty = SimulatedTransport(device.repository.frozen(), DEVICE, name="empty")
    empty.repository.desired.clear()
    device.transports = (empty, device.transport)
    assert device.check().outcome == "committed"
    assert device.serving == "1.0.0"


def test_a_line_that_no_source_can_prove_is_refused_once_and_the_newest_answer_counts(committed: Device) -> None:
    built = committed.release("1.1.0", grant=False)
    committed.grant(built, edit=lambda desired: desired.targets[built.path].hashes.update(sha256="0" * 64))
    second = SimulatedTransport(committed.repository, DEVICE, name="second")
    committed.transports = (committed.transport, second)
    event = committed.check()
    assert (event.outcome, event.reason) == ("rejected", Reason.METADATA_MISMATCH)
    assert committed.serving == "1.0.0"
    assert second.documents_asked


def test_the_device_reports_it_and_goes_on_serving(committed: Device) -> None:
    committed.transports = (Broker(committed.repository, _is_root).transport,)
    event = committed.check()
    assert (event.outcome, event.reason) == ("failed", Reason.ROOT_UNREACHABLE)
    assert event.hint
    assert committed.serving == "1.0.0"
