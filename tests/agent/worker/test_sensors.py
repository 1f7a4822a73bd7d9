"""Sensors as sources: a pty that is unplugged, a made-up sysfs, recordings, samples that the daemon hears."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import tty
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workerdriver import Camera, Daemon

from agent import protocol
from agent.configtable import Table
from agent.errors import AgentError, ConfigError, Reason, SourceError
from agent.sourceconfig import parse_options
from agent.worker import ring
from agent.worker.sources import SOURCES
from agent.worker.sources.iio import Iio
from agent.worker.sources.serial import MAX_LINE_BYTES, Serial, parse_line
from agent.worker.sources.topic import MAX_WAITING, Topic

WAIT_S = 60.0


def options(kind: str, **given: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"window": 4, "rate_hz": 100.0}
    if kind == "wav":
        del base["rate_hz"]
    return parse_options(kind, Table({**base, **given}, f"{kind} source", Path("/")))


class Waiting:
    """A call of `wait_into` in a thread of its own, as the source process makes it."""

    def __init__(self, source: Any) -> None:
        self.slot = np.empty(source.shape, np.float32)
        self.t_ns: int | None = -1
        self.error: SourceError | None = None
        self._source = source
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            self.t_ns = self._source.wait_into(self.slot)
        except SourceError as e:
            self.error = e

    def done(self) -> Waiting:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "it still waits"
        return self

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()


# --- serial ----------------------------------------------------------------------------------------------------------


class Line:
    """A pty; `path` leads to the end that a sensor's user opens, through a link that can be pointed elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "sensor"
        self.master = -1
        self.plug()

    def plug(self) -> None:
        """A new device under the same name."""
        self.master, slave = os.openpty()
        tty.setraw(slave)
        new = self.path.with_suffix(".new")
        new.symlink_to(os.ttyname(slave))
        os.replace(new, self.path)
        self._slave = slave

    def say(self, text: str | bytes) -> None:
        os.write(self.master, text if isinstance(text, bytes) else text.encode())

    def unplug(self) -> None:
        """The device is gone; its name leads nowhere."""
        if self.master >= 0:
            self.path.unlink()
            os.close(self._slave)
            os.close(self.master)
            self.master = -1


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path)
    yield made
    made.unplug()


@pytest.fixture
def opened() -> Iterator[Callable[..., Serial]]:
    made: list[Serial] = []

    def open_line(line: Line, **given: Any) -> Serial:
        made.append(Serial(options("serial", path=str(line.path), gap_s=3600, **given)))
        line.say("half a li\n")
        return made[-1]

    yield open_line
    for source in made:
        source.close()


def test_lines_become_windows_whatever_stands_between_the_numbers_and_however_they_end(line: Line, opened) -> None:
    source = opened(line, channels=2)
    assert (source.shape, source.dtype, source.pace.fps) == ((4, 2), "float32", 25.0)
    before = time.monotonic_ns()
    waiting = Waiting(source)
    line.say("1,2\r\n3 4\n\n5;\t6\n[7.5, -8e0]\n9,10\n")
    assert waiting.done().slot.tolist() == [[1, 2], [3, 4], [5, 6], [7.5, -8]]
    assert before <= waiting.t_ns <= time.monotonic_ns()
    line.say("11,12\n13,14\n15,16\n")
    assert Waiting(source).done().slot.tolist() == [[9, 10], [11, 12], [13, 14], [15, 16]]
    assert source.detail == ""


def test_members_of_an_object_are_channels_in_the_order_of_keys(line: Line, opened) -> None:
    source = opened(line, channels=2, keys=["y", "x"], window=2)
    waiting = Waiting(source)
    line.say('{"x": 1, "y": 2, "t": 9}\n{"y": 4, "x": 3}\n')
    assert waiting.done().slot.tolist() == [[2, 1], [4, 3]]


def test_a_line_that_comes_in_pieces_is_one_line(line: Line, opened) -> None:
    waiting = Waiting(opened(line, window=2))
    for piece in ("1", "2.", "5\n3", "4\n"):
        line.say(piece)
        time.sleep(0.02)
    assert waiting.done().slot.tolist() == [[12.5], [34]]


