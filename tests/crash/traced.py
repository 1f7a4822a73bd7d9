"""Reads what strace saw of a process: every change it made to files, in order, and whether that follows the recipes.

Only threads of the first process count: what it starts (workers) is somebody else's.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

TRACED = (
    "open,openat,openat2,creat,rename,renameat,renameat2,link,linkat,symlink,symlinkat,mkdir,mkdirat,mknod,mknodat,"
    "unlink,unlinkat,rmdir,truncate,ftruncate,fsync,fdatasync,write,writev,pwrite64,pwritev,pwritev2,fallocate,"
    "copy_file_range,sendfile,clone,clone3,fork,vfork"
)
_LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+|\?)(.*)")
_UNFINISHED = re.compile(r"(\d+) +(.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)$")
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')
_FD = re.compile(r"^\d+<((?:[^>\\]|\\.)*)>")
_WRITING = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND")


@dataclass(frozen=True)
class Call:
    """One change: `open` (for writing), `write`, `fsync`, `rename`, `unlink`, `mkdir`, `truncate` or `link`."""

    name: str
    path: str
    to: str = ""


def calls_of(lines: Iterable[str], cwd: str) -> list[Call]:
    """The successful changes of the process whose first line is the first of a `strace -f -y` log."""
    ours: set[str] = set()
    found = []
    for thread, name, arguments, result in _joined(lines):
        if not ours:
            ours.add(thread)
        if thread not in ours or result.startswith("-") or result == "?":
            continue
        if name in ("clone", "clone3") and "CLONE_THREAD" in arguments:
            ours.add(result)
        elif (call := _call(name, arguments, cwd)) is not None:
            found.append(call)
    return found


def _joined(lines: Iterable[str]) -> Iterator[tuple[str, str, str, str]]:
    waiting: dict[str, str] = {}
    for line in lines:
        line = line.rstrip("\n")
        if match := _UNFINISHED.match(line):
            waiting[match[1]] = f"{match[1]} {match[2]}"
            continue
        if match := _RESUMED.match(line):
            line = waiting.pop(match[1], "") + match[2]
        if match := _LINE.match(line):
            yield match[1], match[2], match[3], match[4]


def _call(name: str, arguments: str, cwd: str) -> Call | None:
    texts = [posixpath.normpath(posixpath.join(cwd, text)) for text in _TEXT.findall(arguments)]
    fd = _FD.match(arguments)
    if name in ("open", "openat", "openat2", "creat"):
        return Call("open", texts[0]) if name == "creat" or _WRITING.search(arguments) else None
    if name.startswith("rename"):
        return Call("rename", texts[0], texts[1])
    if name.startswith(("link", "symlink")):
        return Call("link", texts[-1])
    if name.startswith(("mkdir", "mknod")):
        return Call("mkdir", texts[0])
    if name.startswith(("unlink", "rmdir")):
        return Call("unlink", texts[0])
    if name == "truncate":
        return Call("truncate", texts[0])
    if fd is None:
        return None
    kind = "fsync" if name in ("fsync", "fdatasync") else "truncate" if name == "ftruncate" else "write"
    return Call(kind, fd[1])


def changed(calls: Iterable[Call]) -> set[str]:
    """Paths that were opened for writing, made, renamed, cut or removed."""
    return {path for call in calls if call.name not in ("fsync", "write") for path in (call.path, call.to) if path}


def broken_recipes(calls: Iterable[Call], state: str, temporary: str, in_place: Iterable[re.Pattern[str]]) -> list[str]:
    """What does not follow a recipe of fsops below the directory `state`.

    A file is written under a name with the suffix `temporary`, synced, renamed and its directory synced before the next
    rename into it; a file that matches `in_place` is written where it is, and synced before it is read for good: before
    it is removed, or at the end.
    """
    problems = []
    dirty: set[str] = set()
    unsynced: dict[str, str] = {}
    for call in calls:
        if not call.path.startswith(state + "/") and call.path != state:
            continue
        if call.name == "write":
            if not call.path.endswith(temporary) and not any(p.fullmatch(call.path) for p in in_place):
                problems.append(f"{call.path} is written in place")
            dirty.add(call.path)
        elif call.name == "fsync":
            dirty.discard(call.path)
            unsynced.pop(call.path, None)
        elif call.name == "rename":
            folder = posixpath.dirname(call.to)
            if call.path != call.to + temporary:
                problems.append(f"{call.path} is renamed to {call.to}")
            if call.path in dirty:
                problems.append(f"{call.path} is renamed before it was synced")
            if folder in unsynced:
                problems.append(f"{unsynced[folder]} was renamed and {folder} not synced since")
            unsynced[folder] = call.to
        elif call.name == "mkdir":
            unsynced[posixpath.dirname(call.path)] = call.path
        elif call.name == "unlink":
            dirty.discard(call.path)
        elif call.name == "link":
            problems.append(f"{call.path} is a link")
    problems += [f"{path} was never synced" for path in sorted(dirty)]
    return problems + [f"{path} was renamed and its directory never synced" for path in unsynced.values()]
