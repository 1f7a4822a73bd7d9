"""The two bounded queues between the network thread and the rest."""

from __future__ import annotations

import pytest

from ota.errors import BrokerError, Reason
from ota.mailbox import Inbox, Lost, Message, Outbox, Received


def _received(payload: bytes = b"x", topic: str = "t") -> Received:
    return Received(topic, payload, 0, False, None, (), 10 + len(payload))


def _lost(number: int) -> Lost:
    return Lost(number, BrokerError(Reason.BROKER_LOST, "gone"), 1.0)


def test_an_inbox_drops_and_counts_messages_beyond_its_count() -> None:
    inbox = Inbox(limit_messages=3)
    for number in range(5):
        inbox.put(_received(bytes([number])))
    assert [event.payload for event in inbox.drain() if isinstance(event, Received)] == [b"\0", b"\1", b"\2"]
    assert inbox.dropped == 2


def test_an_inbox_drops_messages_beyond_its_bytes_and_takes_more_once_read() -> None:
    inbox = Inbox(limit_messages=100, limit_bytes=1000)
    inbox.put(_received(bytes(890)))
    inbox.put(_received(bytes(200)))
    assert inbox.dropped == 1
    assert inbox.get(0) is not None
    inbox.put(_received(bytes(200)))
    assert inbox.dropped == 1


def test_a_full_inbox_still_learns_that_the_connection_was_lost() -> None:
    inbox = Inbox(limit_messages=2)
    for _ in range(10):
        inbox.put(_received())
    inbox.put(_lost(1))
    newest = inbox.drain()[-1]
    assert isinstance(newest, Lost)
    assert newest.number == 1


def test_connection_events_nobody_reads_do_not_grow_without_bound_and_the_newest_stays() -> None:
    inbox = Inbox(limit_messages=4)
    for number in range(1000):
        inbox.put(_lost(number))
    events = inbox.drain()
    assert len(events) <= 8
    newest = events[-1]
    assert isinstance(newest, Lost)
    assert newest.number == 999


def test_an_outbox_refuses_what_does_not_fit_and_keeps_what_it_has() -> None:
    outbox = Outbox(limit_messages=2, limit_bytes=100)
    assert outbox.put(Message("a", bytes(60)))
    assert not outbox.put(Message("b", bytes(60)))
    assert outbox.put(Message("c", bytes(10)))
    assert not outbox.put(Message("d", b""))
    assert len(outbox) == 2


def test_an_inbox_counts_a_message_of_properties_alone_by_what_it_weighs() -> None:
    inbox = Inbox(limit_messages=256, limit_bytes=1_000_000)
    for _ in range(256):
        inbox.put(Received("t", b"", 0, False, None, (("a" * 50_000, "b" * 50_000),), 100_015))
    assert len(inbox.drain()) == 9
    assert inbox.dropped == 247


@pytest.mark.parametrize("size", [10, 48_000], ids=["many messages", "many bytes"])
def test_history_that_leaves_slowly_keeps_no_request_and_no_state_from_being_sent(size: int) -> None:
    outbox = Outbox(limit_messages=256, limit_bytes=4_000_000)
    while outbox.put(Message("tele", bytes(size))):
        pass
    assert outbox.put(Message("blk/get", bytes(150), qos=0))
    assert outbox.put(Message("reported", bytes(100_000), retain=True))
    assert not outbox.put(Message("tele", bytes(size)))


def test_urgent_messages_overtake_and_are_lost_with_the_connection_while_others_are_sent_again_in_order() -> None:
    outbox = Outbox(limit_messages=10, limit_bytes=1000)
    for name in ("one", "two", "three"):
        outbox.put(Message(name, b"1", qos=1))
    outbox.put(Message("now", b"1", qos=0))
    assert outbox.next(2).topic == "now"  # type: ignore[union-attr]
    for packet_id in (1, 2):
        message = outbox.next(2)
        assert message is not None
        outbox.sent(packet_id, message)
    assert outbox.next(2) is None, "two are in flight"
    assert outbox.settled(1).topic == "one"  # type: ignore[union-attr]
    outbox.put(Message("now", b"1", qos=0))
    assert outbox.connection_lost() == 1
    order = []
    while (message := outbox.next(10)) is not None:
        order.append(message.topic)
    assert order == ["two", "three"]


def test_a_newer_state_replaces_the_one_that_still_waits() -> None:
    outbox = Outbox(limit_messages=3, limit_bytes=1000)
    for payload in (b"old", b"newer", b"newest"):
        assert outbox.put(Message("status", payload, retain=True))
    message = outbox.next(5)
    assert message is not None
    assert message.payload == b"newest"
    assert outbox.next(5) is None


def test_the_outbox_counts_bytes_down_to_zero() -> None:
    outbox = Outbox(limit_messages=10, limit_bytes=13)
    for round_ in range(100):
        assert outbox.put(Message("a", bytes(10), qos=round_ % 2)), round_
        message = outbox.next(5)
        assert message is not None
        if message.qos:
            outbox.sent(round_, message)
            outbox.settled(round_)


def test_a_message_taken_when_the_connection_breaks_does_not_count_for_ever() -> None:
    outbox = Outbox(limit_messages=10, limit_bytes=13)
    for _ in range(5):
        assert outbox.put(Message("a", bytes(10)))
        assert outbox.next(5) is not None
        outbox.connection_lost()
