"""A disk in memory that forgets what was not made durable, and that can be left in any state a power cut may leave.

It has the methods of `ota.client.fsops.Disk`. The model: the content of a file is durable up to its last fsync, the
names in a directory up to its last fsync_dir; between those points any name may have its old or new meaning and any
file its old, new, cut or zero-filled content, each independently of the others.
"""

from __future__ import annotations

import copy
import errno
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from ota.client import fsops

SECTOR_BYTES = 4096


@dataclass
class File:
    """`durable` None: never synced, a cut may leave nothing of it."""

    content: bytes = b""
    durable: bytes | None = None


@dataclass
class Directory:
    names: dict[str, File | Directory] = field(default_factory=dict)
    durable: dict[str, File | Directory] = field(default_factory=dict)


class MemoryDisk(fsops.Disk):
    """Args:
    skip: recipe and call to leave out, such as ("write_atomic", "fsync"): a disk, or a programmer, that lies.
    on_call: told before every call that changes something.
    """

    def __init__(self, skip: tuple[str, str] | None = None, on_call: Callable[[], None] | None = None) -> None:
        self.root = Directory()
        self.skip = skip
        self.on_call = on_call

    # -- system calls --------------------------------------------------------------------------------------------------

    def mkdir(self, path: str) -> None:
        self._called()
        folder, name = self._parent(path)
        if name in folder.names:
            raise FileExistsError(errno.EEXIST, "exists")
        folder.names[name] = Directory()

    def write(self, path: str, offset: int, data: bytes) -> None:
        self._called()
        folder, name = self._parent(path)
        file = folder.names.setdefault(name, File())
        assert isinstance(file, File)
        content = file.content.ljust(offset, b"\0")
        file.content = content[:offset] + data + content[offset + len(data) :]

    def truncate(self, path: str, length: int) -> None:
        self._called()
        file = self._file(path)
        file.content = file.content[:length].ljust(length, b"\0")

    def fsync(self, path: str) -> None:
        self._called()
        if not self._skipped("fsync"):
            file = self._file(path)
            file.durable = file.content

    def fsync_dir(self, path: str) -> None:
        self._called()
        if not self._skipped("fsync_dir"):
            folder = self.root if path == "." else self._at_path(path)
            assert isinstance(folder, Directory)
            folder.durable = dict(folder.names)

    def rename(self, source: str, destination: str) -> None:
        self._called()
        file = self._file(source)
        folder, name = self._parent(source)
        del folder.names[name]
        folder, name = self._parent(destination)
        folder.names[name] = file

    def unlink(self, path: str) -> None:
        self._file(path)
        self._called()
        folder, name = self._parent(path)
        del folder.names[name]

    def read(self, path: str, offset: int, length: int) -> bytes:
        return self._file(path).content[offset : offset + length]

    def size(self, path: str) -> int:
        return len(self._file(path).content)

    def names(self, path: str) -> list[str]:
        folder = self._at_path(path)
        assert isinstance(folder, Directory)
        return list(folder.names)

    def free_bytes(self) -> int:
        return 1 << 30

    # -- power cuts ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> MemoryDisk:
        """As it is now, with what is durable and what is not."""
        disk = MemoryDisk()
        disk.root = copy.deepcopy(self.root)
        return disk

    def after_cut(self, choice: Choice) -> MemoryDisk:
        """What is on the disk after the power came back; everything on it is durable."""
        disk = MemoryDisk()
        disk.root = _survivor(self.root, choice)
        return disk

    def fingerprint(self) -> int:
        """Equal for equal trees."""
        return hash(_frozen(self.root))

    def _called(self) -> None:
        if self.on_call is not None:
            self.on_call()

    def _skipped(self, call: str) -> bool:
        if self.skip is None or self.skip[1] != call:
            return False
        frame = sys._getframe(2)
        while frame is not None and frame.f_code.co_name != self.skip[0]:
            frame = frame.f_back  # type: ignore[assignment]
        return frame is not None and frame.f_globals.get("__name__") == "ota.client.fsops"

    def _at_path(self, path: str) -> File | Directory:
        place: File | Directory = self.root
        for name in path.split("/"):
            if not isinstance(place, Directory) or name not in place.names:
                raise FileNotFoundError(errno.ENOENT, "absent")
            place = place.names[name]
        return place

    def _parent(self, path: str) -> tuple[Directory, str]:
        folder, _, name = path.rpartition("/")
        place = self._at_path(folder) if folder else self.root
        assert isinstance(place, Directory)
        return place, name

    def _file(self, path: str) -> File:
        file = self._at_path(path)
        assert isinstance(file, File)
        return file


@dataclass(frozen=True)
class Choice:
    """Which of the possible states a cut leaves: `names` old or new, `content` old, new, cut or zeros; `mixed` draws
    each name and each file by itself."""

    names: str
    content: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.names}-names-{self.content}-content-{self.seed}"


EXTREMES = [
    Choice(names, content) for names, content in itertools.product(("old", "new"), ("old", "new", "cut", "zeros"))
]


def mixtures(count: int) -> list[Choice]:
    """Choices that mix old and new at random, the same every time."""
    return [Choice("mixed", "mixed", seed) for seed in range(count)]


def _survivor(folder: Directory, choice: Choice) -> Directory:
    rng = random.Random(choice.seed)
    return _keep(folder, choice, rng)


def _keep(folder: Directory, choice: Choice, rng: random.Random) -> Directory:
    kept = Directory()
    for name in sorted({*folder.names, *folder.durable}):
        new = choice.names == "new" or (choice.names == "mixed" and rng.random() < 0.5)
        entry = (folder.names if new else folder.durable).get(name)
        if isinstance(entry, Directory):
            kept.names[name] = _keep(entry, choice, rng)
        elif isinstance(entry, File):
            data = _content(entry, choice, rng)
            kept.names[name] = File(data, data)
    kept.durable = dict(kept.names)
    return kept


def _frozen(folder: Directory) -> frozenset[tuple[str, object]]:
    return frozenset(
        (name, entry.content if isinstance(entry, File) else _frozen(entry)) for name, entry in folder.names.items()
    )


def _content(file: File, choice: Choice, rng: random.Random) -> bytes:
    if file.durable == file.content:
        return file.content
    kind = rng.choice(("old", "new", "cut", "zeros")) if choice.content == "mixed" else choice.content
    if kind == "new":
        return file.content
    if kind == "old":
        return file.durable or b""
    synced = file.durable or b""
    if kind == "cut":
        return file.content[: max(len(synced), len(file.content) // 2)]
    # delayed allocation: the length is new, the sectors that were not written back are empty
    sectors = (slice(start, start + SECTOR_BYTES) for start in range(0, len(file.content), SECTOR_BYTES))
    return b"".join(
        file.content[part] if file.content[part] == synced[part] else bytes(len(file.content[part])) for part in sectors
    )
