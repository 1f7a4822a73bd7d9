"""What daemon and workers say to each other: one JSON object a message over SOCK_SEQPACKET, descriptors beside it.

Importable on Python 3.10 with the standard library alone. It is not a transport for bulk bytes: models, rings, images
and results of transforms travel as descriptors of memfds, frames through the ring with a 24-byte notice each.
Invariants: a message is at most `MAX_MESSAGE_BYTES`; both ends check every field's type, because a model that took over
a worker speaks this protocol too; descriptors a message does not expect are closed unread.
"""

from __future__ import annotations

import array
import dataclasses
import json
import math
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agent.errors import AgentError, Reason

MAX_MESSAGE_BYTES = 64 * 1024
MAX_FDS = 8

# Source to reader, one per frame: sequence, capture time (CLOCK_MONOTONIC ns), slot, flags. Behind it, for a line that
# follows another, what the other found in the frame; the flag FOLLOWED asks for that, behind the credit.
NOTICE = struct.Struct("<QqII")
# Reader to source: the slot whose lease it returns; FIRST_CREDIT asks for the first frame.
CREDIT = struct.Struct("<I")
FIRST_CREDIT = 0xFFFFFFFF
FOLLOWED = 1
MAX_FOUND_BYTES = 16 * 1024


class Message:
    """What all messages share, once: of every dataclass's own the daemon would carry forty copies."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.__dict__.items())})"


# --- daemon and host -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class HostReady(Message):
    """The host of the workers is up. `unit` is the systemd unit it runs in, or empty."""

    pid: int
    version: str
    python: str


@dataclass(frozen=True, eq=False, repr=False)
class Spawn(Message):
    """Start a worker of `role` (source, model, fused, trial, transform); its end of the socket is the one descriptor.

    `memory_bytes` bounds its heap (RLIMIT_DATA); 0 leaves it unbounded. `forked` asks for one that the zygote forks;
    where it cannot, the worker is executed.
    """

    worker: int
    role: str
    nice: int
    memory_bytes: int
    forked: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Zygote(Message):
    """From now on keep a zygote that has loaded the runtimes of these delegates, or none where there are none."""

    delegates: list[Any]


@dataclass(frozen=True, eq=False, repr=False)
class Started(Message):
    """The worker's process exists."""

    worker: int
    pid: int


@dataclass(frozen=True, eq=False, repr=False)
class Kill(Message):
    """Send `signal` to a worker."""

    worker: int
    signal: int


@dataclass(frozen=True, eq=False, repr=False)
class Exited(Message):
    """A worker ended. `status` is its exit code, or minus the signal that ended it."""

    worker: int
    status: int
    stderr_tail: str
    peak_rss_bytes: int
    cpu_s: float


# --- every worker ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Fault(Message):
    """A worker refuses what it was asked. It stays alive unless it says otherwise by exiting."""

    reason: str
    message: str
    hint: str


@dataclass(frozen=True, eq=False, repr=False)
class StopWorker(Message):
    """Finish the frame in hand, release everything, exit with 0."""


# --- source ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class OpenSource(Message):
    """Open a source and make its ring. `kind` is of the table of sources; `options` are
    the parsed keys of its table in agent.toml."""

    name: str
    kind: str
    options: dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class SourceOpened(Message):
    """The source can deliver. The ring is the one descriptor; each of its frames is an array of `dtype` and `shape`:
    uint8 [height, width, 3] BGR of a camera, float32 [samples, channels] of a sensor's window."""

    dtype: str
    shape: list[int]
    fps: float
    slots: int
    slot_bytes: int

    @property
    def size(self) -> str:
        """For people: `640x480` of pictures, `256x3 float32` of windows."""
        if self.dtype == "uint8" and len(self.shape) == 3:
            return f"{self.shape[1]}x{self.shape[0]}"
        return f"{'x'.join(map(str, self.shape))} {self.dtype}"


@dataclass(frozen=True, eq=False, repr=False)
class Feed(Message):
    """Samples for a source that the daemon itself hears: rows of numbers, the last one measured at `t_ns`."""

    t_ns: int
    rows: list[Any]


