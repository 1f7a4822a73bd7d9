"""A folder in which the documents' shell blocks are carried out as a reader would, with real processes and a broker.

The folder looks like a checkout to the blocks (`models`, `packaging`). What differs from a reader's machine: the
broker's port 8883 is a free one, `sudo` is nobody else, and the device's own agent.toml is the folder's
(`/etc/edge-agent/agent.toml` is where the command looks when it is not told).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from tests.docs.documents import ROOT, Block
from tests.fakes.ports import free_port

_BIN = Path(sys.executable).parent
_SHOWN_PORT = {"127.0.0.1:8883": "127.0.0.1:{}", "listener 8883 127.0.0.1": "listener {} 127.0.0.1"}
_SUDO = """\
#!/bin/sh
if [ "$1" = -u ]; then shift 2; fi
exec "$@"
"""
_AGENT = """\
#!/bin/sh
case "$*" in
bench* | infer* | *--config*) exec {real} "$@" ;;
*) exec {real} "$@" --config agent.toml ;;
esac
"""


class World:
    """Runs blocks in `folder`; what they start in the background lives until `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.listener_port = free_port(), free_port()
        self.log = folder / "shell.log"
        self._groups: list[int] = []
        for name in ("models", "packaging"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "bin").mkdir()
        for name, script in (("sudo", _SUDO), ("edge-agent", _AGENT.format(real=_BIN / "edge-agent"))):
            (folder / "bin" / name).write_text(script)
            (folder / "bin" / name).chmod(0o755)

    def run(self, blocks: Sequence[Block], *, timeout_s: float = 180.0) -> str:
        """Carry out the `sh` blocks of a document in one shell, in order; returns what they printed.

        Raises:
            AssertionError: one of them failed, with the log.
        """
        script = []
        for block in blocks:
            if block.info == "toml":
                name = "agent.toml" if "[[line]]" in block.text else "spec.toml"
                script.append(f"cat >{name} <<'END_OF_FILE'\n{block.text}END_OF_FILE\n")
            elif block.info == "sh":
                script.append(f": {block.place}\n{block.text}")
        return self.shell("".join(script), timeout_s=timeout_s)

    def shell(self, script: str, *, timeout_s: float = 180.0) -> str:
        """Carry out a script as `run` does."""
        for shown, ours in _SHOWN_PORT.items():
            script = script.replace(shown, ours.format(self.port))
        script = script.replace("127.0.0.1:8884", f"127.0.0.1:{self.listener_port}")
        before = len(self.output())
        with self.log.open("ab") as log:
            shell = subprocess.Popen(
                ["bash", "-xeuo", "pipefail", "-c", script], cwd=self.folder, env=self._environment(),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._groups.append(shell.pid)
        try:
            code = shell.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done in {timeout_s:g} s:\n{self.output()[before:][-4000:]}") from None
        printed = self.output()[before:]
        assert code == 0, f"exit code {code}:\n{printed[-4000:]}"
        return printed

    def output(self) -> str:
        """Everything printed so far, the traced commands among it."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def end(self, program: str) -> None:
        """End the background processes called `program`."""
        ended = [process for process in self._processes() if process.name() == program]
        assert ended, f"no {program} runs"
        for process in ended:
            process.terminate()
        psutil.wait_procs(ended, timeout=10)

    def close(self) -> None:
        """End everything that still runs."""
        left = list(self._processes())
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        _, stubborn = psutil.wait_procs(left, timeout=10)
        for process in stubborn:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(process.pid) in self._groups:
                    yield process

    def _environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{_BIN}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"
        return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
