"""The host process: starting, watching and ending real workers."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from workerdriver import ROOT, TIMEOUT_S, Daemon, Peer, ask, load, load_message

from agent import protocol
from agent.errors import Reason


def gone(pid: int, within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def mapped(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def test_a_worker_that_is_asked_to_stop_exits_with_0_and_its_usage(daemon):
    worker = daemon.spawn("transform")
    worker.send(protocol.StopWorker())
    exited = daemon.wait_exit(worker)
    assert exited.status == 0
    assert exited.peak_rss_bytes > 4 << 20
    assert exited.cpu_s > 0


def test_closing_a_workers_socket_ends_it(daemon):
    worker = daemon.spawn("model")
    worker.close()
    assert daemon.wait_exit(worker).status == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_killed_worker_is_reported_with_minus_its_signal(daemon, number):
    worker = daemon.spawn("source")
    daemon.kill(worker, number)
    assert daemon.wait_exit(worker).status == -number


def test_killing_a_worker_that_has_already_gone_is_no_error(daemon):
    worker = daemon.spawn("transform")
    worker.close()
    daemon.wait_exit(worker)
    daemon.kill(worker)
    assert daemon.spawn("transform").pid


def test_an_unknown_role_is_refused_and_the_host_stays(daemon):
    ours, theirs = protocol.socket_pair()
    daemon.send(protocol.Spawn(9, "shell", 0, 0), theirs.fileno())
    packet = daemon.receive()
    assert packet.message.reason == Reason.BAD_MESSAGE.value
    ours.close()
    theirs.close()
    assert daemon.spawn("transform").pid


def test_a_spawn_without_its_socket_is_refused(daemon):
    daemon.send(protocol.Spawn(9, "model", 0, 0))
    assert daemon.receive().message.reason == Reason.BAD_MESSAGE.value


def test_a_crash_brings_the_end_of_stderr_along(daemon, tmp_path):
    entry = tmp_path / "loud.py"
    entry.write_text(
        "import sys\nfrom agent.worker.main import main\n"
        "if sys.argv[1] != 'host':\n    print('x' * 5000, file=sys.stderr)\n    sys.exit('the last words')\n"
        f"sys.exit(main(sys.argv[1:], entry=({str(entry)!r},)))\n"
    )
    loud = Daemon([str(entry)])
    worker = loud.spawn("model")
    exited = loud.wait_exit(worker)
    loud.stop()
    assert exited.status == 1
    assert exited.stderr_tail.endswith("the last words\n")
    assert len(exited.stderr_tail) == 2048


def test_an_interpreter_that_cannot_be_executed_counts_as_a_worker_that_exited(tmp_path):
    entry = tmp_path / "entry.py"
    entry.write_text(
        "import sys\nfrom agent.worker.main import main\n"
        "real = sys.executable\nsys.executable = '/nonexistent/python'\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    broken = Daemon([str(entry)])
    exited = broken.wait_exit(broken.spawn("model"))
    broken.stop()
    assert exited.status == 71
    assert "cannot start the worker" in exited.stderr_tail


def test_workers_inherit_no_secret_no_descriptor_and_an_empty_private_folder(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("HOME", "/root")
    keep = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(keep, True)
    daemon = Daemon()
    worker = daemon.spawn("model", nice=7, memory_bytes=1 << 30)
    load(worker, b"nothing", load_message("nowhere"))  # it runs its loop by now
    proc = Path(f"/proc/{worker.pid}")
    environment = (proc / "environ").read_text().split("\0")
    folder = os.readlink(proc / "cwd")
    mode = os.stat(folder).st_mode & 0o777
    assert os.listdir(folder) == []
    limits = (proc / "limits").read_text()
    stat = (proc / "stat").read_text().rsplit(")", 1)[1].split()
    names = {entry.name for entry in (proc / "fd").iterdir()}
    os.close(keep)
    daemon.stop()
    assert not [v for v in environment if "canary" in v or v.startswith("HOME=")]
    assert "ORT_DISABLE_TELEMETRY=1" in environment
    assert "OPENBLAS_NUM_THREADS=1" in environment
    assert names == {"0", "1", "2", "3"}
    assert mode == 0o700
    by_name = {line[:25].strip(): line[25:].split()[:2] for line in limits.splitlines()}
    assert by_name["Max core file size"] == ["0", "0"]
    assert by_name["Max data size"] == [str(1 << 30)] * 2
    assert int(stat[16]) == min(19, os.nice(0) + 7)
    assert not os.path.exists(folder), "its folder goes with it"


def test_a_confined_process_is_not_dumpable_so_its_user_cannot_read_its_memory():
    status = subprocess.run(
        [sys.executable, "-c", _DUMPABLE_PROBE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert status.stdout.strip() == "0"


_DUMPABLE_PROBE = """
import ctypes
from agent.worker import channel
channel.confine(0)
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""


