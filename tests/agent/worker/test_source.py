"""The source process, for real: a clip, a ring, readers played by the test."""

from __future__ import annotations

import os
import socket
import time

import numpy as np
import pytest
from workerdriver import Camera, Daemon, Reader, frame_number, make_clip

from agent import protocol
from agent.errors import ConfigError, Reason, SourceError
from agent.worker.sources.video import open_video


def dropped(camera: Camera, seconds: float = 0.2) -> list[tuple[str, list[int], str]]:
    return [(m.line, m.seqs, m.reason) for m in camera.collect(seconds) if isinstance(m, protocol.Dropped)]


def test_live_without_overload_delivers_every_frame_from_0_on_and_at_its_time(daemon: Daemon, clip):
    # a queue for 0.64 s: the test's reader may be kept waiting by other processes, and that is no overload
    camera = Camera.open(daemon, {"path": str(clip), "queue_frames": 64})
    assert (camera.opened.dtype, camera.opened.shape, camera.opened.fps) == ("uint8", [120, 160, 3], 100.0)
    reader = Reader(camera, 1)
    reader.ask()
    answered = reader.run(100)
    assert [(seq, number) for seq, _, number in answered] == [(i, i) for i in range(100)]
    # the source itself may once have been kept waiting
    assert np.median(np.diff([t_ns for _, t_ns, _ in answered])) == 10e6
    assert all(min(seqs) >= 100 for _, seqs, _ in dropped(camera)), "nothing is lost while somebody takes frames"


def test_the_clock_starts_with_the_first_request(daemon: Daemon, clip):
    camera = Camera.open(daemon, {"path": str(clip)})
    reader = Reader(camera, 1)
    time.sleep(0.3)
    reader.ask()
    assert reader.run(3)[0][0] == 0
    assert dropped(camera, 0.05) == []


def test_overload_drops_the_older_waiting_frames_as_backlog_and_loses_none_silently(daemon: Daemon, clip):
    camera = Camera.open(daemon, {"path": str(clip), "queue_frames": 2})
    reader = Reader(camera, 1)
    reader.ask()
    answered = [seq for seq, _, _ in reader.run(12, work_s=0.05)]
    reader.sock.close()
    losses = dropped(camera)
    assert {reason for _, _, reason in losses} <= {"backlog", "worker_lost", "no_reader"}
    backlog = [seq for _, seqs, reason in losses for seq in seqs if reason == "backlog"]
    assert len(backlog) > 20
    seen = sorted(reader.seen + backlog)
    assert seen[: max(answered) + 1] == list(range(max(answered) + 1))


def test_every_waits_for_the_reader_and_drops_nothing(daemon: Daemon, clip):
    camera = Camera.open(daemon, {"path": str(clip), "policy": "every"})
    reader = Reader(camera, 1)
    reader.ask()
    first = reader.run(20, work_s=0.02)
    rest = reader.run(180)
    assert [seq for seq, _, _ in first + rest] == list(range(200))
    states = [m for m in camera.collect(0.3) if not isinstance(m, protocol.Dropped)]
    assert (states[-1].state, states[-1].detail, states[-1].frames) == ("ended", "last frame", 200)


def test_a_loop_counts_on_without_restarting(daemon: Daemon, tmp_path):
    path = make_clip(tmp_path / "short.avi", 5)
    camera = Camera.open(daemon, {"path": str(path), "policy": "every", "loop": True})
    reader = Reader(camera, 1)
    reader.ask()
    assert [(seq, number) for seq, _, number in reader.run(13)] == [(i, i % 5) for i in range(13)]


def test_a_switch_between_two_readers_loses_no_frame_and_answers_none_twice(daemon: Daemon, clip):
    camera = Camera.open(daemon, {"path": str(clip), "loop": True, "queue_frames": 64})
    old, new = Reader(camera, 1), Reader(camera, 2, active=False)
    old.ask()
    new.ask()
    old.run(20)
    held = old.take()
    camera.send(protocol.SwitchReader("line", 2))
    switched = camera.expect(protocol.Switched)
    assert switched.first_seq > held[0]
    new.run(20)
    old.give_back(held[2])
    assert old.take() is None, "the old reader is ended once its lease is back"
    assert old.seen + new.seen == list(range(len(old.seen) + len(new.seen)))
    assert new.seen[0] == switched.first_seq
    assert dropped(camera) == []


def test_a_reader_that_dies_drops_exactly_the_frame_it_held(daemon: Daemon, clip):
    camera = Camera.open(daemon, {"path": str(clip), "queue_frames": 16, "loop": True})
    first = Reader(camera, 1)
    first.ask()
    first.run(5)
    held = first.take()
    first.sock.close()
    second = Reader(camera, 2)
    second.ask()
    second.run(10)
    assert dropped(camera, 0.1) == [("line", [held[0]], "worker_lost")]
    assert second.seen[0] == held[0] + 1


def test_two_lines_get_every_frame_each_at_its_own_pace(daemon: Daemon, clip):
    camera = Camera.open(daemon, {"path": str(clip), "policy": "every"})
    fast, slow = Reader(camera, 1, line="fast"), Reader(camera, 2, line="slow")
    fast.ask()
    slow.ask()
    for _ in range(30):
        fast.run(1)
        slow.run(1, work_s=0.002)
    assert fast.seen == slow.seen == list(range(30))


