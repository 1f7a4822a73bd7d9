"""Model workers that the zygote forks: the same to the daemon as executed ones, and executed where it cannot fork."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from workerdriver import ROOT, TIMEOUT_S, Daemon, Worker, ask, load, load_message

from agent import protocol
from agent.errors import Reason
from agent.worker import nursery

LITERT = "litert:xnnpack"
MODEL = ROOT / "models/digits/1.0.0/int8.tflite"


@pytest.fixture
def bad_company():
    daemon = Daemon([str(Path(__file__).with_name("entry_of_zygotes.py"))])
    yield daemon
    daemon.stop()


def spawn(daemon: Daemon, **fields: object) -> Worker:
    """A model worker, forked if that can be."""
    ours, theirs = protocol.socket_pair()
    number = len(daemon.workers) + 1
    message = {"worker": number, "role": "model", "nice": 0, "memory_bytes": 0, "forked": True, **fields}
    daemon.send(protocol.Spawn(**message), theirs.fileno())
    theirs.close()
    while not isinstance(said := daemon.receive().message, protocol.Started):
        daemon.unasked.append(said)
    worker = Worker(ours, number, said.pid)
    daemon.workers.append(worker)
    return worker


def role(pid: int) -> str:
    """What a worker's process was executed as; the host forks before it executes."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if found := [word for word in words if word in ("model", "trial", "zygote")]:
            return found[0]
        time.sleep(0.01)
    raise TimeoutError(f"process {pid} is {words}")


