"""Mutating kept inputs and judging what a parser makes of the result. Knows no parser.

A parser is any call that takes bytes from outside. It may return or refuse; to refuse is to raise an error of the
project with a reason of the closed set, one printable line, and a hint where a person reads it. Everything else is a
finding: another exception, seconds of work, memory beyond the bound, a message that breaks a line, a changed state.
"""

from __future__ import annotations

import copy
import json
import random
import time
import traceback
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.errors import AgentError
from agent.errors import Reason as AgentReason
from ota.errors import OtaError
from ota.errors import Reason as OtaReason

CORPUS = Path(__file__).parent / "corpus"
MEMORY_BYTES = 64 << 20
CPU_S = 2.0
MESSAGE_CHARS = 600
MAX_INPUT_BYTES = 4 << 20


@dataclass(frozen=True)
class Parser:
    """One reader of bytes from outside.

    Attributes:
        name: names its folder in the corpus; files `valid-*` there must be accepted, all others only judged.
        read: takes the bytes; whatever it returns is thrown away.
        form: `json`, `toml` or `bytes`: how inputs are cut and joined.
        person: whether a person reads the refusal, so that it must say what to do next.
        state: anything that must be the same after a refusal.
        prepare: done before the first look at the state.
        examples: mutations of the default suite; fewer for a slow parser.
    """

    name: str
    read: Callable[[bytes], object]
    form: str = "json"
    person: bool = False
    state: Callable[[], object] = field(default=lambda: None)
    prepare: Callable[[], object] = field(default=lambda: None)
    examples: int = 100

    def corpus(self) -> list[Path]:
        """Kept inputs, in a stable order."""
        return sorted(path for path in (CORPUS / self.name).glob("*") if path.is_file())


@dataclass(frozen=True)
class Finding:
    """What is wrong; `kind` is the same for inputs that show the same fault."""

    kind: str
    detail: str


def judge(parser: Parser, data: bytes) -> Finding | None:
    """Give `data` to the parser; None when it behaved."""
    parser.prepare()
    before = parser.state()
    refusal: BaseException | None = None
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start(1)
    tracemalloc.reset_peak()
    held = tracemalloc.get_traced_memory()[0]
    start_s = time.process_time()
    try:
        parser.read(data)
    except (OtaError, AgentError) as e:
        refusal = e
    except Exception as e:  # noqa: BLE001 - any other exception is what is looked for
        return Finding(_where(e), "".join(traceback.format_exception(e)[-4:]))
    finally:
        spent_s = time.process_time() - start_s
        peak = tracemalloc.get_traced_memory()[1] - held
        if not tracing:
            tracemalloc.stop()
    if spent_s > CPU_S:
        return Finding("slow", f"{spent_s:.1f} s of processor time for {len(data)} bytes")
    if peak > MEMORY_BYTES:
        return Finding("memory", f"{peak >> 20} MiB for {len(data)} bytes")
    if refusal is None:
        return None
    if parser.state() != before:
        return Finding("state", f"refused with {refusal!r}, and yet the state changed")
    return _judge_refusal(parser, refusal)


def _judge_refusal(parser: Parser, refusal: OtaError | AgentError) -> Finding | None:
    place = _where(refusal)
    if not isinstance(refusal.reason, OtaReason | AgentReason):
        return Finding(place, f"reason {refusal.reason!r} is not of the closed set")
    if not refusal.message.isprintable():
        return Finding(place, f"a message of more than one printable line: {refusal.message!r}")
    if len(refusal.message) > MESSAGE_CHARS:
        return Finding(place, f"a message of {len(refusal.message)} characters: {refusal.message[:200]!r}")
    if not refusal.hint.isprintable():
        return Finding(place, f"a hint of more than one printable line: {refusal.hint!r}")
    if parser.person and not refusal.hint:
        return Finding(f"no hint: {place}", f"{refusal.reason.value} without a hint: {refusal.message}")
    return None