def test_a_slot_that_is_read_is_never_overwritten(daemon: Daemon, clip):
    camera = Camera.open(daemon, {"path": str(clip), "loop": True, "fps": 500})
    reader = Reader(camera, 1)
    reader.ask()
    seq, _, slot = reader.take()
    time.sleep(0.3)  # some 150 frames pass meanwhile
    assert frame_number(reader.frames[slot]) == seq


@pytest.mark.parametrize("message", [b"", b"\0", b"\xff\xff\xff\xff" * 2, b"\x07\0\0\0"])
def test_a_reader_that_breaks_the_rules_is_cut_off_and_the_source_goes_on(daemon: Daemon, clip, message):
    camera = Camera.open(daemon, {"path": str(clip), "loop": True})
    bad, good = Reader(camera, 1, line="bad"), Reader(camera, 2, line="good")
    good.ask()
    if message:
        bad.sock.send(message)
    else:
        bad.sock.shutdown(socket.SHUT_WR)
    assert bad.take() is None
    assert len(good.run(5)) == 5


def test_stopping_a_source_drops_what_waits_and_exits_with_0(daemon: Daemon, clip):
    camera = Camera.open(daemon, {"path": str(clip), "policy": "every", "queue_frames": 3})
    reader = Reader(camera, 1)
    reader.ask()
    reader.take()
    time.sleep(0.1)
    camera.send(protocol.StopWorker())
    assert dropped(camera) == [("line", [1, 2, 3], "stopped")]
    assert daemon.wait_exit(camera).status == 0
    assert reader.take() is None


def test_detaching_a_reader_drops_its_frame_with_the_reason_given(daemon: Daemon, clip):
    camera = Camera.open(daemon, {"path": str(clip), "policy": "every", "queue_frames": 1})
    reader = Reader(camera, 1)
    reader.ask()
    reader.take()
    time.sleep(0.05)
    camera.send(protocol.DetachReader(1, "stopped"))
    assert dropped(camera) == [("line", [0], "stopped"), ("line", [1], "no_reader")]
    assert reader.take() is None


def open_fault(daemon: Daemon, options, kind: str = "video") -> protocol.Fault:
    worker = daemon.spawn("source")
    worker.send(protocol.OpenSource("cam", kind, options))
    return worker.receive().message


def test_a_missing_file_is_a_fault_and_the_process_stays(daemon: Daemon, clip):
    worker = daemon.spawn("source")
    worker.send(protocol.OpenSource("cam", "video", {"path": "/nonexistent/a.avi"}))
    fault = worker.receive().message
    assert (fault.reason, fault.message) == (Reason.SOURCE_MISSING.value, "/nonexistent/a.avi does not exist")
    worker.send(protocol.OpenSource("cam", "video", {"path": str(clip)}))
    worker.expect_packet(protocol.SourceOpened).close()


def test_an_unknown_kind_names_the_known_ones(daemon: Daemon):
    fault = open_fault(daemon, {}, "telepathy")
    assert fault.reason == Reason.BAD_CONFIG.value
    assert "video" in fault.hint


def test_requests_before_opening_are_refused(daemon: Daemon):
    worker = daemon.spawn("source")
    worker.send(protocol.SwitchReader("line", 1))
    assert worker.receive().message.reason == Reason.BAD_MESSAGE.value


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", Reason.SOURCE_UNREADABLE), (b"RIFF no video at all", Reason.SOURCE_UNREADABLE)]
)
def test_a_file_without_a_frame_is_unreadable(tmp_path, content, reason):
    path = tmp_path / "broken.avi"
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        open_video({"path": str(path)})
    assert caught.value.reason is reason
    assert caught.value.hint


@pytest.mark.parametrize("path", ["relative.avi", "http://127.0.0.1:9/x.avi", "/tmp", "/dev/null"])
def test_only_a_regular_file_by_its_absolute_path_is_opened(path):
    with pytest.raises(SourceError) as caught:
        open_video({"path": path})
    assert caught.value.reason is Reason.SOURCE_MISSING


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_file_the_workers_user_may_not_read_is_named_so(clip, tmp_path):
    path = tmp_path / "secret.avi"
    path.write_bytes(clip.read_bytes())
    os.chmod(path, 0o600)
    os.chmod(tmp_path, 0o755)
    if not os.access(tmp_path.parent, os.X_OK):
        pytest.skip("the temporary folder is closed to other users")
    for parent in (tmp_path.parent, tmp_path.parent.parent):
        os.chmod(parent, 0o755)
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        try:
            open_video({"path": str(path)})
        except SourceError as e:
            os._exit(0 if e.reason is Reason.SOURCE_UNREADABLE and "permission" in e.message else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"path": "/a", "polcy": "live"}, "policy"),
        ({"path": "/a", "policy": "sometimes"}, "live or every"),
        ({"path": "/a", "queue_frames": 0}, "4"),
        ({"path": "/a", "queue_frames": True}, "4"),
        ({"path": "/a", "fps": -1}, "leave it out"),
        ({"path": "/a", "loop": "yes"}, "true"),
        ({}, "path"),
    ],
)
def test_a_wrong_option_is_named_with_what_to_do(options, hint):
    with pytest.raises(ConfigError) as caught:
        open_video(options)
    assert caught.value.reason is Reason.BAD_CONFIG
    assert hint in caught.value.hint


def test_frames_are_decoded_into_the_slot_itself(clip):
    video = open_video({"path": str(clip)})
    slot = np.zeros((120, 160, 3), np.uint8)
    for number in range(4):
        assert video.read_into(slot)
        assert frame_number(slot) == number
    wrong = np.zeros((100, 160, 3), np.uint8)
    with pytest.raises(SourceError):
        video.read_into(wrong)