def test_garbage_is_counted_skipped_and_begins_the_window_anew(line: Line, opened) -> None:
    source = opened(line, window=3)
    waiting = Waiting(source)
    line.say(b"1\n2\nboot v1.2 \xff\n3\n1,2\nnan\n1e999\n1_0\n{}\n4\n5\n6\n")
    assert waiting.done().slot.ravel().tolist() == [4, 5, 6]
    assert source.bad_lines == 6
    assert source.detail == "gaps: 6, unreadable lines: 6"


def test_a_line_without_end_costs_one_line_and_no_memory(line: Line, opened) -> None:
    source = opened(line, window=2)
    waiting = Waiting(source)
    line.say("1\n")
    for _ in range(6 * MAX_LINE_BYTES // 1024):
        line.say("7" * 1024)
    line.say("\n2\n3\n")
    assert waiting.done().slot.ravel().tolist() == [2, 3]
    assert source.bad_lines == 1


def test_a_silence_longer_than_its_gap_is_never_inside_a_window(line: Line) -> None:
    source = Serial(options("serial", path=str(line.path), window=3, gap_s=0.05, rate_hz=100.0))
    try:
        waiting = Waiting(source)
        line.say("x\n1\n2\n")
        time.sleep(0.5)
        line.say("3\n4\n5\n")
        assert waiting.done().slot.ravel().tolist() == [3, 4, 5]
        assert source.detail == "gaps: 1"
    finally:
        source.close()


def test_an_unplugged_line_is_an_error_and_comes_back_under_its_name(line: Line, opened) -> None:
    source = opened(line, window=2)
    waiting = Waiting(source)
    line.say("1\n")
    time.sleep(0.05)
    line.unplug()
    assert waiting.done().error is not None
    assert waiting.error.reason is Reason.SOURCE_UNREADABLE
    with pytest.raises(SourceError) as missing:
        source.reopen()
    assert missing.value.reason is Reason.SOURCE_MISSING
    line.plug()
    source.reopen()
    line.say("in flight\n2\n3\n")
    assert Waiting(source).done().slot.ravel().tolist() == [2, 3], "what came before the loss is in no window"


def test_a_wait_can_be_ended_from_another_thread(line: Line, opened) -> None:
    source = opened(line)
    waiting = Waiting(source)
    time.sleep(0.05)
    assert waiting.waits
    source.interrupt()
    assert waiting.done().t_ns is None


def test_what_is_no_serial_line_is_refused_by_name(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("1\n")
    with pytest.raises(SourceError, match="no serial line") as refused:
        Serial(options("serial", path=str(plain)))
    assert refused.value.reason is Reason.SOURCE_UNREADABLE
    with pytest.raises(SourceError, match="does not exist") as refused:
        Serial(options("serial", path=str(tmp_path / "none")))
    assert refused.value.reason is Reason.SOURCE_MISSING


@given(st.binary(max_size=60), st.integers(1, 3))
def test_any_bytes_are_a_sample_of_finite_numbers_or_none(data: bytes, channels: int) -> None:
    found = parse_line(data, channels, ["a", "b", "c"][:channels])
    assert found is None or found == [] or (len(found) == channels and np.isfinite(np.float32(found)).all())


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=3), st.sampled_from([", ", " ", ";", "\t"]))
def test_every_number_that_python_writes_is_read_back(values: list[float], between: str) -> None:
    text = between.join(map(repr, values))
    assert parse_line(text.encode(), len(values), []) == values
    assert parse_line(json.dumps(values).encode(), len(values), []) == values


