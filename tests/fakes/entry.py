"""The worker program with every fake delegate of this folder beside the real ones. Run as a program, never imported.

Files are those that `tests/fakes/delegates.py` describes: itself, `blind_*.py`, and `external.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from agent.worker.delegates import DELEGATES
from agent.worker.main import main
from tests.fakes.registry import fakes

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], delegates={**DELEGATES, **fakes()}, entry=(str(Path(__file__).resolve()),)))