@dataclass(frozen=True, eq=False, repr=False)
class SetPace(Message):
    """Deliver only every `divisor`-th frame of a live source, and a file so many times slower; 1 is the source's own
    pace, 0 stops it. Where the readers decide (`every`) and a file has no pace of its own, only 0 changes anything."""

    divisor: int


@dataclass(frozen=True, eq=False, repr=False)
class AttachReader(Message):
    """A reader of the line `line`; its notice socket is the one descriptor. `active` readers get frames at once, or,
    of a line that follows the line `after`, those in which that found something."""

    reader: int
    line: str
    active: bool
    after: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class SwitchReader(Message):
    """From the next frame on the line's frames go to `reader`; the old reader finishes what it holds and gets EOF."""

    line: str
    reader: int


@dataclass(frozen=True, eq=False, repr=False)
class Switched(Message):
    """The switch happened: `first_seq` is the first frame that goes to `reader`."""

    line: str
    reader: int
    first_seq: int


@dataclass(frozen=True, eq=False, repr=False)
class DetachReader(Message):
    """Forget a reader; frames it holds count as dropped with `reason`."""

    reader: int
    reason: str


@dataclass(frozen=True, eq=False, repr=False)
class Dropped(Message):
    """Frames of a line that nobody will answer, and why: `backlog`, `worker_lost`, `no_reader`, `stopped`."""

    line: str
    seqs: list[int]
    reason: str


@dataclass(frozen=True, eq=False, repr=False)
class SourceState(Message):
    """`opening`, `streaming`, `stale`, `reconnecting` or `ended`, at every change and at least every few seconds.

    `reason` is one of `agent.errors.Reason`, or empty. `last_ns` is the time of the last frame (CLOCK_MONOTONIC), 0
    before the first; `reconnects` counts how often the source was found again.
    """

    state: str
    reason: str
    detail: str
    frames: int
    reconnects: int
    last_ns: int


# --- model and trial -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class LoadModel(Message):
    """Load the model in the first descriptor (a sealed memfd) on `delegate`, and on nothing else. A second one holds
    what `ExportCompiled` gave before; a worker that cannot use it compiles anew.

    `graph` carries task, labels, preprocess and postprocess as in release.json; `inputs` and `outputs` its tensor
    specs, in the order preprocess and postprocess expect; empty lists take them from the model itself.
    """

    line: str
    version: str
    component: str
    format: str
    delegate: str
    threads: int
    options: dict[str, Any]
    graph: dict[str, Any]
    inputs: list[Any]
    outputs: list[Any]


@dataclass(frozen=True, eq=False, repr=False)
class ModelLoaded(Message):
    """The session is ready. `actual` is the delegate that really runs, `coverage` its share of the nodes, 0 to 1.
    `driver` names the versions below the runtime that a compiled model depends on; `compiled` is `imported`, `fresh`
    where `ExportCompiled` has something to give, or empty."""

    actual: str
    coverage: float
    load_ms: float
    rss_bytes: int
    runtime: str
    driver: str
    compiled: str
    inputs: list[Any]
    outputs: list[Any]


@dataclass(frozen=True, eq=False, repr=False)
class ExportCompiled(Message):
    """Give the loaded model in the form the runtime made of it, so that it need not be compiled again."""


@dataclass(frozen=True, eq=False, repr=False)
class Exported(Message):
    """The compiled model, `out_bytes` long, in the one descriptor: a sealed memfd."""

    out_bytes: int


@dataclass(frozen=True, eq=False, repr=False)
class RunGolden(Message):
    """Run the golden vectors in the one descriptor; `tolerance` is graph.golden of release.json."""

    component: str
    tolerance: dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class GoldenPassed(Message):
    """Every golden vector was reproduced. `worst` is the largest error as a share of its tolerance, 0 to 1."""

    vectors: int
    worst: float


@dataclass(frozen=True, eq=False, repr=False)
class Measure(Message):
    """Run the session `warmups` + `runs` times on a golden or blank frame."""

    warmups: int
    runs: int


