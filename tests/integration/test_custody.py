"""The keys of a real device: refused when others could have had them, rotated while it serves, gone after a wipe."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ota.client import keyring, sealed
from ota.client.fsops import Fs
from ota.client.keyring import Keyring
from ota.payload import key_id
from tests.demo.observer import Observer
from tests.fakes.broker import Broker
from tests.integration.console import Device, did, make_fleet, refused, run, unchanged, until, watching
from tests.vectors import decryptor

KEYS = ("storage.key", "hpke.key", "device.key")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, repository: Path, clip: Path) -> Iterator[Device]:
    """Serves parts 1.0.0; each test leaves it so."""
    if not Broker.available():
        pytest.skip("mosquitto is not installed")
    fleet, made = make_fleet(tmp_path_factory.mktemp("custody"), repository, clip)
    try:
        # one that nobody answers for: without any no key is rotated that the operator has to learn of
        bundle = made.state / "enrolment" / "bundle.json"
        bundle.write_text(json.dumps({**json.loads(bundle.read_text()), "renewal": "https://127.0.0.1:1"}))
        made.start()
        made.assign("1.0.0")
        until("serving 1.0.0", lambda: made.serving()["committed"] == "1.0.0")
        yield made
    finally:
        fleet.stop()


@pytest.fixture(scope="module")
def observer(device: Device) -> Iterator[Observer]:
    """Hears what the device says."""
    with watching(device.fleet) as seen:
        yield seen


def keys(device: Device, *words: str) -> dict[str, Any]:
    """What `edge-agent keys` answers."""
    out = did("edge-agent", "keys", *words, "--json", "--config", "agent.toml", folder=device.fleet.folder)
    answer: dict[str, Any] = json.loads(out)
    return answer


def ring_of(device: Device) -> keyring.Ring:
    """The ring on the disk, read from a copy: who opens a ring also mends it, which beside a daemon that is saving
    would put the old one back."""
    keys = device.state / "keys"
    with tempfile.TemporaryDirectory() as copy:
        (Path(copy) / "keys").mkdir()
        (Path(copy) / keyring.RING).write_bytes((device.state / keyring.RING).read_bytes())
        return Keyring(Fs(Path(copy)), (keys / "storage.key").read_bytes()).ring


def seals_of(device: Device) -> set[str]:
    """Ids of the keys that the device's model files are sealed under."""
    found = set()
    for path in (device.state / "store").glob("*.cbs"):
        data = path.read_bytes()
        found.add(sealed.parse(data[: sealed.HEADER_BYTES], b"EDGECBS\n", len(data)).key_id)
    return found


def committed_of(device: Device) -> str:
    """The release that the device is committed to; there is always one."""
    version: str = device.serving()["committed"]
    assert version, device.ask()
    return version


# --- refused ----------------------------------------------------------------------------------------------------------