def _where(error: BaseException) -> str:
    """The exception and the last line of the project that it passed through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename]
    own = [frame for frame in frames if "/ota/" in frame.filename or "/agent/" in frame.filename]
    last = (own or frames)[-1] if frames else None
    place = f"{Path(last.filename).name}:{last.lineno}" if last is not None else "?"
    return f"{type(error).__name__} at {place}"


# -- mutation ----------------------------------------------------------------------------------------------------------

_TEXTS = (
    *("", "a", "../x", "/etc/passwd", "a\0b", "a\nb", "\x1b[31m", "\ud800", "é", "😀", "%s%n", "{0}", "release-x"),
    *("0" * 64, "f" * 64, "0" * 32, "1.0.0", "99999.0.0", "A", "a" * 49, "a" * 5000, "2026-06-01T00:00:00Z", "none"),
    *("-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n", "AAAA", "=", ">=0.1", "root", "zstd-patch"),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 65536, 1 << 31, 1 << 53, 1 << 63, -(1 << 63), 10**18, 10**30),
    *(0.5, -0.0, 1e308, float("nan"), float("inf"), [], {}, [[]], [None], {"": {}}, {"a": [1]}),
)
_TOKENS = (
    *(b"", b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\u0000"),
    *(b"\\ud800", b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"9" * 40, b"-", b"0x", b"\r\n", b"\n", b"="),
    *(b"[[a]]\n", b"'''", b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"\x80\0\0\0"),
    *(b"\xff" * 8, b"Transfer-Encoding"),
)
_TOML_VALUES = (
    *(b"0", b"-1", b"1e400", b"nan", b"inf", b"true", b'""', b"'a'", b"[]", b"[[]]", b"{}", b"{a = 1}"),
    *(b"1979-05-27", b'"../x"', b"99999999999999999999", b'"\\u0000"', b"[1, 'a']", b"[" * 200 + b"]" * 200),
    b'"' + b"a" * 5000 + b'"',
)


def mutate(rng: random.Random, seeds: Sequence[bytes], form: str) -> bytes:
    """One new input from kept ones; the same for the same choices of `rng`."""
    data = rng.choice(seeds) if seeds else b""
    if form == "json" and rng.random() < 0.7:
        data = _mutate_json(rng, data)
        if rng.random() < 0.8:
            return data[:MAX_INPUT_BYTES]
    if form == "toml" and rng.random() < 0.6:
        return _mutate_lines(rng, data)[:MAX_INPUT_BYTES]
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        data = _mutate_bytes(rng, data, seeds)[:MAX_INPUT_BYTES]
    return data


def _span(rng: random.Random, length: int) -> tuple[int, int]:
    start = rng.randrange(length + 1)
    longest = rng.choice((1, 2, 4, 16, 256, 65536))
    return start, min(length, start + rng.randint(1, longest))


def _mutate_bytes(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    start, end = _span(rng, len(data))
    match rng.randrange(9):
        case 0 if data:
            at = rng.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1 if data:
            at = rng.randrange(len(data))
            return data[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) + data[at + 1 :]
        case 2:
            return data[:start] + data[end:]
        case 3:
            return data[:end] + data[start:end] * rng.choice((1, 2, 50)) + data[end:]
        case 4:
            return data[:start] + rng.choice(_TOKENS) + data[start:]
        case 5:
            return data[:start] + rng.choice(_TOKENS) + data[end:]
        case 6:
            return data[:start]
        case 7:
            return data[:start] + bytes(end - start) + data[end:]
        case _:
            other = rng.choice(seeds) if seeds else b""
            return data[:start] + other[_span(rng, len(other))[0] :]


def _mutate_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        match rng.randrange(5):
            case 0:
                del lines[at]
                lines = lines or [b""]
            case 1:
                lines.insert(rng.randrange(len(lines) + 1), lines[at])
            case 2:
                lines[at] = lines[at].partition(b"=")[0] + b"= " + rng.choice(_TOML_VALUES)
            case 3:
                lines[at] = rng.choice((b"x", b"[a]", b"[[line]]", b"[[source]]", b"version")) + lines[at]
            case _:
                lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)] + rng.choice(_TOKENS)
    return b"\n".join(lines)


def _mutate_json(rng: random.Random, data: bytes) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _mutate_bytes(rng, data, (data,))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _edit(rng, value)
    try:
        return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except RecursionError:
        return data


def _edit(rng: random.Random, root: Any) -> Any:
    """`root` with one node changed; nodes are chosen by walking down at random."""
    holder = [root]
    parent: Any = holder
    key: Any = 0
    while True:
        node = parent[key]
        if not node or not isinstance(node, dict | list) or rng.random() < 0.15:
            break
        parent, key = node, rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    node = parent[key]
    match rng.randrange(7):
        case 0:
            parent[key] = copy.deepcopy(rng.choice(_VALUES))
        case 1:
            parent[key] = rng.choice(_TEXTS)
        case 2 if parent is not holder:
            del parent[key]
        case 3 if isinstance(parent, dict):
            parent[rng.choice((*_TEXTS, *parent))] = copy.deepcopy(node)
        case 4 if isinstance(node, list) and node:
            parent[key] = node * rng.choice((2, 17, 1025))
        case 5 if isinstance(node, str):
            parent[key] = _text(rng, node)
        case _:
            wrapped = node
            for _ in range(rng.choice((1, 1, 40))):
                wrapped = [wrapped] if rng.random() < 0.5 else {"a": wrapped}
            parent[key] = wrapped
    return holder[0]


def _text(rng: random.Random, text: str) -> str:
    start, end = _span(rng, len(text))
    return text[:start] + rng.choice((*_TEXTS, text[start:end] * 2)) + text[rng.choice((start, end)) :]
