"""The daemon as a process: one `Device` from its start to a signal, or for a single sideload beside a dead daemon."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.app import Device
from agent.config import Config
from agent.daemon import reset, revoked, settings
from agent.daemon.askers import Asker
from agent.daemon.lock import become_owner, locked
from agent.daemon.memory import keep_private
from agent.daemon.rotation import Rotation
from agent.daemon.tasks import cancelled
from agent.errors import AgentError, ControlError, Reason
from ota.client.configuration import Configuration
from ota.client.fsops import Fs
from ota.client.journal import Journal
from ota.errors import StoreError

log = logging.getLogger(__name__)

EXIT_SOFTWARE = 70


def run_daemon(config: Config, environment: Mapping[str, str], host_command: Sequence[str] | None = None) -> int:
    """Run the daemon until SIGTERM or SIGINT; returns its exit code.

    Raises:
        AgentError: it cannot start.
    """
    keep_private()
    if config.worker_python is not None:
        from agent.daemon.interpreter import check_interpreter  # memory that few daemons need

        check_interpreter(config.worker_python)
    with locked(config.state_dir):
        reset.finish(config.state_dir)
        code: int | None = None
        if not revoked.is_marked(config.state_dir):
            code = asyncio.run(_serve(config, environment, host_command))
        if code is None and revoked.is_marked(config.state_dir):
            code = asyncio.run(_serve_revoked(config, environment))
        # a reset ends the process: what comes next begins without anything of this life in its memory
        done = reset.finish(config.state_dir)
        # who left without a mark could not write it: the next start meets the same word again
        return 0 if done else EXIT_SOFTWARE if code is None else code


async def _serve(own: Config, environment: Mapping[str, str], host_command: Sequence[str] | None) -> int | None:
    """One daemon after the other, as long as settings want another one; None when it left for good."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    own_sha256, restarted = settings.file_sha256(own), True
    untold: tuple[settings.Event, ...] = ()
    while True:
        chosen = _choose(own, own_sha256, restarted)
        chosen = replace(chosen, news=(*untold, *chosen.news))
        restarted, untold = False, ()
        try:
            device = Device(chosen.config, environment, host_command=host_command, chosen=chosen)
            await _live(device, stop)
        except AgentError as e:
            if not chosen.trial:
                raise
            untold = (*chosen.news, *settings.take_back(_kept(own), e))
            continue
        if device.failed.is_set() or not device.anew.is_set() or stop.is_set():
            if device.lifecycle.leaving.is_set() and not stop.is_set():
                return None
            return EXIT_SOFTWARE if device.failed.is_set() else 0
        untold = device.settings.untold


def _choose(own: Config, own_sha256: str, restarted: bool) -> settings.Chosen:
    """What to run with now. A disk that refuses puts a trial off and keeps no device from serving."""
    kept = _kept(own)
    try:
        return settings.choose(own, own_sha256, kept, settings.MAX_ATTEMPTS, restarted=restarted)
    except StoreError as e:
        log.error("settings: %s", e.message, extra={"reason": e.reason.value, "hint": e.hint})
    # a person's change of the file wins, noted or not
    used = settings.in_force(own, kept) if kept.record.file == own_sha256 else own
    return settings.Chosen(own, own_sha256, used, "" if used is own else kept.record.active)


async def _serve_revoked(config: Config, environment: Mapping[str, str]) -> int:
    # a cut may have come between the mark and the end of the keys
    revoked.wipe(config.state_dir)
    await revoked.RevokedDevice(config, environment).serve()
    return 0


async def _live(device: Device, stop: asyncio.Event) -> None:
    """Run `device` until it is told to stop, has failed, or is to start anew."""
    starting = asyncio.create_task(device.start(), name="start")
    ends = [asyncio.create_task(event.wait()) for event in (stop, device.failed, device.anew, device.lifecycle.leaving)]
    await asyncio.wait((starting, *ends), return_when=asyncio.FIRST_COMPLETED)
    try:
        if starting.done():
            starting.result()
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancelled([starting, *ends])
        await device.stop()


def _kept(own: Config) -> Configuration:
    """The record of the settings while no daemon runs; the next one opens the journal itself."""
    fs = Fs(own.state_dir)
    return Configuration(fs, Journal(fs))


def config_once(config: Config, text: str | None) -> dict[str, Any]:
    """Show which settings are in force, or put others on trial, while no daemon runs.

    Raises:
        AgentError, OtaError: they cannot be used, or the disk refuses.
    """
    become_owner(config.state_dir)
    with locked(config.state_dir):
        _refuse_revoked(config.state_dir)
        kept = _kept(config)
        if text is None:
            return settings.show(config, kept)
        return {"state": "trial at the next start", "sha256": settings.propose_beside(config, kept, text)}


def reset_once(config: Config, *, owner: bool) -> None:
    """Reset this device while no daemon runs.

    Raises:
        AgentError, OtaError: it is not finished; the next start goes on with it.
    """
    become_owner(config.state_dir)
    with locked(config.state_dir):
        reset.begin(config.state_dir, owner=owner)
        reset.finish(config.state_dir)


def sideload_once(
    config: Config, environment: Mapping[str, str], path: Path, asker: Asker, *, allow_expired: bool = False
) -> dict[str, str]:
    """Install from a directory or zip while no daemon runs, and leave nothing running.

    Raises:
        AgentError, OtaError: nothing was installed.
    """
    become_owner(config.state_dir)
    return asyncio.run(sideload_beside(config, environment, path, asker, allow_expired=allow_expired))


async def sideload_beside(
    config: Config, environment: Mapping[str, str], path: Path, asker: Asker, *, allow_expired: bool
) -> dict[str, str]:
    """As `sideload_once`, in a loop that runs already, as the user whose state it is."""
    import tempfile  # memory that the daemon does not need

    # the service's run directory went with it, and the workers' unit waits for a daemon there
    with locked(config.state_dir), tempfile.TemporaryDirectory(prefix="edge-sideload-") as run_dir:
        reset.finish(config.state_dir)
        _refuse_revoked(config.state_dir)
        # what serves after it is what served before: settings in force count here too
        used = replace(settings.in_force(config, _kept(config)), workers="process", run_dir=Path(run_dir))
        device = Device(used, environment, online=False)
        try:
            await device.start()
            return await device.sideload(path, asker, allow_expired=allow_expired)
        finally:
            await device.stop()


def _refuse_revoked(state_dir: Path) -> None:
    """Nothing is done with an expelled device, whose keys a cut may have spared.

    Raises:
        ControlError: `device_revoked`.
    """
    if revoked.is_marked(state_dir):
        revoked.wipe(state_dir)
        raise ControlError(Reason.DEVICE_REVOKED, "this device was revoked by its operator", hint=revoked.HINT)


def keys_once(
    config: Config, environment: Mapping[str, str], action: str, *, storage: bool, hpke: bool, keep_tls: bool
) -> dict[str, Any]:
    """Show, rotate or seal the keys while no daemon runs.

    Raises:
        AgentError, OtaError: they cannot be opened, or the disk refuses.
    """
    become_owner(config.state_dir)
    keep_private()
    with locked(config.state_dir):
        _refuse_revoked(config.state_dir)
        rotation = Rotation.beside(config.state_dir, environment)
        if action == "show":
            return asyncio.run(rotation.show())
        if action == "seal":
            return asyncio.run(rotation.seal(keep_tls=keep_tls))
        return asyncio.run(rotation.rotate(storage=storage, hpke=hpke))
