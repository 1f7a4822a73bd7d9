"""A block server as a process of its own: the shipped `run`, over payloads made from a seed.

python -m tests.fakes.blockserver PORT CA CERTIFICATE KEY CLIENT_ID BYTES
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from ota.mqtt import Tls
from ota.publisher import serve
from tests.fakes.blocksource import MemorySource, payload
from tests.fakes.broker import Broker, Identity

_ROOT = Path(__file__).resolve().parents[2]
DEVICE_DOCUMENT = b'{"for": "cam-1"}'


class BlockServerProcess:
    """One running server; its standard error is kept in `log`."""

    def __init__(self, broker: Broker, identity: Identity, size: int, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", __name__, str(broker.port), identity.ca, identity.certificate, identity.key]
        with log.open("ab") as stderr:
            self._process = subprocess.Popen([*command, identity.name, str(size)], cwd=_ROOT, stderr=stderr)

    def __enter__(self) -> BlockServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait_connected(self, timeout_s: float = 60.0) -> None:
        """Wait until it says that it is connected."""
        deadline = time.monotonic() + timeout_s
        while "connected to" not in self.log.read_text():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(f"the block server did not come up: {self.log.read_text()}")
            time.sleep(0.02)

    def terminate(self) -> int:
        """SIGTERM; its exit status."""
        self._process.terminate()
        return self._process.wait(15)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def cpu_s(self) -> float:
        """Processor time it has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def answers(self) -> int:
        """How many answers it says it gave; after `terminate`."""
        found = re.search(r"stopped: (\d+) answers", self.log.read_text())
        return int(found.group(1)) if found else 0


def main(arguments: list[str]) -> int:
    """Serve until told to stop."""
    port, ca, certificate, key, client_id, size = arguments
    sha256, data = payload(int(size))
    source = MemorySource(desired={"cam-1": DEVICE_DOCUMENT}, payloads={sha256: data})
    tls = Tls(ca, certificate, key)
    return serve.run(source, host="127.0.0.1", port=int(port), tls=tls, tenant="edge", client_id=client_id)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