def test_each_role_loads_only_what_it_needs(daemon, clip, digits):
    host = mapped(daemon.process.pid)
    assert "numpy" not in host
    assert "cv2" not in host
    source = daemon.spawn("source")
    source.send(protocol.OpenSource("cam", "video", {"path": str(clip)}))
    source.expect_packet(protocol.SourceOpened).close()
    assert "cv2" in mapped(source.pid)
    assert not [name for name in ("litert", "onnxruntime", "openvino") if name in mapped(source.pid)]
    model = daemon.spawn("model")
    assert isinstance(
        load(model, (digits / "1.0.0" / "int8.onnx").read_bytes(), load_message("onnx:cpu")), protocol.ModelLoaded
    )
    assert "onnxruntime" in mapped(model.pid)
    assert not [name for name in ("litert", "openvino") if name in mapped(model.pid)]
    transform = daemon.spawn("transform")
    assert ask(transform, protocol.Transform("raw", 3), b"abc") == protocol.Transformed(3, pytest.approx(0, abs=1e4))
    assert "zstandard" in mapped(transform.pid) or "zstd" not in mapped(transform.pid)
    assert not [name for name in ("numpy", "cv2", "litert", "onnxruntime") if name in mapped(transform.pid)]


def test_workers_die_with_their_host(daemon):
    worker = daemon.spawn("model")
    load(worker, b"nothing", load_message("nowhere"))
    daemon.process.kill()
    assert gone(worker.pid)


def test_a_host_kills_its_workers_and_exits_when_the_daemon_goes(daemon):
    worker = daemon.spawn("model")
    load(worker, b"nothing", load_message("nowhere"))
    copy = worker.sock.dup()  # the worker itself would not notice
    assert daemon.stop() == 0
    assert gone(worker.pid)
    copy.close()


def test_a_host_of_a_unit_connects_again_after_the_daemon_restarted(tmp_path):
    path = tmp_path / "worker.sock"
    command = [sys.executable, "-m", "agent.worker.main", "host", "--connect", str(path)]
    with subprocess.Popen(command, cwd=ROOT) as host:
        try:
            for _ in range(2):
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                    listener.bind(str(path))
                    listener.listen(1)
                    listener.settimeout(TIMEOUT_S)
                    accepted, _ = listener.accept()
                    accepted.setblocking(True)
                    peer = Peer(accepted)
                    assert peer.expect(protocol.HostReady).pid == host.pid
                    peer.close()
                path.unlink()
        finally:
            host.terminate()
        assert host.wait(TIMEOUT_S) == 0


def test_a_worker_beyond_its_memory_limit_fails_alone(daemon):
    import cv2
    import numpy as np

    ok, data = cv2.imencode(".png", np.zeros((6000, 6000, 3), np.uint8))
    assert ok
    worker = daemon.spawn("model", memory_bytes=96 << 20)
    worker2 = daemon.spawn("model")
    model = (ROOT / "models/digits/1.0.0/int8.tflite").read_bytes()
    message = load_message("litert:xnnpack", {"task": "raw", "preprocess": {"color": "gray"}})
    answers = []
    for each in (worker, worker2):
        assert isinstance(load(each, model, message), protocol.ModelLoaded)
        answers.append(ask(each, protocol.RunImage(), data.tobytes()))
    assert answers[0].reason == Reason.IMAGE_UNREADABLE.value
    assert isinstance(answers[1], protocol.Result)
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
