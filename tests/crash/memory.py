"""A disk in memory that forgets what was not made durable, and that can be left in any state a power cut may leave.

It has the methods of `ota.client.fsops.Disk`. The model is what POSIX grants and no more: the content of a file is
durable up to its last fsync, the names in a directory up to its last fsync_dir. Between those points every write may be
lost, kept, torn or zero-filled and every name may have any of the meanings it had since, each independently of all
others and of the order of the calls. A rename may have happened at one of its two ends alone.
Not here: what is right to find afterwards (`scene`).
"""

from __future__ import annotations

import enum
import errno
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ota.client import fsops

CAPACITY_BYTES = 1 << 30
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Fate(enum.Enum):
    """What became of one write that was not synced."""

    LOST = "lost"
    KEPT = "kept"
    TORN = "torn"
    ZEROS = "zeros"


@dataclass(frozen=True)
class Write:
    """Bytes at an offset; with `data` None the file was cut to `offset` bytes."""

    offset: int
    data: bytes | None

    def fates(self, synced_length: int) -> tuple[Fate, ...]:
        """Of a file that is durable up to `synced_length` bytes: only space that is new can come back as zeros."""
        if self.data is None or len(self.data) < 2:
            return (Fate.LOST, Fate.KEPT)
        if self.offset + len(self.data) <= synced_length:
            return (Fate.LOST, Fate.KEPT, Fate.TORN)
        return (Fate.LOST, Fate.KEPT, Fate.TORN, Fate.ZEROS)

    def applied(self, content: bytes, fate: Fate) -> bytes:
        """`content` after the write met its fate."""
        if fate is Fate.LOST:
            return content
        if self.data is None:
            return content[: self.offset].ljust(self.offset, b"\0")
        data = self.data
        if fate is Fate.TORN:
            data = data[: len(data) // 2]
        elif fate is Fate.ZEROS:
            known = content[self.offset : self.offset + len(data)]
            data = known.ljust(len(data), b"\0")
        content = content.ljust(self.offset, b"\0")
        return content[: self.offset] + data + content[self.offset + len(data) :]


@dataclass(eq=False)
class File:
    """`pending` are the writes since the last fsync, oldest first; `durable` is the content before them."""

    content: bytes = b""
    durable: bytes = b""
    pending: list[Write] = field(default_factory=list)


@dataclass(eq=False)
class Directory:
    """`pending` are the names set (or, None, removed) since the last fsync_dir, oldest first."""

    names: dict[str, File | Directory] = field(default_factory=dict)
    durable: dict[str, File | Directory] = field(default_factory=dict)
    pending: list[tuple[str, File | Directory | None]] = field(default_factory=list)

    def set(self, name: str, entry: File | Directory | None) -> None:
        """Give `name` a new meaning, not durable yet."""
        self.names.pop(name, None)
        if entry is not None:
            self.names[name] = entry
        self.pending.append((name, entry))

    def meanings(self, name: str) -> list[File | Directory | None]:
        """Everything that `name` may mean after a cut, the durable meaning first and the newest last."""
        durable, newest = self.durable.get(name), self.names.get(name)
        between = [entry for changed, entry in self.pending if changed == name and entry not in (durable, newest)]
        return [durable, *dict.fromkeys(between), *([newest] if between or newest is not durable else [])]


Durable = tuple[str, str]
"""A call that makes something durable and the kind of path it is made for, as `("fsync", "store/*.cbs")`."""


class MemoryDisk(fsops.Disk):
    """Args:
    lies: a durable call that is answered and not done: a disk that lies, or a programmer who forgot it.
    on_call: told before every call that changes something.
    """

    def __init__(self, lies: Durable | None = None, on_call: Callable[[], None] | None = None) -> None:
        self.root = Directory()
        self.lies = lies
        self.on_call = on_call
        self.capacity_bytes = CAPACITY_BYTES
        self.most_bytes = 0
        self.synced: Counter[Durable] = Counter()

    # -- system calls --------------------------------------------------------------------------------------------------

    def mkdir(self, path: str) -> None:
        self._called()
        folder, name = self._parent(path)
        if name in folder.names:
            raise FileExistsError(errno.EEXIST, "exists")
        folder.set(name, Directory())

    def write(self, path: str, offset: int, data: bytes) -> None:
        self._called()
        folder, name = self._parent(path)
        if name not in folder.names:
            folder.set(name, File())
        file = folder.names[name]
        assert isinstance(file, File)
        if self.used_bytes() + max(0, offset + len(data) - len(file.content)) > self.capacity_bytes:
            raise OSError(errno.ENOSPC, "full")
        self._write(file, Write(offset, bytes(data)))

    def truncate(self, path: str, length: int) -> None:
        self._called()
        self._write(self._file(path), Write(length, None))

    def fsync(self, path: str) -> None:
        self._called()
        if self._honest("fsync", path):
            file = self._file(path)
            file.durable = file.content
            file.pending = []

    def fsync_dir(self, path: str) -> None:
        self._called()
        if self._honest("fsync_dir", path):
            folder = self.root if path == "." else self._at_path(path)
            assert isinstance(folder, Directory)
            folder.durable = dict(folder.names)
            folder.pending = []

    def rename(self, source: str, destination: str) -> None:
        self._called()
        file = self._file(source)
        folder, name = self._parent(source)
        folder.set(name, None)
        folder, name = self._parent(destination)
        folder.set(name, file)

    def unlink(self, path: str) -> None:
        self._file(path)
        self._called()
        folder, name = self._parent(path)
        folder.set(name, None)

    def read(self, path: str, offset: int, length: int) -> bytes:
        return self._file(path).content[offset : offset + length]

    def size(self, path: str) -> int:
        return len(self._file(path).content)

    def allocated(self, path: str) -> int:
        return self.size(path)

    def names(self, path: str) -> list[str]:
        folder = self._at_path(path)
        assert isinstance(folder, Directory)
        return list(folder.names)

    def free_bytes(self) -> int:
        return max(0, self.capacity_bytes - self.used_bytes())

    # -- looking at it -------------------------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """Bytes of every file that has a name."""
        return sum(len(file.content) for _, file in self.files())

    def files(self) -> Iterator[tuple[str, File]]:
        """Every file with its path."""
        yield from _files(self.root, "")

    def settle(self) -> None:
        """Time passes: the kernel writes back whatever was not synced."""
        for folder in _folders(self.root):
            folder.durable, folder.pending = dict(folder.names), []
        for _, file in self.files():
            file.durable, file.pending = file.content, []

    def snapshot(self) -> MemoryDisk:
        """As it is now, with what is durable and what is not."""
        disk = MemoryDisk()
        disk.root = _copied(self.root, {})
        disk.capacity_bytes = self.capacity_bytes
        return disk

    def fingerprint(self) -> int:
        """Equal for equal trees."""
        return hash(frozenset((path, file.content) for path, file in self.files()))

    def after_cut(self, picks: tuple[int, ...] | None = None) -> MemoryDisk:
        """What is on the disk after the power came back, everything on it durable; without `picks` nothing that was
        not synced survived."""
        possible = Possibilities(self)
        return possible.disk(picks or (0,) * len(possible.options))

    # ------------------------------------------------------------------------------------------------------------------

    def _write(self, file: File, write: Write) -> None:
        file.content = write.applied(file.content, Fate.KEPT)
        file.pending.append(write)
        self.most_bytes = max(self.most_bytes, self.used_bytes())

    def _called(self) -> None:
        if self.on_call is not None:
            self.on_call()

    def _honest(self, call: str, path: str) -> bool:
        durable = (call, kind_of(path))
        self.synced[durable] += 1
        return durable != self.lies

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


def kind_of(path: str) -> str:
    """The path with what differs from file to file left out: `store/*.cbs`, `state/record.*`, `trust/*/*.json`."""
    path = _SHA256.sub("*", path.removesuffix(fsops.TEMPORARY_SUFFIX))
    folder, _, name = path.partition("/")
    if folder == "trust" and name:
        return "trust/*" + "/*.json" * ("/" in name)
    return "state/record.*" if path in ("state/record.a", "state/record.b") else path


class Possibilities:
    """Everything that a cut may leave of one disk: the product of independent choices.

    Attributes:
        options: how many outcomes each choice has; outcome 0 is "nothing of it survived".
    """

    def __init__(self, disk: MemoryDisk) -> None:
        self._disk = disk
        self._names: dict[tuple[int, str], list[File | Directory | None]] = {}
        self._writes: dict[int, list[tuple[Fate, ...]]] = {}
        self._walk(disk.root)
        self.options = [len(meanings) for meanings in self._names.values()]
        self._first_write = len(self.options)
        self.options += [len(fates) for fates_of in self._writes.values() for fates in fates_of]

    @property
    def count(self) -> int:
        """States that may be left, some of them alike."""
        return math.prod(self.options)

    def picks(self, bound: int, seed: int) -> Iterator[tuple[int, ...]]:
        """All states when there are at most `bound`; else `bound` of them: the extremes, writes that survived up to one
        of them, each choice turned alone against either extreme, and the rest at random by `seed`."""
        if self.count <= bound:
            yield from itertools.product(*(range(options) for options in self.options))
            return
        found = dict.fromkeys(itertools.islice(self._notable(), bound))
        rng = random.Random(seed)
        while len(found) < bound:
            found[tuple(rng.randrange(options) for options in self.options)] = None
        yield from found

    def disk(self, picks: tuple[int, ...]) -> MemoryDisk:
        """The disk of one state."""
        chosen = iter(picks)
        names = {key: meanings[next(chosen)] for key, meanings in self._names.items()}
        fates = {key: [fate[next(chosen)] for fate in fates_of] for key, fates_of in self._writes.items()}
        left = MemoryDisk()
        left.capacity_bytes = self._disk.capacity_bytes
        left.root = _survivor(self._disk.root, names, fates, {})
        return left

    def _notable(self) -> Iterator[tuple[int, ...]]:
        names, writes = self.options[: self._first_write], self.options[self._first_write :]
        old, new = tuple(0 for _ in names), tuple(options - 1 for options in names)
        for chosen in (new, old):
            # the order of `Fate`: lost, kept, torn, zeros
            for fate in (1, 0, 3, 2):
                yield (*chosen, *(min(fate, options - 1) for options in writes))
        # what was written first survived, the rest did not: what a disk does that keeps its order
        for survived in range(1, len(writes)):
            yield (*new, *(1 for _ in writes[:survived]), *(0 for _ in writes[survived:]))
        kept = (*new, *(1 for _ in writes))
        for position, options in enumerate(self.options):
            yield (*kept[:position], 0, *kept[position + 1 :])
            for option in range(1, options):
                yield (*(0 for _ in kept[:position]), option, *(0 for _ in kept[position + 1 :]))

    def _walk(self, entry: File | Directory) -> None:
        if isinstance(entry, File):
            if entry.pending:
                self._writes[id(entry)] = [write.fates(len(entry.durable)) for write in entry.pending]
            return
        for name in sorted({*entry.names, *entry.durable, *(name for name, _ in entry.pending)}):
            meanings = entry.meanings(name)
            if len(meanings) > 1:
                self._names[id(entry), name] = meanings
            for meaning in meanings:
                if meaning is not None:
                    self._walk(meaning)


def _survivor(
    folder: Directory,
    names: dict[tuple[int, str], File | Directory | None],
    fates: dict[int, list[Fate]],
    made: dict[int, File],
) -> Directory:
    kept = Directory()
    for name in sorted({*folder.names, *folder.durable, *(name for name, _ in folder.pending)}):
        entry = names.get((id(folder), name), folder.names.get(name))
        if isinstance(entry, Directory):
            kept.names[name] = _survivor(entry, names, fates, made)
        elif isinstance(entry, File):
            # a file may be found under both of its names: it is still one file
            if id(entry) not in made:
                content = entry.durable
                for write, fate in zip(entry.pending, fates.get(id(entry), []), strict=True):
                    content = write.applied(content, fate)
                made[id(entry)] = File(content, content)
            kept.names[name] = made[id(entry)]
    kept.durable = dict(kept.names)
    return kept


def _copied(folder: Directory, made: dict[int, File | Directory]) -> Directory:
    def copied(entry: File | Directory) -> File | Directory:
        if id(entry) not in made:
            if isinstance(entry, Directory):
                return _copied(entry, made)
            made[id(entry)] = File(entry.content, entry.durable, list(entry.pending))
        return made[id(entry)]

    copy = Directory()
    made[id(folder)] = copy
    copy.names = {name: copied(entry) for name, entry in folder.names.items()}
    copy.durable = {name: copied(entry) for name, entry in folder.durable.items()}
    copy.pending = [(name, None if entry is None else copied(entry)) for name, entry in folder.pending]
    return copy


def _files(folder: Directory, prefix: str) -> Iterator[tuple[str, File]]:
    for name, entry in folder.names.items():
        if isinstance(entry, Directory):
            yield from _files(entry, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", entry


def _folders(folder: Directory) -> Iterator[Directory]:
    yield folder
    for entry in folder.names.values():
        if isinstance(entry, Directory):
            yield from _folders(entry)
