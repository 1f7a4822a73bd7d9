"""Bytes from outside pass through one strict reader each; who may do without is a closed list with a reason."""

from __future__ import annotations

import ast
import asyncio
import functools
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from agent.errors import AgentError
from agent.errors import Reason as AgentReason
from agent.logs import JsonFormatter, TerminalFormatter
from ota import delta, strictjson
from ota.client.transports.zip import ZipTransport
from ota.errors import OtaError, PayloadError, Reason, one_line
from ota.release import check_target_name
from tests.meta.sources import ROOT, modules

# call: modules that may make it, with the reason
READERS: dict[str, dict[str, str]] = {
    "json.loads": {
        "ota.strictjson": "the strict reader itself",
        "agent.protocol": "32 messages a second from a worker: every field's type and range is checked after it",
        "agent.worker.delegates.onnxruntime": "what its own runtime wrote a moment before, bounded",
        "agent.worker.follow": "bounded, from another worker: every value is checked after it, or left out",
        "agent.worker.describe": "a file that the same command wrote a moment before, in a process without rights",
    },
    "json.load": {},
    "pyexpat.ParserCreate": {
        "agent.worker.delegates.ovir": "a signed file, bounded, no document type, in a process without rights",
    },
    "tomllib.loads": {
        "agent.config": "the device's one file, from its owner",
        "agent.profile": "files of the package",
        "ota.publisher.spec": "the publisher's own file",
        "ota.publisher.settings": "the publisher's own file",
        "ota.publisher.wanted": "the publisher's own file",
    },
    "tomllib.load": {},
    "zipfile.ZipFile": {
        "agent.worker.golden": "stored members of a signed file, bounded, in a process without rights",
        "ota.publisher.sideload": "writes a stored archive",
    },
    "zstandard.ZstdDecompressor": {"ota.delta": "bounded by the signed length and a window limit"},
    "numpy.load": {},
    "np.load": {},
}
FORBIDDEN = {"pickle", "marshal", "shelve", "zlib", "gzip", "bz2", "lzma", "tarfile", "xml", "yaml"}


@functools.cache
def calls() -> dict[str, set[str]]:
    """Dotted names of everything that each module calls."""
    return {
        name: {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        for name, path in modules().items()
    }


@pytest.mark.parametrize("call", READERS)
def test_only_listed_modules_call_a_reader_that_is_not_strict(call: str) -> None:
    found = {name for name, called in calls().items() if call in called}
    assert found == set(READERS[call]), f"use ota.strictjson or another bounded reader, or list the module: {call}"


def test_nobody_imports_a_reader_by_its_bare_name() -> None:
    """`from json import loads` would slip through the test above."""
    hidden = []
    readers = {"json", "tomllib", "zipfile", "zstandard"}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in readers:
                hidden.append(name)
            if isinstance(node, ast.Import):
                hidden += [name for alias in node.names if alias.name in readers and alias.asname]
    assert not hidden


def test_nothing_unpacks_or_unpickles() -> None:
    found = {}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            wanted = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                wanted = [node.module or ""]
            for module in wanted:
                if module.partition(".")[0] in FORBIDDEN:
                    found[name] = module
    assert not found


# -- strict JSON -------------------------------------------------------------------------------------------------------

REFUSED = {
    "larger than allowed": b" " * 100 + b"1",
    "nested 33 deep": b"[" * 33 + b"]" * 33,
    "nested far beyond the interpreter's stack": b"[" * 90,
    "one key twice": b'{"a": 1, "a": 1}',
    "one key twice, written differently": b'{"a": 1, "\\u0061": 1}',
    "NaN": b"NaN",
    "infinity": b"-Infinity",
    "a number that becomes infinity": b"1e999",
    "an integer of 20 digits": b"1" * 20,
    "a negative integer of 20 digits": b"-" + b"1" * 20,
    "a lone surrogate": b'"\\ud800"',
    "a lone surrogate as a key": b'{"\\udfff": 1}',
    "not UTF-8": b'"\xff"',
    "UTF-8 of a surrogate": b'"\xed\xa0\x80"',
    "a byte order mark": b"\xef\xbb\xbf1",
    "UTF-16": "1".encode("utf-16"),
    "two values": b"1 2",
    "nothing": b"",
    "a comment": b"/**/1",
    "a comma too many": b"[1,]",
    "a control character in a text": b'"a\nb"',
    "single quotes": b"{'a': 1}",
}


@pytest.mark.fault("F38")
@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_json_that_is_not_strict_is_refused(data: bytes) -> None:
    with pytest.raises(OtaError) as refusal:
        strictjson.loads(data, max_bytes=100, what="text")
    assert refusal.value.reason is Reason.BAD_JSON
    assert refusal.value.hint


def test_json_within_the_bounds_is_read_as_it_stands() -> None:
    data = b'{"a": [-7, 2.5e3, null, true, "\\ud83d\\ude00"], "b": ' + b"[" * 31 + b"]" * 31 + b"}"
    value = strictjson.loads(data, max_bytes=200, what="text")
    assert value["a"] == [-7, 2500.0, None, True, "\U0001f600"]
    assert strictjson.loads(b"9" * 19, max_bytes=19, what="text") == 10**19 - 1


def test_brackets_inside_of_texts_do_not_count_as_depth() -> None:
    text = '"' + "[{" * 1000 + '\\"' + "[" * 1000 + '"'
    assert strictjson.loads(text.encode(), max_bytes=10_000, what="text") == "[{" * 1000 + '"' + "[" * 1000


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F44")
@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "/a", "a/", "a//b", "a/./b", "a/../b", "a..b", "A", "a b", "a\\b", "a\0", "a\n", "é", "%2e"),
        *("a/.b", "-a", "_a", "a" * 201, "a:b", "~", "a/b\n"),
    ],
)
def test_target_names_out_of_the_grammar_are_refused(name: str) -> None:
    with pytest.raises(OtaError) as refusal:
        check_target_name(name)
    assert refusal.value.reason is Reason.BAD_TARGET_NAME


