"""What daemon and workers say: whatever arrives is a message with its fields and types, or an error; nothing leaks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import protocol
from agent.errors import AgentError, Reason
from tests.agent.daemon.rig import descriptors

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
KINDS = {
    "int": INT64,
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "str": TEXT,
    "bool": st.booleans(),
    "dict[str, Any]": st.dictionaries(TEXT, JSON, max_size=4),
    "list[Any]": st.lists(JSON, max_size=4),
    "list[int]": st.lists(INT64, max_size=6),
}


@st.composite
def messages(draw: st.DrawFn) -> Any:
    cls = draw(st.sampled_from(sorted(protocol.MESSAGES.values(), key=lambda c: c.__name__)))
    return cls(**{f.name: draw(KINDS[str(f.type)]) for f in dataclasses.fields(cls)})


def decoded(data: bytes) -> Any:
    """The message, or None for one refused as bad; every other error is the test's."""
    with contextlib.suppress(AgentError):
        return protocol.decode(data)
    return None


@given(messages())
@settings(deadline=None, max_examples=200)
def test_a_message_comes_back_as_it_was(message: Any) -> None:
    assert protocol.decode(protocol.encode(message)) == message


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_a_message_or_a_bad_one(data: bytes) -> None:
    with pytest.raises(AgentError) as caught:
        protocol.decode(data)
    assert caught.value.reason is Reason.BAD_MESSAGE


@given(messages(), st.data())
@settings(deadline=None, max_examples=300)
def test_a_message_with_one_field_replaced_has_the_declared_types_or_is_refused(
    message: Any, data: st.DataObject
) -> None:
    body = json.loads(protocol.encode(message))
    key = data.draw(st.sampled_from(sorted(body)))
    if data.draw(st.booleans()):
        del body[key]
    else:
        body[key] = data.draw(JSON)
    seen = decoded(json.dumps(body).encode())
    if seen is None:
        return
    for field in dataclasses.fields(seen):
        value = getattr(seen, field.name)
        if field.type in ("int", "list[int]"):
            assert all(-(1 << 63) <= n < 1 << 63 for n in (value if isinstance(value, list) else [value]))


@pytest.mark.parametrize(
    "text",
    [
        '{"t":"Measured","runs_ns":[' + "9" * 400 + '],"rss_bytes":1}',
        '{"t":"Measured","runs_ns":[true],"rss_bytes":1}',
        '{"t":"Measured","runs_ns":[1],"rss_bytes":9223372036854775808}',
        '{"t":"RingAttached","warm_ms":NaN}',
        '{"t":"RingAttached","warm_ms":1e999}',
        '{"t":"RingAttached","warm_ms":' + "9" * 400 + "}",
        '{"t":"Fault","reason":"x","message":"\\ud800","hint":""}',
        '{"t":"Fault","reason":"x","message":"\\uDBFF","hint":""}',
        '{"t":"Finished","answered":1}',
        '{"t":"Finished","answered":1,"last_seq":1,"more":1}',
        '{"t":["Finished"],"answered":1,"last_seq":1}',
        "[" * 5000,
        '{"t":"Result","seq":0,"t_frame_ns":0,"t_done_ns":0,"stages_us":[],"items":' + "[" * 30000 + "]" * 30000 + "}",
    ],
)
def test_what_a_reader_would_stumble_over_is_refused(text: str) -> None:
    with pytest.raises(AgentError) as caught:
        protocol.decode(text.encode())
    assert caught.value.reason is Reason.BAD_MESSAGE


def test_an_emoji_is_no_half_a_character() -> None:
    fault = protocol.Fault("x", "\U0001f916", "")
    assert protocol.decode(protocol.encode(fault)) == fault


def test_a_message_too_large_for_the_socket_is_not_sent() -> None:
    with pytest.raises(AgentError) as caught:
        protocol.encode(protocol.Fault("x", "y" * protocol.MAX_MESSAGE_BYTES, ""))
    assert caught.value.reason is Reason.BAD_MESSAGE


@pytest.mark.parametrize("count", [1, protocol.MAX_FDS, protocol.MAX_FDS + 20])
@pytest.mark.parametrize("data", [protocol.encode(protocol.Measured([1], [1], [0], 1, 1)), b"nonsense", b""])
def test_descriptors_nobody_asked_for_are_closed(data: bytes, count: int) -> None:
    ours, theirs = protocol.socket_pair()
    with ours, theirs:
        before = descriptors()
        socket.send_fds(theirs, [data], [theirs.fileno()] * count)
        with contextlib.suppress(AgentError):
            packet = protocol.receive(ours)
            assert packet is None or packet.fds == []
        assert descriptors() == before


def test_the_wrong_number_of_descriptors_is_refused_and_closed() -> None:
    ours, theirs = protocol.socket_pair()
    with ours, theirs:
        before = descriptors()
        protocol.send(theirs, protocol.Transformed(1, 1.0), (theirs.fileno(), theirs.fileno()))
        packet = protocol.receive(ours)
        assert packet is not None
        with pytest.raises(AgentError):
            packet.take(1)
        assert descriptors() == before


def test_a_descriptor_taken_is_the_takers() -> None:
    ours, theirs = protocol.socket_pair()
    with ours, theirs:
        protocol.send(theirs, protocol.Transformed(1, 1.0), (theirs.fileno(),))
        packet = protocol.receive(ours)
        assert packet is not None
        (fd,) = packet.take(1)
        packet.close()
        os.fstat(fd)
        os.close(fd)


def test_a_closed_socket_is_the_end() -> None:
    ours, theirs = protocol.socket_pair()
    theirs.close()
    with ours:
        assert protocol.receive(ours) is None
