"""A host as shipped whose `litert:xnnpack` keeps 16 MB more after every frame; with `--when FILE DELEGATE` that
delegate does, as soon as there is such a file. Run as a program, never imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from agent.worker.delegates import DELEGATES
from agent.worker.main import main

LEAK_BYTES = 16 << 20


class Leaking:
    """A shipped delegate, but for its memory."""

    def __init__(self, name: str = "litert:xnnpack", when: Path = Path("/")) -> None:
        self._real = DELEGATES[name]()
        self._when = when
        self.kept: list[bytes] = []

    def __getattr__(self, name):
        return getattr(self._real, name)

    def load(self, fd, format, options):
        session = self._real.load(fd, format, options)
        run = session.run

        def leak():
            if self._when.exists():
                self.kept.append(os.urandom(1) * LEAK_BYTES)
            return run()

        session.run = leak
        return session


if __name__ == "__main__":
    entry, words = (os.path.abspath(__file__),), sys.argv[1:]
    leaking = {"litert:xnnpack": Leaking}
    if words[0] == "--when":
        _, file, name, *words = words
        entry += ("--when", file, name)
        leaking = {name: lambda: Leaking(name, Path(file))}
    sys.exit(main(words, delegates={**DELEGATES, **leaking}, entry=entry))
