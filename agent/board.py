"""What a board says of itself: device tree, DMI, processor, PCI and USB ids, read once from /proc and /sys.

It knows no profile and judges nothing. Invariants: reads are bounded, nothing is opened for writing, and what cannot be
read is simply absent. Works below any root, so that a copy of another board's files is read like the board itself.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

MAX_FILE_BYTES = 1 << 20
MAX_DEVICES = 4096
DMI_NAMES = ("sys_vendor", "product_name", "board_vendor", "board_name")


@dataclass(frozen=True, slots=True)
class Board:
    """What was found; empty where a board has none of it.

    `machine` is the instruction set (`aarch64`), empty when a copied root does not tell; `model` and `compatible` are
    of the device tree; `cpu` are processor names; `flags` what /proc/cpuinfo calls flags or Features; `pci` and `usb`
    are ids as `vendor:device`, four hexadecimal digits each.
    """

    machine: str = ""
    model: str = ""
    compatible: tuple[str, ...] = ()
    dmi: tuple[str, ...] = ()
    cpu: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()
    pci: frozenset[str] = frozenset()
    usb: frozenset[str] = frozenset()


def read_board(root: Path = Path("/")) -> Board:
    """The board whose /proc and /sys lie below `root`."""
    cpuinfo = _text(root / "proc/cpuinfo")
    own = root == Path("/")
    return Board(
        machine=platform.machine() if own else _machine(cpuinfo),
        model=" ".join(_strings(root, "model")),
        compatible=_strings(root, "compatible"),
        dmi=tuple(t for name in DMI_NAMES if (t := _text(root / "sys/class/dmi/id" / name).strip())),
        cpu=tuple(dict.fromkeys(_cpuinfo(cpuinfo, "model name"))),
        flags=frozenset(word for key in ("flags", "Features") for v in _cpuinfo(cpuinfo, key) for word in v.split()),
        pci=_ids(root / "sys/bus/pci/devices", "vendor", "device"),
        usb=_ids(root / "sys/bus/usb/devices", "idVendor", "idProduct"),
    )


def _text(path: Path) -> str:
    try:
        # a copy may hold a pipe, which nobody fills
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return (file.read(MAX_FILE_BYTES) or b"").decode("utf-8", "replace")
    except OSError:
        return ""


def _strings(root: Path, name: str) -> tuple[str, ...]:
    """A property of the device tree's root: strings that end with a NUL each."""
    # /proc/device-tree is a link to the first; a copy may hold either
    for folder in ("sys/firmware/devicetree/base", "proc/device-tree"):
        found = tuple(part.strip() for part in _text(root / folder / name).split("\0") if part.strip())
        if found:
            return found
    return ()


def _cpuinfo(text: str, key: str) -> list[str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return [value.strip() for name, _, value in pairs if name.strip() == key and value.strip()]


def _machine(cpuinfo: str) -> str:
    """The instruction set of a copied root, by what its kernel says of the processor."""
    if "8" in _cpuinfo(cpuinfo, "CPU architecture"):
        return "aarch64"
    return "x86_64" if any("lm" in flags.split() for flags in _cpuinfo(cpuinfo, "flags")) else ""


def _ids(folder: Path, vendor: str, device: str) -> frozenset[str]:
    found = set()
    try:
        entries = sorted(folder.iterdir())[:MAX_DEVICES]
    except OSError:
        return frozenset()
    for entry in entries:
        pair = [_text(entry / name).strip().lower().removeprefix("0x") for name in (vendor, device)]
        if all(pair):
            found.add(":".join(pair))
    return frozenset(found)
