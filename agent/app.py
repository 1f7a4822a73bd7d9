"""Where a daemon is put together: with `agent.dataplane` the only module that names concrete adapters.

`Device` builds the parts, starts them in the order they need each other and stops them in reverse. What each part does
lives in its own module; nothing here decides anything about models, releases or messages.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import random
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent import __version__, profile
from agent.config import Config, load
from agent.daemon import enroll, keys
from agent.daemon.askers import Asker
from agent.daemon.audit import Audit
from agent.daemon.control import ControlServer
from agent.daemon.crashes import CrashLoops
from agent.daemon.fetching import Fetching
from agent.daemon.lifecycle import Lifecycle
from agent.daemon.link import Identity as LinkIdentity
from agent.daemon.link import Link, LinkSettings, Orders
from agent.daemon.memory import give_back
from agent.daemon.notify import Notifier
from agent.daemon.rotation import Rotation
from agent.daemon.routes import Routes
from agent.daemon.seen import Seen
from agent.daemon.settings import Chosen, SettingsTrials, file_sha256
from agent.daemon.sideload import Sideloads
from agent.daemon.status import Observed, Status, boot_id
from agent.daemon.supervisor import default_host_command
from agent.daemon.tasks import Tasks
from agent.daemon.telemetry import Clocks, Telemetry
from agent.daemon.topics import Topics
from agent.daemon.updates import LastWords, UpdateLoop, for_good, limits_of, serve_later, worth_repeating
from agent.daemon.working import Working
from agent.dataplane import DataPlane, Surroundings
from agent.errors import AgentError, ConfigError, Reason
from ota.client.fsops import Fs
from ota.client.ports import Identity
from ota.client.updater import Updater
from ota.errors import OtaError
from ota.errors import Reason as OtaReason
from ota.mqtt import Tls

log = logging.getLogger(__name__)

TICK_S = 1.0
METRICS_EVERY_TICKS = 10
# who asked for a new start still gets the answer
ANSWER_S = 0.5
# without any of these the daemon only looks alive; it ends, and the service manager starts it again
ESSENTIAL_TASKS = ("link", "tick", "updates")


class Device:
    """One device's daemon.

    Args:
        config: what agent.toml says.
        environment: of the process; names credentials and the service manager's socket.
        online: False leaves the broker alone (sideloading beside a dead daemon).
        host_command: starts the host of the workers; the shipped one when None.
        chosen: which settings `config` came from; None for those of the device's own file.

    Attributes:
        failed: set when a part without which the daemon is of no use has ended.
        anew: set when the daemon is to start anew with other settings.

    Raises:
        AgentError: the configuration, keys or enrolment cannot be used.
    """

    def __init__(
        self,
        config: Config,
        environment: Mapping[str, str],
        *,
        online: bool = True,
        host_command: Sequence[str] | None = None,
        chosen: Chosen | None = None,
    ) -> None:
        self._config, self._online, self._environment = config, online, environment
        self.failed, self.anew = asyncio.Event(), asyncio.Event()
        self._tasks = Tasks(ESSENTIAL_TASKS, self.failed.set)
        enrolment = enroll.load(config.state_dir)
        if enrolment is None:
            raise ConfigError(
                Reason.NOT_ENROLLED, "this device is not enrolled", hint="edge-agent enroll --device ID makes a request"
            )
        self._enrolment = enrolment = enroll.with_broker(enrolment, config.broker)
        self._provider = keys.provider(config.state_dir, dict(environment))
        fs = Fs(config.state_dir)
        self._keys = keys.open_keys(self._provider, fs)
        self._recognised = profile.here(config.profile)
        self._profile = self._recognised.profile
        self._rng = random.Random(secrets.randbits(64))
        self._notifier = Notifier(environment)
        self._words = LastWords([line.name for line in config.lines])
        self._boot_id = boot_id()
        self.telemetry = Telemetry(
            Clocks(time.time_ns, time.monotonic_ns, self._boot_id), results=config.telemetry.results == "all"
        )
        python = config.worker_python or self._profile.python
        self._plane = self._make_plane(fs, host_command or default_host_command(python))
        self._host = self._plane.models
        self.link = self._make_link(self._keys.tls) if online and self._keys.tls is not None else None
        link = self.link
        self._fetching = Fetching(
            config.update, enrolment.https, enrolment.device, None if link is None else lambda: link.tls
        )
        self._updater: Updater
        life = (config.state_dir, self._provider, self._keys, link, lambda: self._updater, self.telemetry)
        self.lifecycle = Lifecycle(*life, clock=_utc_now, rng=self._rng)
        self._updater = self._make_updater(fs)
        self._rotation = Rotation(self._provider, self._keys, fs, self._updater.store, enrolment, self.telemetry.event)
        self._updates = UpdateLoop(self._look, self._can_look, poll_s=config.update.poll_s, rng=self._rng)
        self._crashes = CrashLoops(
            self._updater,
            self.telemetry,
            limit=config.update.crash_limit,
            window_s=config.update.crash_window_s,
            clock=time.monotonic,
            spawn=self._tasks.spawn,
            look=self._updates.poke,
            excused=lambda: self.settings.on_trial,
        )
        self.settings = self._make_settings(chosen or Chosen(config, file_sha256(config), config))
        self._make_control(fs)

    # --- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring everything up; returns when the committed releases serve or have failed to.

        Raises:
            AgentError: a socket or the state directory cannot be used.
        """
        await self._plane.start_hosts()
        await self._control.start()
        # from here on a technician gets answers; how long a model takes to load is no reason to be restarted
        self._notifier.send("READY=1", f"STATUS=serving {len(self._plane.lines)} lines")
        if self.link is not None:
            self._tasks.spawn(self.link.run(), "link")
        self.settings.start()
        self._tasks.spawn(self._tick(), "tick")
        self._plane.open_sources()
        await self._updater.recover()
        self._tasks.spawn(self._rotation.resume(), "keys")
        self._tasks.spawn(self.lifecycle.run(), "lifecycle")
        await asyncio.gather(*(self._resume(name) for name in self._plane.lines))
        if self.link is not None:
            self._tasks.spawn(self._updates.run(), "updates")
            self._updates.poke()

    async def stop(self) -> None:
        """Take everything down; an update in progress goes on at the next start."""
        self._notifier.send("STATUS=starting anew with other settings" if self.anew.is_set() else "STOPPING=1")
        # requests first: a sideload must not mistake the end of the workers for a bad release
        await self._control.stop()
        await self._tasks.end(but="link")
        await self._plane.stop()
        # last, so that what the others said while stopping still leaves
        await self._tasks.end()
        self._fetching.close()
        await self._plane.stop_hosts()

    async def sideload(self, path: Path, asker: Asker, *, allow_expired: bool = False) -> dict[str, str]:
        """Install from a directory or zip; see `Sideloads.install`."""
        return await self._sideloads.install(path, asker, allow_expired=allow_expired)

    def status(self) -> dict[str, Any]:
        """The status document."""
        return self._status.document()

    # --- parts -------------------------------------------------------------------------------------------------------

    def _make_plane(self, fs: Fs, host_command: Sequence[str]) -> DataPlane:
        ring = self._keys.keyring
        around = Surroundings(
            environment=self._environment,
            device=self._enrolment.device,
            fs=fs,
            storage=lambda: () if ring is None else ring.ring.storage,
            host_command=host_command,
            telemetry=self.telemetry,
            words=self._words,
            rng=self._rng,
            on_crash=lambda line, candidate, reason: self._crashes.crashed(line, candidate, reason),
            now=_utc_now,
        )
        return DataPlane(self._config, self._profile, around)

    def _make_control(self, fs: Fs) -> None:
        """Everything that people ask."""
        enrolment = self._enrolment
        words = (self._words, enrolment.device, enrolment.sideload_root, Audit(fs), self.telemetry, _utc_now)
        # beside a dead daemon the settings on trial are not in use
        self._sideloads = Sideloads(self._updater, *words, lambda: self._online and self.settings.on_trial)
        self._status = self._make_status()
        self._routes = Routes(
            tuple(self._plane.lines),
            self._updater,
            self._updates,
            self._sideloads,
            self._status,
            lambda: self.link,
            self.telemetry,
            self._tasks.spawn,
        )
        parts = (self._rotation, self.settings, self.lifecycle)
        self._control = ControlServer(
            self._config.control_socket,
            {**self._routes.table(), **{k: v for p in parts for k, v in p.routes().items()}},
        )

    def _make_link(self, tls: keys.TlsFiles) -> Link:
        enrolment = self._enrolment
        settings = LinkSettings(
            enrolment.host,
            enrolment.port,
            Topics(enrolment.tenant, enrolment.device, self._plane.inputs.names),
            Tls(str(enrolment.ca), tls.certificate or str(enrolment.certificate), tls.key),
            flush_s=self._config.telemetry.interval_s,
        )
        return Link(
            settings,
            LinkIdentity(self._boot_id, secrets.token_hex(8)),
            Orders(lambda c: self._routes.command(c), lambda h, s: self._routes.hint(h, s), self._plane.inputs.heard),
            self.telemetry,
            rng=self._rng,
            clock=time.monotonic,
            wall=time.time,
            seen=Seen(Fs(self._config.state_dir)),
        )

    def _make_updater(self, fs: Fs) -> Updater:
        transports = self._fetching.transports(None if self.link is None else self.link.transport)
        return Updater(
            fs,
            Identity(self._enrolment.device, self._profile.name, __version__),
            self._keys.device,
            self._enrolment.root,
            transports,
            self._host,
            _utc_now,
            self._rng,
            limits_of(self._config.update),
            self._plane.news.updated,
            on_settings=lambda text: self.settings.fleet_wants(text),
            on_revoked=self.lifecycle.revoke,
            gate=self._fetching.gate,
        )

    def _make_settings(self, chosen: Chosen) -> SettingsTrials:
        working = Working(
            lambda: self.link,
            self._plane.sources,
            self._plane.lines,
            committed=lambda line: self._updater.record.line(line).active is not None,
            busy=lambda: self._updater.busy,
            paused=lambda: self._plane.governor.paused,
        )
        return SettingsTrials(
            self._updater.settings,
            chosen,
            working,
            tell=lambda facts: self.telemetry.event("settings", facts, alarm=True),
            restart=lambda: asyncio.get_running_loop().call_later(ANSWER_S, self.anew.set),
            limit_s=self._config.update.settings_probation_s,
            clock=time.monotonic,
        )

    def _make_status(self) -> Status:
        about = {
            "id": self._enrolment.device,
            "tenant": self._enrolment.tenant,
            "profile": self._profile.name,
            "recognised": self._recognised.evidence,
            "accessories": ", ".join(accessory.name for accessory in self._recognised.accessories),
            "agent": __version__,
            "boot_id": self._boot_id,
        }
        observed = Observed(
            about,
            self._plane.supervisor,
            self._provider,
            lambda: self.link,
            self._plane.sources,
            self._plane.lines,
            self._host,
            self._updater,
            self._words,
            self.telemetry,
            self._keys,
            self.lifecycle,
            self._fetching,
            self._plane.governor,
        )
        return Status(observed, tick_s=TICK_S)

    # --- tasks -------------------------------------------------------------------------------------------------------

    async def _resume(self, name: str) -> None:
        try:
            async with self._updater.starting(name):
                candidate = self._updater.active(name)
                if candidate is not None:
                    await self._host.resume(candidate)
        except (AgentError, OtaError) as e:
            log.error("line %s: %s", name, e.message, extra={"reason": e.reason.value, "hint": e.hint})
            if not for_good(e):
                self._tasks.spawn(serve_later(lambda: self._updater.serve(name), self._rng), f"serve {name}")

    async def _look(self) -> bool:
        events = await self._updater.check()
        no_room = any(event.reason is OtaReason.NO_SPACE for event in events)
        await self._plane.compiled.collect(self._updater.store.has, room_needed=no_room)
        give_back()
        self._fetching.note(events, self._updates.poke)
        return worth_repeating(events)

    def _can_look(self) -> bool:
        if self.settings.on_trial:
            return False  # an update would be interrupted should the settings fail
        waiting = any(line.candidate is not None for line in self._updater.record.lines.values())
        return waiting or self._fetching.beside_broker or (self.link is not None and self.link.connected)

    async def _tick(self) -> None:
        """Once a second: beat for the watchdog, figures, and a look as soon as the broker is there."""
        ticks, was_connected = 0, False
        while True:
            await asyncio.sleep(TICK_S)
            ticks += 1
            self._status.tick()
            self._plane.governor.tick()
            if self.settings.tick():
                self._updates.poke()
            # this loop and the network thread are the daemon's own heartbeats; a worker or the uplink is not
            if self.link is None or self.link.alive:
                self._notifier.send("WATCHDOG=1")
            if self.link is None:
                continue
            if self.link.connected and not was_connected:
                self._updates.poke()
            was_connected = self.link.connected
            self.link.report(self._status.reported())
            if ticks % METRICS_EVERY_TICKS == 0:
                self.telemetry.metrics(self._status.figures())


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def main() -> int:
    """Entry of `edge-agent`."""
    words = sys.argv[1:]
    if len(words) == 3 and words[:2] == ["run", "--config"]:
        return _run(Path(words[2]))
    from agent import cli

    return cli.main(words)


def _run(path: Path) -> int:
    """What the service starts, without the parser of the command line: the daemon would carry it ever after."""
    from agent import logs, screen, service

    logs.set_up("INFO")
    try:
        return service.run_daemon(load(path), os.environ)
    except (AgentError, OtaError) as e:
        return screen.complain(e)
    except KeyboardInterrupt:
        return 130


def ota_main() -> int:
    """Entry of `edge-ota`: the publisher with the agent's workers as its way to run models."""
    from agent.recording import WorkerRecorder
    from ota.publisher import cli as publisher_cli

    return publisher_cli.main(sys.argv[1:], recorder=WorkerRecorder())
