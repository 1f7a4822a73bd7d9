"""The worker program with delegates whose runtimes are bad company for a zygote."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from agent.worker.delegates import DELEGATES
from agent.worker.main import main


def threaded():
    """Starts a thread while it is imported, as some runtimes do."""
    threading.Thread(target=lambda: time.sleep(600), daemon=True).start()


def fatal():
    """Takes the process with it, as a library built for another CPU does."""
    os.write(2, b"illegal instruction\n")
    os._exit(132)


def endless():
    """Never comes back from its import."""
    time.sleep(600)


if __name__ == "__main__":
    bad = {"fake:threaded": threaded, "fake:fatal": fatal, "fake:endless": endless}
    sys.exit(main(sys.argv[1:], delegates={**DELEGATES, **bad}, entry=(str(Path(__file__)),)))
