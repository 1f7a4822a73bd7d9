"""Model bytes in clear exist in memfds, sockets and heaps alone: watched by strace, and searched for on the disk."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ota import delta
from ota.publisher.repository import Repository
from tests.demo.fleet import BIN, PARTS, Fleet
from tests.demo.observer import Observer

# what may carry plaintext: memfds, sockets and pipes have no place in a file system
_WRITE = re.compile(r"^\d+ +(?:write|pwrite64|writev|pwritev2?)\(\d+<([^>]*)>, (.*)$")
_SHARED_MAPPING = re.compile(r"mmap\([^)]*PROT_WRITE[^)]*MAP_SHARED[^)]*\d+<([^>]*)>")
_COPY = re.compile(r"(?:sendfile|copy_file_range|splice)\([^)]*<([^>]*)>")
_TRACE = "write,pwrite64,writev,pwritev,pwritev2,sendfile,copy_file_range,splice,mmap,clone,clone3,vfork,fork,execve"


def canaries(data: bytes, count: int = 48, size: int = 24) -> list[bytes]:
    """Stretches of `data` from all over it that are random enough to occur nowhere else."""
    step = max(1, (len(data) - size) // count)
    pieces = (data[i : i + size] for i in range(64, len(data) - size, step))
    return [piece for piece in pieces if len(set(piece)) > size // 2]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """HOME, TMPDIR and XDG folders of the device's processes."""
    folder = tmp_path / "home"
    (folder / "tmp").mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def start_traced(fleet: Fleet, home: Path, log: Path) -> subprocess.Popen[bytes]:
    """`edge-agent run` with every process it ever starts under strace."""
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp"), "XDG_CACHE_HOME": str(home)}
    what = ["-e", f"trace={_TRACE}", "-e", "signal=none"]
    command = ["strace", "-f", "-y", "-xx", "-s", "262144", *what, "-o", str(log)]
    return subprocess.Popen(
        [*command, str(BIN / "edge-agent"), "run", "--config", "agent.toml"],
        cwd=fleet.folder, env=environment, stdout=subprocess.DEVNULL, stderr=(fleet.folder / "agent.err").open("wb"),
        start_new_session=True,
    )  # fmt: skip


def secrets_of(fleet: Fleet) -> dict[str, list[bytes]]:
    """Canaries of both releases' models: in clear, compressed, and as the delta between them."""
    old = (PARTS / "1.0.0" / "int8.tflite").read_bytes()
    new = (PARTS / "1.1.0" / "int8.tflite").read_bytes()
    # stretches that both files share say nothing about the new one, and are found all the same
    found = {"1.0.0 in clear": canaries(old), "1.1.0 in clear": canaries(new)}
    for name, plain in (("1.0.0", old), ("1.1.0", new)):
        found[f"{name} compressed"] = canaries(delta.encode("zstd", plain, None))
    found["the delta"] = canaries(delta.encode("zstd-patch", new, old))
    releases = Repository.open(fleet.folder / "repo").releases("parts")
    golden = (fleet.folder / "repo" / "vault" / "plain" / releases[0].golden.plain_sha256).read_bytes()
    found["golden vectors"] = canaries(golden)
    assert all(len(pieces) >= 16 for pieces in found.values())
    return found


def files_below(*folders: Path) -> Iterator[Path]:
    """Every regular file below `folders`."""
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in names:
                path = Path(root) / name
                if path.is_file() and not path.is_symlink():
                    yield path


@pytest.mark.slow
@pytest.mark.fault("F56")
def test_no_model_byte_is_written_to_anything_but_a_memfd_or_a_socket(
    fleet: Fleet, observer: Observer, home: Path, tmp_path: Path
) -> None:
    if shutil.which("strace") is None:
        assert not os.environ.get("CI"), "strace is missing"
        pytest.skip("strace is not installed")
    shm_before = set(files_below(Path("/dev/shm")))
    log = tmp_path / "strace.log"
    traced = start_traced(fleet, home, log)
    try:
        fleet.grant("parts", "1.0.0")
        assert observer.update_ended("1.0.0", 120)["outcome"] == "committed"
        fleet.release(PARTS / "1.1.0" / "spec.toml")
        fleet.publish("parts", "1.1.0")
        fleet.grant("parts", "1.1.0")
        ended = observer.update_ended("1.1.0", 120)
        assert ended["outcome"] == "committed"
        assert ended["traffic"]["delta_bytes"] > 0
        worker = fleet.status()["lines"]["parts"]["worker_pid"]
        os.kill(worker, signal.SIGSEGV)  # a crash must not leave a core or a cache behind
        deadline = time.monotonic() + 60
        while fleet.status()["lines"]["parts"]["restarts"] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        writable = (fleet.folder / "state", fleet.folder / "run", home)
        on_disk = [*files_below(*writable), *(set(files_below(Path("/dev/shm"))) - shm_before)]
        pieces = secrets_of(fleet)
        assert any(path.suffix == ".cbs" for path in on_disk), "the store is empty: nothing was searched"
        for path in on_disk:
            data = path.read_bytes()
            leaked = [what for what, needles in pieces.items() if any(needle in data for needle in needles)]
            assert not leaked, f"{path} holds {leaked}"
    finally:
        os.killpg(traced.pid, signal.SIGTERM)
        try:
            traced.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(traced.pid, signal.SIGKILL)
            traced.wait()
    sealed = Repository.open(fleet.folder / "repo").releases("parts")[0].components[0].full
    control = canaries((fleet.folder / "repo" / "payloads" / sealed.sha256).read_bytes())
    assert read_trace(log, pieces, control) > 0, "the trace did not even see the ciphertext arrive: it proves nothing"


def read_trace(log: Path, pieces: dict[str, list[bytes]], control: list[bytes]) -> int:
    """Go through every write to a file; none may hold a canary. Returns how many hold one of `control`."""
    needles = {what: [piece.hex(":").encode() for piece in found] for what, found in pieces.items()}
    expected = [piece.hex(":").encode() for piece in control]
    seen = 0
    with log.open(errors="replace") as lines:
        for line in lines:
            mapping = _SHARED_MAPPING.search(line) or _COPY.search(line)
            if mapping:
                assert plain_path(mapping[1]).startswith(("/memfd:", "/dev/")), line[:300]
            match = _WRITE.match(line)
            path = plain_path(match[1]) if match else ""
            if match is None or not path.startswith("/") or path.startswith("/memfd:"):
                continue
            data = match[2].replace("\\x", ":").encode()
            hit = [what for what, found in needles.items() if any(needle in data for needle in found)]
            assert not hit, f"{hit} written to {path}"
            seen += any(needle in data for needle in expected)
    return seen


def plain_path(escaped: str) -> str:
    """A path as strace -xx writes it, readable."""
    return re.sub(r"\\x([0-9a-f]{2})", lambda m: chr(int(m[1], 16)), escaped)
