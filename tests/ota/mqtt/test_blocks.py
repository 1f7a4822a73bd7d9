"""Requests and answers of the block exchange as bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota import blocks
from ota.blocks import Blob, Desired, Header, Metadata, Request, Status, Target
from ota.errors import OtaError, Reason

SHA = "ab" * 32
GOOD = [
    Request(1, Metadata("timestamp", None), 0, 98304, 16384),
    Request(2, Metadata("root", 7), 0, 98304, 65536),
    Request(3, Metadata("release-person", 3), 98304, 98304, 1 << 20),
    Request(4, Desired(), 0, 1000, 256 << 10),
    Request(0xFFFFFFFF, Target("person/1.2.3/release.json", SHA), 0, 98304, 1 << 20),
    Request(6, Blob(SHA), 5 * 65536, 65536, None),
]


@pytest.mark.parametrize("request_", GOOD)
def test_a_request_survives_its_own_encoding_within_the_size_cap(request_: Request) -> None:
    encoded = request_.encode()
    assert len(encoded) <= blocks.MAX_REQUEST_BYTES
    assert blocks.parse_request(encoded) == request_
    assert blocks.request_id(encoded) == request_.rid


def _altered(base: int, **changes: Any) -> bytes:
    body = json.loads(GOOD[base].encode())
    for key, value in changes.items():
        if value is ...:
            del body[key]
        else:
            body[key] = value
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    "data",
    [
        _altered(5, v=2),
        _altered(5, v="1"),
        _altered(5, rid=-1),
        _altered(5, rid=1 << 32),
        _altered(5, rid=True),
        _altered(5, rid=1.5),
        _altered(5, get="file"),
        _altered(5, get=["blob"]),
        _altered(5, sha256=SHA.upper()),
        _altered(5, sha256="../../etc/passwd"),
        _altered(5, sha256=...),
        _altered(5, offset=-65536),
        _altered(5, offset=1 << 41),
        _altered(5, length=0),
        _altered(5, length=98305),
        _altered(5, length=10**30),
        _altered(5, path="/etc/passwd"),
        _altered(5, max_bytes=5),
        _altered(1, role="devices/cam-2"),
        _altered(1, role="release-../root"),
        _altered(1, role="release-"),
        _altered(1, role="keys"),
        _altered(1, version=None),
        _altered(1, version=0),
        _altered(1, version="7"),
        _altered(1, max_bytes=...),
        _altered(1, max_bytes=1 << 40),
        _altered(0, version=1),
        _altered(3, device="cam-2"),
        _altered(4, path="../keys/ca.key"),
        _altered(4, path="/etc/passwd"),
        _altered(4, path="person//release.json"),
        _altered(4, path="person/%2e%2e/x"),
        _altered(4, path="a" * 300),
        b"",
        b"[]",
        b"null",
        b"{" * 500,
        b"[" * 1000,
        b'{"v":1,"v":1}',
        b"\xff\xfe",
        b'{"v":NaN}',
    ],
)
def test_a_malformed_request_is_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(OtaError) as caught:
        blocks.parse_request(data)
    assert caught.value.reason in (Reason.BAD_JSON, Reason.BAD_TARGET_NAME)


def test_a_request_above_the_cap_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(OtaError) as caught:
        blocks.parse_request(b"[" * 1025)
    assert "1025 bytes" in caught.value.message


@given(st.binary(max_size=1100))
def test_no_bytes_do_anything_but_be_refused(data: bytes) -> None:
    blocks.request_id(data)
    with pytest.raises(OtaError):
        blocks.parse_request(data)


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_a_header_is_twenty_bytes_and_survives_its_own_encoding(rid: int, offset: int, total: int) -> None:
    header = Header(rid, offset, total)
    assert len(header.encode()) == 20
    assert blocks.parse_header(header.encode()) == header


@pytest.mark.parametrize("correlation", [None, b"", bytes(19), bytes(21)])
def test_other_correlation_data_is_no_header(correlation: bytes | None) -> None:
    assert blocks.parse_header(correlation) is None


@pytest.mark.parametrize(
    ("user", "status"),
    [
        ((("status", "ok"),), (Status.OK, "")),
        ((("status", "ok"), ("sha256", SHA)), (Status.OK, SHA)),
        ((("status", "not_found"),), (Status.NOT_FOUND, "")),
        ((("status", "fine"),), None),
        ((("status", "ok"), ("sha256", "short")), None),
        ((), None),
    ],
)
def test_the_status_is_one_of_four_words(user: tuple[tuple[str, str], ...], status: object) -> None:
    assert blocks.parse_status(user) == status