def status(pid: int, key: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{key}:"))


def zygotes(daemon: Daemon) -> list[int]:
    """The host's children that are the zygote itself, not forked from it."""
    host = daemon.process.pid
    children = Path(f"/proc/{host}/task/{host}/children").read_text().split()
    forked = {worker.pid for worker in daemon.workers}
    return [int(pid) for pid in children if int(pid) not in forked and role(int(pid)) == "zygote"]


def gone(pid: int) -> bool:
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        try:
            if status(pid, "State").startswith("Z"):
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def test_a_forked_worker_is_a_child_of_the_host_and_answers_like_an_executed_one(daemon):
    daemon.send(protocol.Zygote([LITERT]))
    forked, executed = spawn(daemon), spawn(daemon, forked=False)
    assert (role(forked.pid), role(executed.pid)) == ("zygote", "model")
    assert status(forked.pid, "PPid") == status(executed.pid, "PPid") == str(daemon.process.pid)
    image = (ROOT / "models/digits/golden").glob("*.png")
    image = next(image, None) or next((ROOT / "models/digits").rglob("*.png"))
    answers = []
    for worker in (forked, executed):
        graph = {"task": "raw", "preprocess": {"color": "gray"}}
        assert isinstance(load(worker, MODEL.read_bytes(), load_message(LITERT, graph)), protocol.ModelLoaded)
        answers.append(ask(worker, protocol.RunImage(), image.read_bytes()).items)
    assert answers[0] == answers[1]
    forked.send(protocol.StopWorker())
    exited = daemon.wait_exit(forked)
    assert exited.status == 0
    assert exited.cpu_s > 0
    assert exited.peak_rss_bytes > 10 << 20


def test_a_forked_worker_has_its_own_limits_folder_and_descriptors(daemon):
    daemon.send(protocol.Zygote([LITERT]))
    worker = spawn(daemon, memory_bytes=512 << 20, nice=3)
    load(worker, b"nothing", load_message("nowhere"))  # it is past its entrance once it answers
    limits = Path(f"/proc/{worker.pid}/limits").read_text()
    assert "Max data size             536870912            536870912" in limits
    assert "Max core file size        0                    0" in limits
    assert os.getpriority(os.PRIO_PROCESS, worker.pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 3)
    (zygote,) = zygotes(daemon)
    folder = os.readlink(f"/proc/{worker.pid}/cwd")
    assert folder != os.readlink(f"/proc/{zygote}/cwd")
    assert not os.listdir(folder)
    ours = {os.readlink(entry) for entry in Path(f"/proc/{worker.pid}/fd").iterdir()}
    theirs = {os.readlink(entry) for entry in Path(f"/proc/{zygote}/fd").iterdir()}
    assert not {name for name in ours & theirs if name.startswith(("socket", "pipe"))}
    daemon.kill(worker)
    assert daemon.wait_exit(worker).status == -signal.SIGKILL
    assert not os.path.exists(folder)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
def test_a_forked_worker_that_is_ended_is_reported_with_minus_its_signal(daemon, number):
    daemon.send(protocol.Zygote([LITERT]))
    worker = spawn(daemon)
    os.kill(worker.pid, number)
    assert daemon.wait_exit(worker).status == -number
    assert role(spawn(daemon).pid) == "zygote"


def test_forked_workers_live_on_without_their_zygote_and_the_next_is_executed(daemon):
    daemon.send(protocol.Zygote([LITERT]))
    first = spawn(daemon)
    (zygote,) = zygotes(daemon)
    os.kill(zygote, signal.SIGKILL)
    fault = daemon.receive().message
    assert isinstance(fault, protocol.Fault)
    assert "executed, not forked" in fault.message
    assert role(spawn(daemon).pid) == "model"
    assert isinstance(load(first, MODEL.read_bytes(), load_message(LITERT)), protocol.ModelLoaded)


def test_other_runtimes_make_another_zygote_and_none_ends_it(daemon):
    daemon.send(protocol.Zygote([LITERT]))
    first = spawn(daemon)
    (zygote,) = zygotes(daemon)
    daemon.send(protocol.Zygote(["onnx:cpu"]))
    second = spawn(daemon)
    (other,) = zygotes(daemon)
    assert other != zygote
    assert "onnxruntime" in Path(f"/proc/{second.pid}/maps").read_text()
    assert "onnxruntime" not in Path(f"/proc/{first.pid}/maps").read_text()
    daemon.send(protocol.Zygote([]))
    assert gone(other)
    assert role(spawn(daemon).pid) == "model"
    assert isinstance(load(first, MODEL.read_bytes(), load_message(LITERT)), protocol.ModelLoaded)


def test_forked_workers_and_their_zygote_die_with_the_host(daemon):
    daemon.send(protocol.Zygote([LITERT]))
    worker = spawn(daemon)
    load(worker, b"nothing", load_message("nowhere"))
    (zygote,) = zygotes(daemon)
    daemon.process.kill()
    assert gone(worker.pid)
    assert gone(zygote)


@pytest.mark.parametrize(
    ("delegate", "why"),
    [("fake:threaded", "has 2 threads and must not fork"), ("fake:fatal", "its last words: illegal instruction")],
)
def test_where_the_zygote_must_not_or_cannot_fork_workers_are_executed_and_the_daemon_is_told(
    bad_company, delegate, why
):
    bad_company.send(protocol.Zygote([delegate]))
    worker = spawn(bad_company)
    assert role(worker.pid) == "model"
    told = [fault.message for fault in bad_company.unasked if isinstance(fault, protocol.Fault)]
    assert any(why in message for message in told), told
    assert isinstance(load(worker, MODEL.read_bytes(), load_message(LITERT)), protocol.ModelLoaded)


def test_a_worker_that_waits_for_its_zygote_can_be_killed(bad_company):
    bad_company.send(protocol.Zygote(["fake:endless"]))
    ours, theirs = protocol.socket_pair()
    bad_company.send(protocol.Spawn(7, "model", 0, 0, True), theirs.fileno())
    theirs.close()
    bad_company.send(protocol.Kill(7, signal.SIGKILL))
    assert bad_company.expect(protocol.Exited) == protocol.Exited(7, -signal.SIGKILL, "", 0, 0.0)
    assert ours.recv(1) == b""
    ours.close()


def test_a_worker_waits_no_longer_because_its_zygote_is_replaced(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(nursery.time, "monotonic", lambda: now[0])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        first = nursery.Nursery(ours, [])
        first.waiting.append(nursery.Waiting(protocol.Spawn(7, "model", 0, 0, True), theirs.fileno()))
        now[0] += 15
        replaced = nursery.Nursery(theirs, first.close())
        assert replaced.patience_s() == nursery.START_LIMIT_S - 15


@pytest.mark.parametrize("fields", [{"delegates": ["nowhere"]}, {"delegates": [7]}, {"delegates": [["a"]]}])
def test_a_zygote_of_an_unknown_delegate_is_refused(daemon, fields):
    daemon.send(protocol.Zygote(**fields))
    assert daemon.receive().message.reason == Reason.BAD_MESSAGE.value
    assert role(spawn(daemon).pid) == "model"


def test_only_model_workers_are_forked(daemon):
    daemon.send(protocol.Zygote([LITERT]))
    assert role(spawn(daemon).pid) == "zygote"
    assert role(spawn(daemon, role="trial").pid) == "trial"