def _replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _folder_linked(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to("elsewhere")


UNSAFE: dict[str, tuple[Callable[[Path], object], str]] = {
    "world-readable": (lambda p: p.chmod(0o604), "mode 0604"),
    "group-readable": (lambda p: p.chmod(0o640), "mode 0640"),
    "group-writable": (lambda p: p.chmod(0o620), "mode 0620"),
    "link": (_linked, "symbolic links"),
    "link to nowhere": (lambda p: _replaced(p, lambda q: q.symlink_to("nowhere")), "symbolic links"),
    "FIFO": (lambda p: _replaced(p, lambda q: os.mkfifo(q, 0o600)), "not a plain file"),
    "directory": (lambda p: _replaced(p, lambda q: q.mkdir(0o700)), "not a plain file"),
    "device node": (lambda p: _replaced(p, lambda q: os.mknod(q, 0o20600, os.makedev(1, 5))), "not a plain file"),
    "empty": (lambda p: p.write_bytes(b""), "holds 0 bytes"),
    "short": (lambda p: p.write_bytes(p.read_bytes()[:31]), "holds 31 bytes"),
    "long": (lambda p: p.write_bytes(p.read_bytes() + bytes(9000)), "bytes"),
    "zeros": (lambda p: p.write_bytes(bytes(p.stat().st_size)), "overwritten with zeros"),
    "other owner": (lambda p: os.chown(p, 65534, 65534), "user 65534"),
    "open folder": (lambda p: p.parent.chmod(0o750), "mode 0750"),
    "linked folder": (_folder_linked, "not a folder"),
    "folder of another": (lambda p: os.chown(p.parent, 65534, -1), "user 65534"),
}
NEEDS_ROOT = ("other owner", "folder of another", "device node")


@pytest.mark.fault("F53")
@pytest.mark.parametrize("how", UNSAFE)
def test_a_daemon_does_not_start_with_a_key_that_others_could_have_had(
    device: Device, how: str, tmp_path: Path
) -> None:
    if how in NEEDS_ROOT and os.geteuid() != 0:
        pytest.skip("needs root")
    spoil, words = UNSAFE[how]
    twin = device.twin(tmp_path)
    name = KEYS[list(UNSAFE).index(how) % 3]
    secrets = [(twin.state / "keys" / key).read_bytes() for key in KEYS]
    spoil(twin.state / "keys" / name)
    with unchanged(twin.state / "store", twin.state / "state"):
        told = refused("edge-agent", "run", "--config", "agent.toml", folder=tmp_path)
    assert (told.reason, told.done.code) == ("key_unsafe", 77)
    assert words in told.message
    assert str(twin.state / "keys") in told.message
    shown = told.done.out + told.done.err
    for secret in secrets:
        assert secret.hex()[:16] not in shown
        assert secret[:16].decode("latin-1") not in shown.replace("-----BEGIN PRIV", "")


# --- rotated ----------------------------------------------------------------------------------------------------------


def test_the_storage_key_is_rotated_while_the_device_serves(device: Device, observer: Observer) -> None:
    before, custody = keys(device, "show"), (device.state / "keys" / "storage.key").read_bytes()
    assert sealed.key_id(custody) not in before["storage"], "models are sealed under the root secret itself"
    (old,) = before["storage"]
    assert seals_of(device) == {old}
    pid, answered = device.serving()["worker_pid"], device.serving()["results"]
    rotated = keys(device, "rotate")
    assert rotated["files"] == before["storage"][old]["files"] == len(list((device.state / "store").glob("*.cbs")))
    assert keys(device, "show")["storage"] == {rotated["storage"]: {"files": rotated["files"], "current": True}}
    assert seals_of(device) == {rotated["storage"]} != {old}
    until("more results", lambda: device.serving()["results"] > answered + 10)
    assert device.serving()["worker_pid"] == pid
    assert device.serving()["restarts"] == 0
    observer.wait("the event", lambda: [e for e in observer.events if e["kind"] == "keys"], 60)
    (ring,) = ring_of(device).storage
    for path in (device.state / "store").glob("*.cbs"):
        decryptor.store_file(path.read_bytes(), [ring], path.stem)
    device.stop()
    device.start("1.0.0")


def test_keys_are_rotated_beside_a_daemon_that_does_not_run(device: Device, tmp_path: Path) -> None:
    twin = device.twin(tmp_path)
    (old,) = keys(twin, "show")["storage"]
    rotated = keys(twin, "rotate", "--storage", "--hpke")
    assert seals_of(twin) == {rotated["storage"]} != {old}
    shown = keys(twin, "show")
    assert shown["hpke"][0] == rotated["hpke"]
    assert len(shown["hpke"]) == 2
    secrets = [*ring_of(twin).storage, *ring_of(twin).hpke]
    assert not any(secret.hex() in json.dumps(shown) + json.dumps(rotated) for secret in secrets)


@pytest.mark.fault("F51")
def test_a_grant_for_the_key_before_the_last_rotation_still_opens(device: Device, observer: Observer) -> None:
    enrolled = X25519PrivateKey.from_private_bytes((device.state / "keys" / "hpke.key").read_bytes())
    kid = key_id(enrolled.public_key().public_bytes_raw())
    rotated = keys(device, "rotate", "--hpke")
    assert keys(device, "show")["hpke"] == [rotated["hpke"], kid]
    # the operator does not know the new key yet, and so the device makes no further one
    words = ("keys", "rotate", "--hpke", "--config", "agent.toml")
    assert refused("edge-agent", *words, folder=device.fleet.folder).reason == "busy"
    assert device.install(observer, "1.1.0")["outcome"] == "committed"
    device.stop()
    device.start("1.1.0")


def test_a_cut_rotation_is_ended_by_the_next_start(device: Device, tmp_path: Path) -> None:
    twin = device.twin(tmp_path)
    ring = Keyring(Fs(twin.state), (twin.state / "keys" / "storage.key").read_bytes())
    ring.save(ring.ring.with_storage_key(b"n" * 32))
    old = seals_of(twin)
    try:
        twin.start()
        until("the end of the rotation", lambda: seals_of(twin) == {sealed.key_id(b"n" * 32)})
        until("a ring without the old key", lambda: len(ring_of(twin).storage) == 1)
    finally:
        twin.fleet.stop()
    assert old != seals_of(twin)


def test_options_that_do_not_fit_and_sealing_without_a_credential_are_refused(device: Device) -> None:
    for words in (("show", "--storage"), ("rotate", "--keep-tls"), ("seal", "--hpke")):
        told = refused("edge-agent", "keys", *words, "--config", "agent.toml", folder=device.fleet.folder)
        assert told.reason == "bad_usage"
    told = refused("edge-agent", "keys", "seal", "--config", "agent.toml", folder=device.fleet.folder)
    assert told.reason == "bad_usage"
    assert "LoadCredentialEncrypted" in told.hint


# --- lost -------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F54")
def test_without_its_sealed_key_a_device_calls_home_and_serves_and_harms_nothing(
    device: Device, observer: Observer, tmp_path: Path
) -> None:
    committed = committed_of(device)
    seen = len(observer.events)
    device.stop()
    shutil.copytree(device.state / "keys", tmp_path / "keys")
    (device.state / "keys" / "sealed").write_text("storage.key\nhpke.key\n")
    for name in ("storage.key", "hpke.key"):
        (device.state / "keys" / name).unlink()
    with unchanged(device.state / "store", device.state / "releases", device.state / "keys"):
        device.start()
        told = observer.wait("the alarm", lambda: [e for e in observer.events[seen:] if e["kind"] == "keys"], 60)
        assert (told[0]["state"], told[0]["reason"]) == ("unavailable", "sealed_key_unavailable")
        assert device.condition("KeysAvailable", "sealed_key_unavailable")["status"] == "False"
        until("the link", lambda: device.ask()["link"]["state"] == "connected")
        device.look()
        time.sleep(1)
        assert device.serving()["version"] == ""
        assert device.serving()["committed"] == committed
        words = ("keys", "rotate", "--config", "agent.toml")
        assert refused("edge-agent", *words, folder=device.fleet.folder).reason == "sealed_key_unavailable"
        device.stop()
    shutil.rmtree(device.state / "keys")
    shutil.copytree(tmp_path / "keys", device.state / "keys")
    device.start(committed)


@pytest.mark.fault("F54")
def test_another_devices_root_secret_opens_nothing_and_costs_nothing(device: Device, tmp_path: Path) -> None:
    twin = device.twin(tmp_path)
    own = (twin.state / "keys" / "storage.key").read_bytes()
    (twin.state / "keys" / "storage.key").write_bytes(b"x" * 32)
    try:
        with unchanged(twin.state / "store", twin.state / "releases"):
            twin.start()
            assert twin.condition("KeysAvailable", "sealed_key_unavailable")
            assert twin.serving()["version"] == ""
            twin.stop()
        (twin.state / "keys" / "storage.key").write_bytes(own)
        twin.start(committed_of(device))
    finally:
        twin.fleet.stop()


def test_a_damaged_ring_is_told_and_the_models_come_again(device: Device, observer: Observer) -> None:
    committed = committed_of(device)
    seen = len(observer.events)
    device.stop()
    for name in ("ring.cbs", "ring.copy.cbs"):
        path = device.state / "keys" / name
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    device.start(committed)
    until("the end of the update", lambda: device.serving()["committed"] == committed)
    told = [e for e in observer.events[seen:] if e["kind"] == "keys" and e["state"] == "unavailable"]
    assert [e["reason"] for e in told] == ["keyring_corrupt"]
    assert "lost" in told[0]["message"]
    device.stop()
    seen = len(observer.events)
    device.start(committed)
    assert [e for e in observer.events[seen:] if e["kind"] == "keys" and e["state"] == "unavailable"] == []


# --- dumped -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dumping() -> Iterator[None]:
    """Whatever starts now may write core files, as large as it likes; proved by one that does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard != resource.RLIM_INFINITY and os.geteuid() != 0:
        pytest.skip("core files are forbidden here")
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        with tempfile.TemporaryDirectory() as folder:
            child = os.spawnv(
                os.P_NOWAIT, sys.executable, [sys.executable, "-c", f"import os; os.chdir({folder!r}); os.abort()"]
            )
            _, status = os.waitpid(child, 0)
        if not os.WCOREDUMP(status):
            pytest.skip("this kernel writes no core files here")
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


@pytest.mark.fault("F55")
def test_no_core_is_written_when_daemon_and_worker_crash(device: Device, dumping: None, tmp_path: Path) -> None:
    committed = committed_of(device)
    device.stop()
    twin = device.twin(tmp_path)
    ring = ring_of(twin)
    try:
        pid = twin.start(committed)
        worker = until("a worker", lambda: twin.serving()["worker_pid"])
        os.kill(worker, signal.SIGSEGV)
        until("another worker", lambda: twin.serving()["worker_pid"] not in (0, worker))
        os.kill(pid, signal.SIGSEGV)
        assert twin.fleet.agent is not None
        # the status that the shell would call "core dumped" has a bit that subprocess hides
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGSEGV
        assert not os.WCOREDUMP(status)
    finally:
        twin.fleet.agent = None
        twin.fleet.stop()
    everything = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in everything if path.name.startswith("core")] == []
    secrets = [*ring.storage, *ring.hpke]
    assert [path for path in everything if any(key in path.read_bytes() for key in secrets)] == [
        twin.state / "keys" / "hpke.key"
    ]
    device.start(committed)


# --- wiped ------------------------------------------------------------------------------------------------------------


def test_after_a_wipe_nothing_in_the_state_directory_opens(device: Device, tmp_path: Path) -> None:
    twin = device.twin(tmp_path)
    ring = ring_of(twin)
    secrets = [*ring.storage, *ring.hpke, *((twin.state / "keys" / name).read_bytes() for name in KEYS)]
    models = list((twin.state / "store").glob("*.cbs"))
    for path in models:
        decryptor.store_file(path.read_bytes(), list(ring.storage), path.stem)  # before, it does
    keyring.wipe(Fs(twin.state))
    everything = {path: path.read_bytes() for path in twin.state.rglob("*") if path.is_file()}
    for path, data in everything.items():
        assert not any(secret in data for secret in secrets), path
    # whoever tries each 32 bytes that are left as a key
    tried = {data[i : i + 32] for data in everything.values() for i in range(0, max(1, len(data) - 31), 8)}
    ids = {sealed.key_id(key): key for key in tried if len(key) == 32}
    assert not ids.keys() & seals_of(twin)
    told = refused("edge-agent", "run", "--config", "agent.toml", folder=tmp_path)
    assert told.reason == "keys_wiped"
    assert run("edge-agent", "keys", "show", "--config", "agent.toml", folder=tmp_path).code != 0