@dataclass(frozen=True, eq=False, repr=False)
class Measured(Message):
    """Nanoseconds of each counted run: preprocess, inference and postprocess together; `cpu_ns` is what all threads of
    the process computed meanwhile, `waited_ns` how long its threads could run and had no core (0 where the kernel
    does not say). `rss_bytes` is resident after the last run, `least_rss_bytes` the least after any."""

    runs_ns: list[int]
    cpu_ns: list[int]
    waited_ns: list[int]
    rss_bytes: int
    least_rss_bytes: int


@dataclass(frozen=True, eq=False, repr=False)
class RunImage(Message):
    """Run one encoded image (PNG, JPEG …), the one descriptor; answered by a `Result` with seq 0."""


@dataclass(frozen=True, eq=False, repr=False)
class AttachRing(Message):
    """Serve frames of `dtype` and `shape`: descriptors are the ring and the reader's notice socket."""

    dtype: str
    shape: list[int]
    slots: int
    slot_bytes: int


@dataclass(frozen=True, eq=False, repr=False)
class SetRules(Message):
    """Before `AttachRing`: the rules over the line's results, and the share of a picture that must change before the
    model looks at it, 0 for none, at the latest every `refresh_s`."""

    rules: list[Any]
    motion: float
    refresh_s: float


@dataclass(frozen=True, eq=False, repr=False)
class SetCrops(Message):
    """Before `AttachRing`: answer the boxes that come with frames, not the frames; see `agent.worker.follow.Crops`."""

    crops: dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class RuleBegan(Message):
    """An event of `rule` begins with `item` of frame `seq`; a snapshot of it may be the one descriptor, a JPEG."""

    rule: str
    seq: int
    t_frame_ns: int
    item: dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class RuleEnded(Message):
    """The event is over with frame `seq`; the rule had been met for `duration_s`."""

    rule: str
    seq: int
    t_frame_ns: int
    duration_s: float


@dataclass(frozen=True, eq=False, repr=False)
class Unchanged(Message):
    """The frame shows nothing new: the model did not look at it, and its last answer stands."""

    seq: int
    t_frame_ns: int


@dataclass(frozen=True, eq=False, repr=False)
class RingAttached(Message):
    """The reader has mapped the ring, run once on a blank frame and asked for its first frame."""

    warm_ms: float


@dataclass(frozen=True, eq=False, repr=False)
class Result(Message):
    """What the model says of one frame.

    `t_frame_ns` and `t_done_ns` are CLOCK_MONOTONIC. `stages_us` is [wait, preprocess, inference, postprocess].
    `items`: what `agent.worker.results` writes down, one kind of object for each task; docs/reference/results.md
    describes them. Their coordinates are in source pixels.
    """

    seq: int
    t_frame_ns: int
    t_done_ns: int
    stages_us: list[int]
    items: list[Any]


@dataclass(frozen=True, eq=False, repr=False)
class Finished(Message):
    """The notice socket ended; every frame this reader was given has been answered."""

    answered: int
    last_seq: int


# --- transform -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Transform(Message):
    """Decode the payload in the first descriptor, a delta with its base in the second, to exactly `out_bytes` bytes."""

    codec: str
    out_bytes: int


@dataclass(frozen=True, eq=False, repr=False)
class Transformed(Message):
    """The result, `out_bytes` long, in the one descriptor: a sealed memfd."""

    out_bytes: int
    cpu_ms: float


MESSAGES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        HostReady, Spawn, Zygote, Started, Kill, Exited, Fault, StopWorker, OpenSource, SourceOpened, Feed, SetPace,
        AttachReader, SwitchReader, Switched, DetachReader, Dropped, SourceState, LoadModel, ModelLoaded,
        ExportCompiled, Exported, RunGolden, GoldenPassed, Measure, Measured, RunImage, AttachRing, RingAttached,
        SetRules, SetCrops, RuleBegan, RuleEnded, Unchanged, Result, Finished, Transform, Transformed,
    )
}  # fmt: skip
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "dict[str, Any]": (dict,),
    "list[Any]": (list,),
    "list[int]": (),
}
# Messages that bring descriptors; those of every other message are closed unread.
_BRING_DESCRIPTORS = (
    Spawn, SourceOpened, AttachReader, LoadModel, Exported, RunGolden, RunImage, AttachRing, RuleBegan,
    Transform, Transformed,
)  # fmt: skip
_INT64 = 1 << 63