# --- IIO -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """Two devices: an accelerometer with a shared scale, a thermometer with its own offset."""
    files = {
        "iio:device0/name": "adxl345", "iio:device0/in_accel_x_raw": "100", "iio:device0/in_accel_y_raw": "-50",
        "iio:device0/in_accel_scale": "0.0383", "iio:device0/in_accel_x_offset": "2",
        "iio:device1/name": "bmp280", "iio:device1/in_temp_input": "23150",
        "iio:device1/in_pressure_raw": "8", "iio:device1/in_pressure_scale": "0.5",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    return tmp_path


def test_a_channel_is_raw_plus_offset_times_scale_its_own_before_its_kinds(sysfs: Path) -> None:
    source = Iio(options("iio", device="adxl345", inputs=["accel_y", "accel_x"], window=1), root=sysfs)
    try:
        slot = np.empty((1, 2), np.float32)
        assert source.wait_into(slot) is not None
        assert slot == pytest.approx(np.array([[-50 * 0.0383, 102 * 0.0383]]), rel=1e-6)
        (sysfs / "iio:device0/in_accel_y_raw").write_text("10\n")
        source.wait_into(slot)
        assert slot[0, 0] == pytest.approx(0.383), "every sample is read anew"
    finally:
        source.close()


def test_what_a_driver_has_converted_itself_is_taken_as_it_is(sysfs: Path) -> None:
    source = Iio(options("iio", device="iio:device1", inputs=["temp", "pressure"], window=2), root=sysfs)
    slot = np.empty((2, 2), np.float32)
    source.wait_into(slot)
    source.close()
    assert slot.tolist() == [[23150, 4], [23150, 4]]


def test_samples_come_at_the_rate_and_carry_the_time_at_which_they_were_due(sysfs: Path) -> None:
    source = Iio(options("iio", device="adxl345", inputs=["accel_x"], window=10, rate_hz=200.0), root=sysfs)
    slot = np.empty((10, 1), np.float32)
    try:
        times = [source.wait_into(slot) for _ in range(3)]
    finally:
        source.close()
    if not source.detail:  # another load may have kept this process from its clock
        assert np.diff(times).tolist() == [50_000_000, 50_000_000]


def test_a_reading_that_comes_a_period_late_is_a_gap_that_no_window_spans(sysfs: Path) -> None:
    now = [0]

    def clock() -> int:
        now[0] += 1_000_000
        # the machine was away for 80 ms, in the middle of the second window
        return now[0] + (80_000_000 if now[0] > 115_000_000 else 0)

    source = Iio(options("iio", device="adxl345", inputs=["accel_x"], window=10), root=sysfs, clock=clock)
    source._alarm.wait = lambda timeout_s, *fds: True  # the clock goes by itself
    slot = np.empty((10, 1), np.float32)
    try:
        first, second = source.wait_into(slot), source.wait_into(slot)
    finally:
        source.close()
    assert first == 91_000_000
    assert source.detail == "gaps: 1"
    assert second - first > 80_000_000 + 90_000_000


@pytest.mark.parametrize(
    ("device", "inputs", "why"),
    [
        ("mpu6050", ["accel_x"], "there is no IIO device mpu6050"),
        ("iio:device7", ["accel_x"], "iio:device7"),
        ("adxl345", ["accel_z"], "no channel accel_z"),
    ],
)
def test_a_device_or_channel_that_is_not_there_is_named_beside_those_that_are(
    sysfs: Path, device: str, inputs: list[str], why: str
) -> None:
    with pytest.raises(SourceError, match=why) as missing:
        Iio(options("iio", device=device, inputs=inputs), root=sysfs)
    assert missing.value.reason is Reason.SOURCE_MISSING
    assert "adxl345" in missing.value.hint or "accel_x" in missing.value.hint


def test_a_sensor_that_answers_nonsense_is_lost_and_can_be_opened_again(sysfs: Path) -> None:
    source = Iio(options("iio", device="adxl345", inputs=["accel_x"], window=2), root=sysfs)
    slot = np.empty((2, 1), np.float32)
    raw = sysfs / "iio:device0/in_accel_x_raw"
    for nonsense in ("nan\n", "1e300\n"):
        raw.write_text(nonsense)
        with pytest.raises(SourceError) as lost:
            source.wait_into(slot)
        assert lost.value.reason is Reason.SOURCE_UNREADABLE
    raw.write_text("5\n")
    source.reopen()
    source.wait_into(slot)
    source.close()
    assert slot.ravel() == pytest.approx(np.full(2, 7 * 0.0383))


# --- recordings ------------------------------------------------------------------------------------------------------


def played(kind: str, count: int = 99, **given: Any) -> list[list[list[float]]]:
    source = SOURCES[kind](options(kind, policy="every", **given))
    found = []
    slot = np.empty(source.shape, np.float32)
    while len(found) < count and source.read_into(slot):
        found.append(slot.tolist())
    source.close()
    return found


@pytest.mark.parametrize("between", [",", ";", "\t", " "])
def test_a_csv_is_cut_into_windows_of_the_columns_that_were_chosen(tmp_path: Path, between: str) -> None:
    path = tmp_path / "r.csv"
    rows = [["t", "x", "y"], *([str(i), str(i / 2), str(-i)] for i in range(5))]
    path.write_text("\r\n".join(between.join(row) for row in rows) + "\r\n\r\n")
    assert played("csv", path=str(path), columns=["y", "x"], window=2, hop=1) == [
        [[-i, i / 2], [-i - 1, (i + 1) / 2]] for i in range(4)
    ]
    assert played("csv", path=str(path), columns=["2"], window=5)[0] == [[i / 2] for i in range(5)]
    assert len(played("csv", path=str(path), window=5)[0][0]) == 3


def test_a_csv_without_a_header_is_all_numbers_and_a_loop_never_joins_its_end_to_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("".join(f"{i}\n" for i in range(5)))
    assert played("csv", 4, path=str(path), window=2, loop=True) == [[[0], [1]], [[2], [3]], [[0], [1]], [[2], [3]]]
    assert played("csv", path=str(path), window=6, loop=True) == [], "shorter than one window"


@pytest.mark.parametrize(
    ("text", "given", "why"),
    [
        ("1\nx\n2\n3\n", {}, "line 2 is no row"),
        ("1\nnan\n", {}, "line 2 holds a number"),
        ("1\n1e300\n", {}, "line 2 holds a number"),
        ("1," * 64 + "1\n", {}, "65 channels"),
        ("1,2\n3\n", {}, "line 2 has 1 columns"),
        ("a,b\n1,2\n", {"columns": ["c"]}, "no column 'c', but a, b"),
        ("", {}, "holds no row"),
        ("1," * 70_000, {}, "longer than"),
    ],
)
def test_a_row_that_is_no_sample_ends_the_replay_and_is_named(
    tmp_path: Path, text: str, given: dict[str, Any], why: str
) -> None:
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(SourceError, match=why) as bad:
        played("csv", path=str(path), **given)
    assert bad.value.reason is Reason.SOURCE_UNREADABLE


@pytest.mark.parametrize(("width", "full"), [(1, 128), (2, 1 << 15), (3, 1 << 23), (4, 1 << 31)])
def test_a_wav_of_any_width_is_numbers_from_minus_one_to_one(tmp_path: Path, width: int, full: int) -> None:
    path = tmp_path / "r.wav"
    steps = [-full, -full // 2, 0, full // 4, full - 1, 7, 8, 9]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(8000)
        offset = 128 if width == 1 else 0
        file.writeframes(b"".join((s + offset).to_bytes(width, "little", signed=width > 1) for s in steps))
    (found,) = played("wav", path=str(path))
    assert np.array(found).ravel() == pytest.approx(np.array(steps) / full, abs=1e-6)
    assert SOURCES["wav"](options("wav", path=str(path), hop=2)).pace.fps == 4000.0


def test_a_wav_that_needs_more_memory_than_a_window_may_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(64)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(128))
    with pytest.raises(SourceError, match="64 channels"):
        played("wav", path=str(path), window=1 << 18)


@settings(max_examples=200, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 47), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_wav_is_finite_numbers_or_is_refused(tmp_path_factory: Any, changes: list[tuple[int, int]]) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(range(256)))
    data = bytearray(path.read_bytes())
    for place, value in changes:
        data[place] = value
    path.write_bytes(data)
    with contextlib.suppress(SourceError):
        assert np.isfinite(played("wav", 9, path=str(path))).all()


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.wav"
    path.write_bytes(b"RIFF\x00\x00\x00\x00WAVEjunk")
    with pytest.raises(SourceError, match="no WAV file"):
        played("wav", path=str(path))
    with pytest.raises(SourceError, match="is not a file"):
        played("csv", path=str(tmp_path))
    with pytest.raises(SourceError, match="does not exist"):
        played("csv", path=str(tmp_path / "none"))