def test_every_regular_expression_for_names_is_matched_whole() -> None:
    """`match` accepts a name with something behind it, `$` one with a line break."""
    wrong = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("match", "search")
            ):
                pattern = ast.unparse(node.func.value)
                if pattern.isupper() or pattern.endswith("_PATTERN"):
                    wrong.append(f"{name}: {ast.unparse(node)}")
    assert not wrong


# -- decompression -----------------------------------------------------------------------------------------------------


def bomb(size: int) -> bytes:
    return zstandard.ZstdCompressor(level=19).compress(bytes(size))


@pytest.mark.fault("F59")
@pytest.mark.parametrize("codec", ["zstd", "zstd-patch"])
def test_a_frame_that_unpacks_to_more_than_signed_is_refused_before_it_is_unpacked(codec: str) -> None:
    out = bytearray(1 << 16)
    base = bytes(1000) if codec == "zstd-patch" else None
    with pytest.raises(PayloadError) as refusal:
        delta.apply(codec, bomb(8 << 20), base, memoryview(out))
    assert refusal.value.reason in (Reason.PAYLOAD_CORRUPT, Reason.DELTA_CORRUPT)
    assert not any(out)


@pytest.mark.parametrize("codec", ["zstd", "zstd-patch"])
def test_a_frame_that_asks_for_an_impossible_window_is_damaged_and_not_a_lack_of_memory(codec: str) -> None:
    # magic, a descriptor without a single segment, the largest exponent of a window
    frame = b"\x28\xb5\x2f\xfd\x80\xff" + bytes(16)
    base = bytes(1000) if codec == "zstd-patch" else None
    with pytest.raises(PayloadError):
        delta.apply(codec, frame, base, memoryview(bytearray(100)))


def test_two_frames_in_a_row_are_not_one_payload() -> None:
    frame = delta.encode("zstd", b"a" * 1000)
    with pytest.raises(PayloadError):
        delta.apply("zstd", frame + frame, None, memoryview(bytearray(1000)))


def test_golden_vectors_are_read_from_stored_members_alone(tmp_path) -> None:
    from agent.worker import golden

    path = tmp_path / "golden.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tensor_0_0.npy", bytes(32 << 20))
    with pytest.raises(AgentError) as refusal:
        golden.load_vectors(path.read_bytes())
    assert refusal.value.reason is AgentReason.GOLDEN_MISMATCH
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("tensor_0_0.npy", (tmp_path / "pickled.npy").read_bytes())
    with pytest.raises(AgentError):
        golden.load_vectors(path.read_bytes())


# -- errors ------------------------------------------------------------------------------------------------------------


def test_every_reason_says_what_to_do_next() -> None:
    """A reason without a word of advice: add one to the table of its errors module."""
    silent = [str(reason) for reason in Reason if not OtaError(reason, "message").hint]
    silent += [str(reason) for reason in AgentReason if not AgentError(reason, "message").hint]
    assert not silent
    assert OtaError(Reason.BAD_JSON, "message", hint="do this").hint == "do this"


HOSTILE_TEXT = "label \x1b[31m\r\n\u202e\u2028\ud800\x00 end"
SHOWN_TEXT = "label \\x1b[31m\\r\\n\\u202e\\u2028\\ud800\\x00 end"


@pytest.mark.fault("F66")
def test_what_an_error_quotes_can_neither_break_its_line_nor_fill_the_screen() -> None:
    for kind, reason in ((OtaError, Reason.BAD_JSON), (AgentError, AgentReason.BAD_CONFIG)):
        error = kind(reason, HOSTILE_TEXT, hint="a\r\nb")
        assert error.message == SHOWN_TEXT
        assert str(error) == error.message
        assert error.hint == "a\\r\\nb"
        assert len(kind(reason, "x" * 100_000).message) == len(one_line("x" * 100_000)) == 400


@pytest.mark.fault("F66")
@pytest.mark.parametrize("formatter", [JsonFormatter(), TerminalFormatter()], ids=["journal", "terminal"])
def test_a_name_from_outside_stays_on_its_line_of_the_log(formatter: logging.Formatter) -> None:
    record = logging.LogRecord("stick", logging.WARNING, "", 0, "label %s", (HOSTILE_TEXT,), None)
    line = formatter.format(record)
    assert line.isascii()
    assert line.isprintable()
    assert "end" in line


@pytest.mark.fault("F66")
@pytest.mark.parametrize("name", ["metadata/\x1b[31m.json", "metadata/a\nb.json", "metadata/\u202e.json"])
def test_a_name_in_an_archive_is_quoted_in_escapes(tmp_path: Path, name: str) -> None:
    path = tmp_path / "stick.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(name, b"{}")
    with pytest.raises(OtaError) as refusal:
        asyncio.run(ZipTransport(path, "cam-1").metadata("timestamp", None, 100))
    assert refusal.value.reason is Reason.BAD_ARCHIVE
    assert refusal.value.message.isprintable()
    assert refusal.value.hint


def test_every_module_of_the_product_is_looked_at() -> None:
    assert len(modules()) > 80
    assert (ROOT / "ota" / "strictjson.py") in modules().values()