def _make_writer() -> Callable[[Any], str]:
    """`JSONEncoder.encode`, without what it makes anew on every call: half of its time for a message with a result."""
    encoder = json.JSONEncoder(separators=(",", ":"))
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return encoder.encode
    write = make(None, encoder.default, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, True)
    return lambda value: "".join(write(value, 0))


_write = _make_writer()
_FIELDS: dict[str, dict[str, str]] = {
    name: {f.name: str(f.type) for f in dataclasses.fields(cls)} for name, cls in MESSAGES.items()
}


@dataclass
class Packet:
    """A received message and the descriptors that came with it; whoever takes one with `take` owns it."""

    message: Any
    fds: list[int] = field(default_factory=list)

    def take(self, count: int) -> list[int]:
        """Hand over exactly `count` descriptors.

        Raises:
            AgentError: `bad_message` when another number came; all are closed then.
        """
        if len(self.fds) != count:
            got = len(self.fds)
            self.close()
            raise AgentError(Reason.BAD_MESSAGE, f"{type(self.message).__name__} came with {got} descriptors")
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        """Close every descriptor not taken."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []


def encode(message: Any) -> bytes:
    """One message as bytes.

    Raises:
        AgentError: `bad_message` when it is larger than `MAX_MESSAGE_BYTES`.
    """
    body: dict[str, Any] = {"t": type(message).__name__}
    body.update(message.__dict__)
    data = _write(body).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise AgentError(Reason.BAD_MESSAGE, f"{body['t']} of {len(data)} bytes does not fit into one message")
    return data


def decode(data: bytes) -> Any:
    """The message in `data`.

    Raises:
        AgentError: `bad_message` for anything but a known message with exactly its fields and types, its integers
            within 64 bits, its floats finite, all text within UTF-8. What a dict or a list[Any] holds is for its reader
            to check.
    """
    try:
        body = json.loads(data)
        name = body.pop("t")
        wanted = _FIELDS[name]
        if b"\\ud" in data.lower():  # half a surrogate pair would only fail where it is sent on
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as e:
        raise AgentError(Reason.BAD_MESSAGE, f"not a message: {data[:60]!r}") from e
    if body.keys() != wanted.keys():
        raise AgentError(Reason.BAD_MESSAGE, f"{name} has fields {sorted(body)[:20]}")
    for key, value in body.items():
        kind = wanted[key]
        if kind == "list[int]" and isinstance(value, list) and all(_is_int64(item) for item in value):
            continue
        if not isinstance(value, _TYPES[kind]) or (kind in ("int", "float") and not _is_number(value)):
            raise AgentError(Reason.BAD_MESSAGE, f"{name}.{key} is not {kind}")
    return MESSAGES[name](**body)


def _is_int64(value: object) -> bool:
    return type(value) is int and -_INT64 <= value < _INT64


def _is_number(value: object) -> bool:
    return _is_int64(value) or (type(value) is float and math.isfinite(value))


def send(sock: socket.socket, message: Any, fds: tuple[int, ...] = ()) -> None:
    """Send one message; the descriptors stay the caller's.

    Raises:
        OSError: as `sendmsg`; `BlockingIOError` on a full non-blocking socket.
    """
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([encode(message)], ancillary)


def receive(sock: socket.socket) -> Packet | None:
    """Receive one message; None when the other end closed.

    Raises:
        AgentError: `bad_message`; descriptors that came with it are closed.
        OSError: as `recvmsg`; `BlockingIOError` on an empty non-blocking socket.
    """
    fds = array.array("i")
    space = socket.CMSG_SPACE(MAX_FDS * fds.itemsize)
    data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    packet = Packet(None, list(fds))
    if not data and not packet.fds:
        return None
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        packet.close()
        raise AgentError(Reason.BAD_MESSAGE, f"a message larger than {MAX_MESSAGE_BYTES} bytes was cut")
    try:
        packet.message = decode(data)
    except AgentError:
        packet.close()
        raise
    if not isinstance(packet.message, _BRING_DESCRIPTORS):
        packet.close()
    return packet


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair of SEQPACKET sockets, large enough for one full message in flight."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_MESSAGE_BYTES)
    return ours, theirs