# --- topic -----------------------------------------------------------------------------------------------------------


def test_samples_that_somebody_else_hears_become_windows() -> None:
    source = Topic(options("topic", topic="pump", channels=2))
    waiting = Waiting(source)
    source.feed(1_000_000_000, [[1, 2], [3, 4], [5, 6]])
    source.feed(1_030_000_000, [[7, 8], [9, 10], [11, 12]])
    assert waiting.done().slot.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert waiting.t_ns == 1_010_000_000, "two of three samples came after the window's last"
    source.feed(1_050_000_000, [[13, 14], [15, 16]])
    assert Waiting(source).done().slot.tolist() == [[9, 10], [11, 12], [13, 14], [15, 16]]
    assert source.detail == ""


def test_a_silence_between_two_messages_begins_the_window_anew() -> None:
    source = Topic(options("topic", topic="pump", gap_s=1.0))
    source.feed(1_000_000_000, [[0], [0], [0]])
    source.feed(2_900_000_000, [[1], [1]])
    source.feed(3_000_000_000, [[2], [2]])
    assert Waiting(source).done().slot.ravel().tolist() == [1, 1, 2, 2]
    assert source.detail == "gaps: 1"


def test_more_samples_than_may_wait_push_the_oldest_out_and_are_counted() -> None:
    source = Topic(options("topic", topic="pump", window=1000))
    block = [[0.0]] * 1000
    for index in range(MAX_WAITING // 1000 + 5):
        source.feed(1_000_000_000 + index * 10_000_000_000, [[float(index)], *block[1:]])
    waiting = Waiting(source).done()
    assert waiting.slot[0, 0] == 5
    assert source.detail == "gaps: 1, samples dropped: 5000"


def test_a_flood_in_the_middle_of_a_block_is_a_gap_behind_that_block() -> None:
    source = Topic(options("topic", topic="pump", gap_s=1000.0))
    extend = source._windows.extend

    def flooded(rows: Any, t_ns: int) -> int:
        source._windows.extend = extend
        taken = extend(rows, t_ns)
        flood = threading.Thread(target=lambda: [source.feed(9, [[1]] * MAX_WAITING), source.feed(10, [[2]] * 9)])
        flood.start()
        flood.join(0.2)  # it comes in between, or has to wait until the block is done with
        return taken

    source._windows.extend = flooded
    source.feed(8, [[0]] * 6)
    assert Waiting(source).done().slot.ravel().tolist() == [0] * 4
    while source.dropped < MAX_WAITING:
        time.sleep(0.001)
    assert Waiting(source).done().slot.ravel().tolist() == [2] * 4, "no window spans what was dropped"


def test_no_rows_mean_that_samples_are_missing_between_those_before_and_those_after() -> None:
    source = Topic(options("topic", topic="pump", window=3))
    source.feed(1_000_000_000, [[1], [2], [3], [4], [5]])
    source.feed(1_010_000_000, [])
    source.feed(1_020_000_000, [[6], [7], [8]])
    assert Waiting(source).done().slot.ravel().tolist() == [1, 2, 3]
    assert Waiting(source).done().slot.ravel().tolist() == [6, 7, 8]
    assert source.detail == "gaps: 1"


@pytest.mark.parametrize("rows", [[[1]], [1, 2], [[1, "x"]], [[1, None]], [[1, 2], [3]], [[float("inf"), 1]]])
def test_rows_that_are_no_samples_are_refused(rows: list[Any]) -> None:
    source = Topic(options("topic", topic="pump", channels=2))
    with pytest.raises(AgentError) as refused:
        source.feed(1, rows)
    assert refused.value.reason is Reason.BAD_MESSAGE


def test_waiting_for_samples_can_be_ended() -> None:
    source = Topic(options("topic", topic="pump"))
    waiting = Waiting(source)
    source.interrupt()
    assert waiting.done().t_ns is None


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given", "why"),
    [
        ("serial", {"path": "/dev/ttyUSB0", "baud": 12345}, "baud = 12345"),
        ("serial", {"path": "/dev/ttyUSB0", "keys": ["a"], "channels": 2}, "keys names 1"),
        ("serial", {"path": "/dev/ttyUSB0", "window": 1 << 18, "channels": 64}, "too large"),
        ("serial", {"path": "/dev/ttyUSB0", "hop": -1}, "hop"),
        ("iio", {"device": "../x", "inputs": ["accel_x"]}, "device"),
        ("iio", {"device": "a", "inputs": []}, "inputs"),
        ("iio", {"device": "a", "inputs": ["../../x"]}, "inputs"),
        ("iio", {"device": "a", "inputs": ["x"], "rate_hz": 5000}, "rate_hz"),
        ("topic", {"topic": "a/b"}, "topic"),
        ("topic", {"topic": "#"}, "topic"),
        ("csv", {"path": "a", "policy": "all"}, "policy"),
        ("wav", {"path": "a", "rate_hz": 8}, "unknown key 'rate_hz'"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(kind: str, given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as refused:
        options(kind, **given)
    assert refused.value.reason is Reason.BAD_CONFIG


# --- in the source process -------------------------------------------------------------------------------------------


def test_an_unplugged_sensor_is_reconnecting_and_streams_again_under_its_name(daemon: Daemon, line: Line) -> None:
    camera = Camera.open(daemon, options("serial", path=str(line.path), window=2), "serial")
    opened = camera.opened
    assert (opened.dtype, opened.shape, opened.fps) == ("float32", [2, 1], 50.0)
    frames = ring.map_ring(camera.ring, opened.slots, opened.slot_bytes, opened.dtype, opened.shape)
    sock = camera.attach_socket(1)
    sock.settimeout(WAIT_S)
    sock.send(protocol.CREDIT.pack(protocol.FIRST_CREDIT))

    def window(*said: str) -> list[float]:
        """The next window; `said` again and again, because nobody hears what comes while the line is opened."""
        deadline = time.monotonic() + WAIT_S
        sock.settimeout(0.2)
        while time.monotonic() < deadline:
            line.say("".join(f"{one}\n" for one in said))
            try:
                _, _, slot, _ = protocol.NOTICE.unpack(sock.recv(64))
            except TimeoutError:
                continue
            values = frames[slot].ravel().tolist()
            sock.send(protocol.CREDIT.pack(slot))
            return values
        raise AssertionError("no window came")

    def state(wanted: str, since: int = 0) -> protocol.SourceState:
        while (said := camera.expect(protocol.SourceState)).state != wanted or said.reconnects < since:
            pass
        return said

    assert set(window("1", "2")) == {1, 2}
    assert state("streaming").state == "streaming"
    line.unplug()
    assert state("reconnecting").reason in ("source_unreadable", "source_missing")
    line.plug()
    for _ in range(20):  # a few windows of before may still be on their way
        if set(values := window("3", "4")) == {3, 4}:
            break
    assert set(values) == {3, 4}
    assert state("streaming", since=1).reconnects == 1


def test_samples_fed_by_the_daemon_reach_a_reader_through_the_ring(daemon: Daemon) -> None:
    camera = Camera.open(daemon, options("topic", topic="pump", channels=3, window=2), "topic")
    opened = camera.opened
    frames = ring.map_ring(camera.ring, opened.slots, opened.slot_bytes, opened.dtype, opened.shape)
    sock = camera.attach_socket(1)
    sock.settimeout(WAIT_S)
    sock.send(protocol.CREDIT.pack(protocol.FIRST_CREDIT))
    t_ns = time.monotonic_ns()
    camera.send(protocol.Feed(t_ns, [[1, 2, 3], [4, 5, 6]]))
    # a source waits for nobody: what came before it heard of the reader is gone
    sock.settimeout(1.0)
    for _ in range(int(WAIT_S)):
        try:
            notice = sock.recv(64)
            break
        except TimeoutError:
            t_ns = time.monotonic_ns()
            camera.send(protocol.Feed(t_ns, [[1, 2, 3], [4, 5, 6]]))
    _, at_ns, slot, _ = protocol.NOTICE.unpack(notice)
    assert frames[slot].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert at_ns == t_ns
