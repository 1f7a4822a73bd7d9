"""Where a daemon is put together: the one module that names concrete adapters.

`Device` builds the parts, starts them in the order they need each other and stops them in reverse. What each part does
lives in its own module; nothing here decides anything about models, releases or messages.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import random
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent import __version__, cli, profile
from agent.config import Config
from agent.daemon import enroll, keys
from agent.daemon.askers import Asker
from agent.daemon.audit import Audit
from agent.daemon.control import ControlServer
from agent.daemon.crashes import CrashLoops
from agent.daemon.fetching import Fetching
from agent.daemon.hosting import ModelHost
from agent.daemon.lifecycle import Lifecycle
from agent.daemon.lines import LineRuntime
from agent.daemon.link import Identity as LinkIdentity
from agent.daemon.link import Link, LinkSettings, Orders
from agent.daemon.memory import give_back
from agent.daemon.news import News
from agent.daemon.notify import Notifier
from agent.daemon.rotation import Rotation
from agent.daemon.routes import Routes
from agent.daemon.seen import Seen
from agent.daemon.settings import Chosen, SettingsTrials, Working, file_sha256
from agent.daemon.sideload import Sideloads
from agent.daemon.sources import SourceRuntime
from agent.daemon.status import Observed, Status, boot_id
from agent.daemon.supervisor import Supervisor, default_host_command
from agent.daemon.tasks import Tasks
from agent.daemon.telemetry import Clocks, Telemetry
from agent.daemon.topics import Topics
from agent.daemon.updates import FOR_GOOD, LastWords, UpdateLoop, limits_of, serve_later, worth_repeating
from agent.errors import AgentError, ConfigError, Reason
from ota.client.fsops import Fs
from ota.client.ports import Identity
from ota.client.updater import Updater
from ota.errors import OtaError
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
        self._config, self._online = config, online
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
        self._profile = profile.recognise(config.profile, profile.load_all())
        self._rng = random.Random(secrets.randbits(64))
        self._notifier = Notifier(environment)
        self._words = LastWords([line.name for line in config.lines])
        self._boot_id = boot_id()
        self.telemetry = Telemetry(
            Clocks(time.time_ns, time.monotonic_ns, self._boot_id), results=config.telemetry.results == "all"
        )
        self._make_models(fs, host_command or default_host_command())
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
        await self._supervisor.start()
        await self._control.start()
        # from here on a technician gets answers; how long a model takes to load is no reason to be restarted
        self._notifier.send("READY=1", f"STATUS=serving {len(self._lines)} lines")
        if self.link is not None:
            self._tasks.spawn(self.link.run(), "link")
        self.settings.start()
        self._tasks.spawn(self._tick(), "tick")
        for source in self._sources.values():
            source.start()
        await self._updater.recover()
        self._tasks.spawn(self._rotation.resume(), "keys")
        self._tasks.spawn(self.lifecycle.run(), "lifecycle")
        await asyncio.gather(*(self._resume(name) for name in self._lines))
        if self.link is not None:
            self._tasks.spawn(self._updates.run(), "updates")
            self._updates.poke()

    async def stop(self) -> None:
        """Take everything down; an update in progress goes on at the next start."""
        self._notifier.send("STATUS=starting anew with other settings" if self.anew.is_set() else "STOPPING=1")
        # requests first: a sideload must not mistake the end of the workers for a bad release
        await self._control.stop()
        await self._tasks.end(but="link")
        await asyncio.gather(*(line.stop() for line in self._lines.values()))
        self._news.settle()
        await asyncio.gather(*(source.stop() for source in self._sources.values()))
        # last, so that what the others said while stopping still leaves
        await self._tasks.end()
        self._fetching.close()
        await self._supervisor.stop()

    async def sideload(self, path: Path, asker: Asker, *, allow_expired: bool = False) -> dict[str, str]:
        """Install from a directory or zip; see `Sideloads.install`."""
        return await self._sideloads.install(path, asker, allow_expired=allow_expired)

    def status(self) -> dict[str, Any]:
        """The status document."""
        return self._status.document()

    # --- parts -------------------------------------------------------------------------------------------------------

    def _make_models(self, fs: Fs, host_command: Sequence[str]) -> None:
        """Everything that has to do with frames and models."""
        self._supervisor = Supervisor(
            listen=self._config.worker_socket if self._config.workers == "unit" else None,
            host_command=host_command,
            on_lost=lambda: self.telemetry.event("worker_host_lost", {}),
        )
        self._lines: dict[str, LineRuntime] = {}
        self._news = News(self.telemetry, self._words, self._lines)
        self._sources = {s.name: self._source(s.name) for s in self._config.sources}
        self._lines |= {line.name: self._line(line.name) for line in self._config.lines}
        self._host = ModelHost(
            self._config,
            self._profile,
            self._supervisor,
            self._lines,
            write=fs.write_atomic,
            on_verdicts=self._news.tried,
        )

    def _make_control(self, fs: Fs) -> None:
        """Everything that people ask."""
        enrolment = self._enrolment
        words = (self._words, enrolment.device, enrolment.sideload_root, Audit(fs), self.telemetry, _utc_now)
        # beside a dead daemon the settings on trial are not in use
        self._sideloads = Sideloads(self._updater, *words, lambda: self._online and self.settings.on_trial)
        self._status = self._make_status()
        self._routes = Routes(
            tuple(self._lines),
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

    def _source(self, name: str) -> SourceRuntime:
        settings = next(s for s in self._config.sources if s.name == name)
        return SourceRuntime(
            settings,
            self._supervisor,
            on_dropped=self._news.dropped,
            on_restarted=self._news.source_restarted,
            on_state=self._news.source_state,
        )

    def _line(self, name: str) -> LineRuntime:
        settings = next(line for line in self._config.lines if line.name == name)
        return LineRuntime(
            settings,
            self._sources[settings.source],
            self._supervisor,
            self._config.update,
            on_result=self.telemetry.result,
            on_event=self.telemetry.event,
            on_crash=lambda line, candidate, reason: self._crashes.crashed(line, candidate, reason),
        )

    def _make_link(self, tls: keys.TlsFiles) -> Link:
        enrolment = self._enrolment
        settings = LinkSettings(
            enrolment.host,
            enrolment.port,
            Topics(enrolment.tenant, enrolment.device),
            Tls(str(enrolment.ca), tls.certificate or str(enrolment.certificate), tls.key),
            flush_s=self._config.telemetry.interval_s,
        )
        return Link(
            settings,
            LinkIdentity(self._boot_id, secrets.token_hex(8)),
            Orders(command=lambda c: self._routes.command(c), hint=lambda h, s: self._routes.hint(h, s)),
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
            self._news.updated,
            on_settings=lambda text: self.settings.fleet_wants(text),
            on_revoked=self.lifecycle.revoke,
            gate=self._fetching.gate,
        )

    def _make_settings(self, chosen: Chosen) -> SettingsTrials:
        working = Working(
            lambda: self.link,
            self._sources,
            self._lines,
            committed=lambda line: self._updater.record.line(line).active is not None,
            busy=lambda: self._updater.busy,
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
            "agent": __version__,
            "boot_id": self._boot_id,
        }
        observed = Observed(
            about,
            self._supervisor,
            self._provider,
            lambda: self.link,
            self._sources,
            self._lines,
            self._host,
            self._updater,
            self._words,
            self.telemetry,
            self._keys,
            self.lifecycle,
            self._fetching,
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
            if e.reason not in FOR_GOOD:
                self._tasks.spawn(serve_later(lambda: self._updater.serve(name), self._rng), f"serve {name}")

    async def _look(self) -> bool:
        events = await self._updater.check()
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
    return cli.main(sys.argv[1:])


def ota_main() -> int:
    """Entry of `edge-ota`: the publisher with the agent's workers as its way to run models."""
    from agent.recording import WorkerRecorder
    from ota.publisher import cli as publisher_cli

    return publisher_cli.main(sys.argv[1:], recorder=WorkerRecorder())
