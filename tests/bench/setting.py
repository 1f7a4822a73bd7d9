"""What every section of `make bench` is given: a folder, how long it may take, the video, the CPU pressure."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "models" / "parts"
DATA = ROOT.parent / "shared" / "data"
"""Published models, no part of the product; what needs them is left out by name where they are absent."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Attributes:
    folder: of the section alone, made before it starts.
    rounds, seconds: how often and how long each candidate of a comparison runs.
    """

    folder: Path
    shared: Path
    rounds: int
    seconds: float

    @property
    def clip(self) -> Path:
        """Twelve seconds of 640x480 MJPEG at 30 frames a second."""
        clip = self.shared / "clip.avi"
        if not clip.exists():
            command = [sys.executable, str(PARTS / "clip.py"), str(clip), "--seconds", "12", "--fps", "30"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return clip


def pressure() -> str:
    """Share of the last ten seconds in which something waited for a CPU."""
    try:
        return Path("/proc/pressure/cpu").read_text().split()[1].partition("=")[2] + " %"
    except OSError:
        return "unknown"


@dataclass(slots=True)
class Pressure:
    """Share of the time since it was made in which something waited for a CPU, from the kernel's own total."""

    _since: float = field(default_factory=time.monotonic)
    _stalled_us: int = field(default_factory=lambda: _stalled_us())

    @property
    def percent(self) -> float:
        """0 to 100; 0 as well where the kernel does not say."""
        passed_us = (time.monotonic() - self._since) * 1e6
        return 100 * (_stalled_us() - self._stalled_us) / passed_us if passed_us else 0.0


def _stalled_us() -> int:
    try:
        return int(Path("/proc/pressure/cpu").read_text().split("total=")[1].split()[0])
    except (OSError, ValueError, IndexError):
        return 0
