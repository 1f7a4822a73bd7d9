"""Another interpreter for the workers of a whole test run: `make test WORKER_PYTHON=/path/to/python3.10`.

Rigs give it to the product the way a person does, by `worker_python` in agent.toml or as the supervisor's command.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from agent.daemon.interpreter import check_interpreter
from agent.daemon.supervisor import default_host_command
from agent.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
_NAMED = os.environ.get("WORKER_PYTHON", "")
WORKER_PYTHON = Path(_NAMED) if _NAMED else None


def host_command() -> list[str]:
    """The shipped host under the interpreter of this run's workers."""
    return default_host_command(WORKER_PYTHON)


def program(*words: str) -> list[str]:
    """How a test's own worker program is started; another interpreter has this checkout not installed."""
    if WORKER_PYTHON is None:
        return [sys.executable, *words]
    return ["/usr/bin/env", f"PYTHONPATH={ROOT}", str(WORKER_PYTHON), *words]


def configured(text: str) -> str:
    """`text`, an agent.toml, with this run's interpreter."""
    line = f'worker_python = "{WORKER_PYTHON}"\n'
    return text if WORKER_PYTHON is None or text.startswith(line) else line + text


def versions() -> Path:
    """Where pyenv keeps its interpreters."""
    return Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"


@cache
def another() -> Path | None:
    """An interpreter of another version than this one that can run workers, if this machine has one."""
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    names = [f"python3.{minor}" for minor in range(10, 16)]
    folders = [Path("/usr/bin"), Path("/usr/local/bin"), *sorted(p / "bin" for p in versions().glob("3.*"))]
    candidates = [WORKER_PYTHON] if WORKER_PYTHON else []
    for path in [*candidates, *(folder / name for name in names for folder in folders)]:
        if not path.exists() or path.name == f"python{own}":
            continue
        try:
            if not check_interpreter(path).startswith(f"{own}."):
                return path
        except (ConfigError, subprocess.SubprocessError):
            continue
    return None
