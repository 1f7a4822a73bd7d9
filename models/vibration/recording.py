#!/usr/bin/env python3
"""Write a recording to replay: `recording.py OUT [--fault inner_race] [--healthy 4] [--faulty 4] [--machine 1003]`.

OUT becomes a CSV of x, y, z in m/s^2, 3200 samples a second: a healthy machine for some seconds, then the same machine
with the fault. The same arguments give the same bytes again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.vibration import machine

LOAD = 0.8


def write(out: Path, unit: int, fault: str, severity: float, healthy_s: float, faulty_s: float) -> int:
    """Write the recording; return the number of samples."""
    described = machine.machine(unit)
    parts = [machine.record(described, machine.State(LOAD, kind, severity), seed, round(seconds * machine.RATE_HZ))
             for seed, (kind, seconds) in enumerate(((machine.HEALTHY, healthy_s), (fault, faulty_s))) if seconds > 0]
    samples = np.concatenate(parts)
    np.savetxt(out, samples, "%.4f", delimiter=",", header="x,y,z", comments="")
    return len(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the .csv file to write")
    parser.add_argument("--fault", choices=machine.FAULTS, default="inner_race")
    parser.add_argument("--severity", type=float, default=3.0)
    parser.add_argument("--healthy", type=float, default=4.0, help="seconds")
    parser.add_argument("--faulty", type=float, default=4.0, help="seconds")
    parser.add_argument("--machine", type=int, default=machine.MACHINES["validation"][0] + 3, help="its seed")
    arguments = parser.parse_args()
    count = write(arguments.out, arguments.machine, arguments.fault, arguments.severity, arguments.healthy,
                  arguments.faulty)
    print(f"{arguments.out}: {count} samples")


if __name__ == "__main__":
    main()
