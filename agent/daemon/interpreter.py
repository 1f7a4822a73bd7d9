"""Whether an interpreter that is not the daemon's own can run the workers.

A board's runtimes often come for the Python of its vendor's system alone. The worker's side of this program runs on
Python 3.10 and later; the daemon's packages stay out of its reach (`agent.worker.start`, which answers for itself).
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from agent.daemon.supervisor import default_host_command
from agent.errors import ConfigError, Reason

ANSWER_TIMEOUT_S = 30.0
_HINT = "name an interpreter that has the runtimes, or leave worker_python out to use the daemon's own"


def check_interpreter(python: Path) -> str:
    """Version of the interpreter `python`, which can run workers.

    Raises:
        ConfigError: `bad_config`: it is not there, is no Python, too old, lacks a package or cannot start a worker.
    """
    try:
        done = subprocess.run(
            [*default_host_command(python)[:-1], "--check"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=ANSWER_TIMEOUT_S, check=False,
        )  # fmt: skip
    except OSError as e:
        raise _bad(python, f"cannot be run: {e.strerror}") from e
    except subprocess.TimeoutExpired as e:
        raise _bad(python, f"did not answer in {ANSWER_TIMEOUT_S:g} s") from e
    version = done.stdout.strip()
    if done.returncode == 0 and re.fullmatch(r"\d+\.\d+\.\d+", version):
        return version
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if len(said) == 2 and said[0].startswith("error: ") and said[1].startswith("hint: "):
        why = said[0].partition(" cannot run workers: ")[2]
        raise _bad(python, f"cannot run workers: {why}", said[1].removeprefix("hint: "))
    last = f" ({said[-1].strip()[:200]})" if said else ""
    raise _bad(python, f"cannot run workers: it does not answer as a Python{last}")


def _bad(python: Path, why: str, hint: str = _HINT) -> ConfigError:
    return ConfigError(Reason.BAD_CONFIG, f"worker_python {python} {why}", hint=hint)
