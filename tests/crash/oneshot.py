"""The process that the kill campaign kills: one boot, one update from a directory, the end.

Real are: the updater, every module below it, the files, their fsyncs, the signatures and the sealed payloads, and the
process with its death. Not real are: the models (byte strings; the host checks their golden hashes and serves them in
this very process, so there is no worker to be killed beside it), and the start of the interpreter: a process is forked
from one that has imported everything, which makes a thousand kills a matter of minutes. The whole daemon with its
workers is killed by `tests/integration/test_kill.py`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ota.client.fsops import Disk
from ota.client.transports import reading
from ota.client.transports.directory import DirectoryTransport
from tests.crash.scene import LIMITS, like
from tests.fakes.host import FakeHost
from tests.ota.client.conftest import DEVICE, LINE, Device, run
from tests.ota.client.simulator import Simulator

FLUSH_BLOCKS = 2
OLD, NEW = "1.0.0", "1.1.0"
KEPT_FOLDERS = ("state", "store", "releases", "inbox")


@dataclass(frozen=True)
class World:
    """A repository as a directory, and the state directory of a device that runs `OLD` and is to run `NEW`."""

    device: Device
    repository: Path
    state: Path
    payload_bytes: int


def make_world(folder: Path, *, delta: bool, leaves: int) -> World:
    """Build both below `folder`; the update comes as a delta, or in full with `leaves` blocks of 64 KiB."""
    from tests.ota.client.conftest import model

    state, repository = folder / "state", folder / "repository"
    state.mkdir(parents=True)
    limits = replace(LIMITS, flush_blocks=FLUSH_BLOCKS)
    device = Device(Disk(state), Simulator(), limits=limits)
    base = device.release(OLD, data=like(OLD))
    assert device.check().outcome == "committed"
    if delta:
        built = device.release(NEW, data=like(OLD)[:-64] + bytes(64), bases=[base])
    else:
        built = device.release(NEW, data=model(11, leaves << 16), codec="raw")
    device.repository.write(repository, DEVICE)
    release = json.loads(built.data)
    parts = [*release["components"], release["golden"]]
    wanted = [part["deltas"][0] if delta and part["deltas"] else part["full"] for part in parts]
    return World(device, repository, state, sum(_length(payload) for payload in wanted))


def _length(payload: Mapping[str, Any]) -> int:
    return int(payload.get("length") or payload["payload"]["length"])


class Told:
    """What a process told before it died: one JSON object a line through a pipe, which outlives it."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.fetched_bytes = sum(line.get("fetched", 0) for line in lines)
        self.serving = next((line["serving"] for line in lines if "serving" in line), None)
        self.recovery_s = next((line["after_s"] for line in lines if "serving" in line), None)
        self.committed = any(line.get("outcome") in ("committed", "up_to_date") for line in lines)
        self.ended = next((line["ended"] for line in lines if "ended" in line), None)
        self.quarantine = next((line["quarantine"] for line in lines if "ended" in line), {})


class Process:
    """One run on `state`; `stopped` lets it begin only when told to, so that a tracer can be attached first."""

    def __init__(self, world: World, state: Path, *, stopped: bool = False) -> None:
        self._pipe, far = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            try:
                reading._threads.cache_clear()  # the parent's threads did not come along
                if stopped:
                    os.kill(os.getpid(), signal.SIGSTOP)
                _update(world, state, lambda **facts: os.write(far, json.dumps(facts).encode() + b"\n"))
                os._exit(0)
            except BaseException as e:  # noqa: BLE001 - the end of a process; its parent judges what it told
                os.write(far, json.dumps({"crashed": repr(e)}).encode() + b"\n")
                os._exit(1)
        os.close(far)
        if stopped:
            os.waitpid(self.pid, os.WUNTRACED)

    def kill(self) -> None:
        """SIGKILL, unless it ended already."""
        os.kill(self.pid, signal.SIGKILL)

    def proceed(self) -> None:
        """Let a stopped process go on."""
        os.kill(self.pid, signal.SIGCONT)

    def wait(self) -> tuple[Told, bool]:
        """What it told, and whether it was killed."""
        data = b""
        while chunk := os.read(self._pipe, 1 << 16):
            data += chunk
        os.close(self._pipe)
        _, status = os.waitpid(self.pid, 0)
        lines = [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
        return Told(lines), os.WIFSIGNALED(status)


class _Counted(DirectoryTransport):
    """The real transport; tells of every block it gave."""

    tell: Callable[..., object]

    async def block(self, sha256: str, offset: int, length: int) -> bytes:
        data = await super().block(sha256, offset, length)
        self.tell(fetched=len(data))
        return data


def _update(world: World, state: Path, tell: Callable[..., object]) -> None:
    started = time.monotonic()
    device = replace(world.device, disk=Disk(state), host=FakeHost(), events=[])
    transport = _Counted(world.repository, DEVICE)
    transport.tell = tell
    device.transports = (transport,)
    updater = device.reboot()
    tell(serving=device.serving, after_s=time.monotonic() - started)
    event = run(updater.check())[-1]
    tell(outcome=event.outcome, message=event.message)
    quarantine = {sha256: reason.value for sha256, reason in updater.record.line(LINE).quarantine.items()}
    tell(ended=device.serving, quarantine=quarantine)
