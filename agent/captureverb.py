"""`edge-agent capture`: what this device keeps of pictures, and how they get to the operator.

Works on the state directory, whether the daemon runs or not: a capture is written once, whole, and never changed.
The device cannot open them; `edge-ota capture-open` can.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from agent import config, screen
from agent.daemon.captures import FOLDER
from agent.errors import ConfigError, Reason
from ota import capture
from ota.errors import OtaError

_SHOWN = ("line", "rule", "label", "score")


def run(args: argparse.Namespace) -> int:
    """List the captures, or copy them to a directory such as a stick."""
    if (args.action == "copy") is (args.to is None):
        wanted = "copy needs --to DIR" if args.to is None else "list takes no --to"
        raise ConfigError(Reason.BAD_USAGE, wanted, hint="edge-agent capture --help")
    folder = config.load(args.config).state_dir / FOLDER
    found = _found(folder)
    if args.action == "list":
        return _list(args, found)
    there = [_copy(folder / item["file"], args.to) for item in found]
    return screen.answer(args, {"copied": there.count(True), "there already": there.count(False), "to": str(args.to)})


def _list(args: argparse.Namespace, found: list[dict[str, Any]]) -> int:
    if args.json:
        return screen.answer(args, {"captures": found})
    for item in found:
        told = "  ".join(f"{key} {item[key]}" for key in _SHOWN if item.get(key) not in (None, ""))
        print(screen.printable(f"{item['name']}  {item['bytes']} bytes  {told}"))
    print(f"{len(found)} captures")
    return 0


def _found(folder: Path) -> list[dict[str, Any]]:
    """Header, name and size of each capture, oldest first; a damaged file is shown as such."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == capture.SUFFIX)
    except FileNotFoundError:
        return []
    except PermissionError as e:
        raise ConfigError(
            Reason.BAD_USAGE, f"no permission to read {folder}", hint="run it as root, or as the agent's user"
        ) from e
    found = []
    for path in paths:
        item: dict[str, Any] = {"name": path.stem, "file": path.name}
        try:
            with path.open("rb") as file:
                item["bytes"] = os.fstat(file.fileno()).st_size
                header = capture.read_header(file.read(capture.MAX_HEADER_BYTES))
            found.append({**{k: v for k, v in header.items() if k not in ("wrapped", "length", "format")}, **item})
        except FileNotFoundError:
            continue  # it made room a moment ago
        except OtaError as e:
            found.append({**item, "damaged": e.message})
        except OSError as e:
            found.append({**item, "bytes": 0, "damaged": f"cannot be read: {e.strerror}"})
    return found


def _copy(path: Path, to: Path) -> bool | None:
    """Copy one capture, whole or not at all; False when it is there already, None when it is here no more."""
    place = to / path.name
    partial = to / f"{path.name}.tmp"
    try:
        to.mkdir(parents=True, exist_ok=True)
        if place.exists():
            return False
        shutil.copyfile(path, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(place)
    except OSError as e:
        with contextlib.suppress(OSError):  # of a stick that takes nothing
            partial.unlink()
        if not path.exists():
            return None  # it made room a moment ago
        raise ConfigError(
            Reason.BAD_USAGE, f"cannot copy to {to}: {e.strerror}", hint="check the stick: free space, read-only?"
        ) from e
    return True
