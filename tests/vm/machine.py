"""A virtual machine by software emulation, driven through a root shell on a serial line."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.vm.image import Kernel

BOOT_TIMEOUT_S = 600.0
COMMAND_TIMEOUT_S = 600.0
_MARK = "@@done"


class MachineError(RuntimeError):
    """The machine or a command in it failed; the text is what it said."""


@dataclass(frozen=True)
class Done:
    """How a command ended, what it printed, and how long it took on the host's clock."""

    code: int
    out: str
    seconds: float


class Machine:
    """One boot of a copy-on-write layer over `disk`; `stick` is an image seen as /dev/vdb.

    The process runs at the lowest priority. `kill` is a power cut: what was not synced is gone.
    """

    def __init__(
        self, folder: Path, disk: Path, kernel: Kernel, *, stick: Path | None = None, layer: str = "layer"
    ) -> None:
        self._folder = folder
        self._serial = folder / "shell.sock"
        self._layer = folder / f"{layer}.qcow2"
        self._kernel = kernel
        self._stick = stick
        self._process: subprocess.Popen[bytes] | None = None
        self._shell: socket.socket | None = None
        # one of an earlier run would lie over another disk
        self._layer.unlink(missing_ok=True)
        made = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(disk.resolve()), str(self._layer)]
        subprocess.run(made, check=True)

    @property
    def up(self) -> bool:
        """Whether it answers."""
        return self._shell is not None

    def boot(self) -> float:
        """Start it and wait for its shell; returns the seconds that took."""
        began = time.monotonic()
        self._serial.unlink(missing_ok=True)
        drives = [f"file={self._layer},if=virtio,format=qcow2,cache=writeback"]
        drives += [f"file={self._stick},if=virtio,format=raw"] if self._stick else []
        command = ["nice", "-n", "19", "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "1536",
                   "-smp", "2", "-display", "none", "-no-reboot", "-nic", "none",
                   "-kernel", str(self._kernel.image), "-initrd", str(self._kernel.initrd),
                   "-append", "root=/dev/vda rw console=ttyS0 systemd.debug-shell=ttyS1",
                   "-serial", f"file:{self._folder / 'console.log'}",
                   "-serial", f"unix:{self._serial},server=on,wait=off"]  # fmt: skip
        for drive in drives:
            command += ["-drive", drive]
        with (self._folder / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = began + BOOT_TIMEOUT_S
        while not self._serial.exists():
            self._check(deadline)
            time.sleep(0.1)
        self._shell = socket.socket(socket.AF_UNIX)
        self._shell.connect(str(self._serial))
        self._shell.settimeout(2)
        while not self._read_for(5, r"# ").endswith("# "):
            self._check(deadline)
            self._shell.sendall(b"\n")  # the line may have been opened before anybody listened
        # bash would draw its prompt anew for each line
        for line in ("exec sh", "stty -echo cols 500", "PS1=; PS2="):
            self._read_for(2, "^$")
            self._shell.sendall(line.encode() + b"\n")
        self._read_for(2, "^$")
        self.run("systemctl is-system-running --wait >/dev/null; true")
        return time.monotonic() - began

    def run(self, command: str, *, check: bool = True, timeout_s: float = COMMAND_TIMEOUT_S) -> Done:
        """One shell command on one line, of at most 3000 characters.

        Raises:
            MachineError: it failed (with `check`), or did not end.
        """
        assert self._shell is not None
        assert len(command) < 3000
        assert "\n" not in command
        began = time.monotonic()
        self._shell.sendall(f"{{ {command}; }} 2>&1 </dev/null; ended=$?; echo; echo {_MARK} $ended\n".encode())
        # the line as it was typed may be echoed, with a dollar sign in the place of the number
        said = self._read_for(timeout_s, rf"{_MARK} \d+\r?\n")
        match = re.search(rf"{_MARK} (\d+)\r?\n", said)
        if match is None:
            raise MachineError(f"{command}: no end within {timeout_s:g} s\n{said}")
        out = said[: match.start()].replace("\r", "").strip("\n")
        done = Done(int(match[1]), out, time.monotonic() - began)
        if check and done.code:
            raise MachineError(f"{command}: {done.code}\n{out}")
        return done

    def until(self, what: str, command: str, timeout_s: float) -> float:
        """Seconds until `command` succeeds, asked now and then.

        Raises:
            MachineError: it does not in time; the text is its last output.
        """
        began = time.monotonic()
        while True:
            done = self.run(command, check=False)
            if done.code == 0:
                return time.monotonic() - began
            if time.monotonic() - began > timeout_s:
                raise MachineError(f"not within {timeout_s:g} s: {what}\n{done.out}")
            time.sleep(max(2.0, 9 * done.seconds))  # asking costs the machine a tenth of its time

    def kill(self) -> None:
        """Cut the power."""
        if self._shell is not None:
            self._shell.close()
            self._shell = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def discard(self) -> None:
        """Cut the power and forget what was written."""
        self.kill()
        self._layer.unlink(missing_ok=True)

    def _check(self, deadline: float) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise MachineError((self._folder / "qemu.log").read_text(errors="replace")[-2000:])
        if time.monotonic() > deadline:
            raise MachineError(f"it did not boot: {self._folder / 'console.log'}")

    def _read_for(self, timeout_s: float, wanted: str) -> str:
        """What it says until that pattern stands in it, or the time is over; `^$` waits for the time alone."""
        assert self._shell is not None
        said, deadline = "", time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                chunk = self._shell.recv(65536)
            except TimeoutError:
                continue
            if not chunk:
                break
            said += chunk.decode(errors="replace")
            if wanted != "^$" and re.search(wanted, said):
                break
        return said
