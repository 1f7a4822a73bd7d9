#!/usr/bin/env python3
"""Note the SHA-256 of a line's built files in its recipe: `digests.py LINE_FOLDER`.

Rewrites the [digests] table at the end of recipe.toml; run it after train.py and evaluate.py.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

BUILT = ("*/int8.tflite", "*/int8.onnx", "golden/*.*", "*.npz")
HEADER = "\n[digests]\n"


def digests(line: Path) -> dict[str, str]:
    """SHA-256 in hex of every built file of a line, by path relative to it, sorted."""
    files = sorted(path for pattern in BUILT for path in line.glob(pattern))
    return {path.relative_to(line).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("line", type=Path, help="a line's folder, for example models/parts")
    line = parser.parse_args().line
    recipe = line / "recipe.toml"
    head = recipe.read_text().split(HEADER)[0].rstrip("\n") + "\n"
    recipe.write_text(head + HEADER + "".join(f'"{name}" = "{value}"\n' for name, value in digests(line).items()))


if __name__ == "__main__":
    main()
