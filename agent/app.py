"""Where a daemon is put together: the one module that names concrete adapters.

`Device` builds the parts, starts them in the order they need each other and stops them in reverse. What each part does
lives in its own module; nothing here decides anything about models, releases or messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from agent import __version__, cli, profile
from agent.config import Config
from agent.daemon import enroll, keys, metrics, report
from agent.daemon.commands import Check, Command, Hint, Rollback
from agent.daemon.control import ControlServer, Reply, json_reply, text_reply
from agent.daemon.hosting import ModelHost
from agent.daemon.lines import LineRuntime
from agent.daemon.link import Identity as LinkIdentity
from agent.daemon.link import Link, LinkSettings, Orders
from agent.daemon.lock import become_owner, locked
from agent.daemon.notify import Notifier
from agent.daemon.selection import Verdict
from agent.daemon.sources import SourceRuntime
from agent.daemon.supervisor import Supervisor, default_host_command
from agent.daemon.telemetry import Clocks, Telemetry
from agent.daemon.topics import Topics
from agent.daemon.updates import LastWords, UpdateLoop, sideload
from agent.errors import AgentError, ConfigError, ControlError, Reason
from ota.client.fsops import Fs
from ota.client.limits import Limits
from ota.client.ports import DeviceKeys, Identity, Transport, UpdateEvent
from ota.client.updater import Updater
from ota.errors import OtaError
from ota.mqtt import Tls
from ota.payload import key_id

log = logging.getLogger(__name__)

TICK_S = 1.0
METRICS_EVERY_TICKS = 10
FPS_WINDOW_TICKS = 5
SETTLE_S = 0.5
EXIT_SOFTWARE = 70
# without any of these the daemon only looks alive; it ends, and the service manager starts it again
ESSENTIAL_TASKS = ("link", "tick", "updates")


class Device:
    """One device's daemon.

    Args:
        config: what agent.toml says.
        environment: of the process; names credentials and the service manager's socket.
        online: False leaves the broker alone (sideloading beside a dead daemon).
        host_command: starts the host of the workers; the shipped one when None.

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
    ) -> None:
        self._config = config
        enrolment = enroll.load(config.state_dir)
        if enrolment is None:
            raise ConfigError(
                Reason.NOT_ENROLLED, "this device is not enrolled", hint="edge-agent enroll --device ID makes a request"
            )
        self._enrolment = enrolment
        self._provider = keys.provider(config.state_dir, dict(environment))
        secrets_ = self._provider.load()
        self._profile = profile.recognise(config.profile, profile.load_all())
        self._rng = random.Random(secrets.randbits(64))
        self._notifier = Notifier(environment)
        self._words = LastWords()
        self._boot_id = _boot_id()
        self.telemetry = Telemetry(
            Clocks(time.time_ns, time.monotonic_ns, self._boot_id), results=config.telemetry.results == "all"
        )
        self._supervisor = Supervisor(
            listen=config.worker_socket if config.workers == "unit" else None,
            host_command=host_command or default_host_command(),
            on_lost=lambda: self.telemetry.event("worker_host_lost", {}),
        )
        self._sources = {s.name: self._source(s.name) for s in config.sources}
        self._lines = {line.name: self._line(line.name) for line in config.lines}
        fs = Fs(config.state_dir)
        self._host = ModelHost(
            config, self._profile, self._supervisor, self._lines, write=fs.write_atomic, on_verdicts=self._on_verdicts
        )
        self.link = self._make_link(secrets_) if online else None
        self._updater = self._make_updater(fs, secrets_)
        self._updates = UpdateLoop(self._look, self._can_look, poll_s=config.update.poll_s, rng=self._rng)
        self._control = ControlServer(config.control_socket, self._routes())
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unsettled: dict[asyncio.TimerHandle, Callable[[], None]] = {}
        self.failed = asyncio.Event()
        self._started = time.monotonic()
        self._history: dict[str, list[int]] = {name: [] for name in self._lines}
        self._process = psutil.Process()

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
            self._spawn(self.link.run(), "link")
        self._spawn(self._tick(), "tick")
        for source in self._sources.values():
            source.start()
        await self._updater.recover()
        await asyncio.gather(*(self._resume(name) for name in self._lines))
        if self.link is not None:
            self._spawn(self._updates.run(), "updates")
            self._updates.poke()

    async def stop(self) -> None:
        """Take everything down; an update in progress goes on at the next start."""
        self._notifier.send("STOPPING=1")
        link = [task for task in self._tasks if task.get_name() == "link"]
        others = [task for task in self._tasks if task not in link]
        # requests first: a sideload must not mistake the end of the workers for a bad release
        await self._control.stop()
        await _cancel(others)
        await asyncio.gather(*(line.stop() for line in self._lines.values()))
        for handle, settle in list(self._unsettled.items()):
            handle.cancel()
            settle()
        await asyncio.gather(*(source.stop() for source in self._sources.values()))
        # last, so that what the others said while stopping still leaves
        await _cancel(link)
        await self._supervisor.stop()

    async def sideload(self, path: Path) -> dict[str, Any]:
        """Install from a directory.

        Raises:
            OtaError: nothing was installed, with the reason.
        """
        return await sideload(self._updater, self._words, path, self._enrolment.device)

    def status(self) -> dict[str, Any]:
        """The status document."""
        record = self._updater.record
        link = self._link_status()
        return {
            "device": {
                "id": self._enrolment.device,
                "tenant": self._enrolment.tenant,
                "profile": self._profile.name,
                "agent": __version__,
                "boot_id": self._boot_id,
            },
            "isolation": self._supervisor.isolation,
            "custody": {"kind": self._provider.custody, "worth": self._provider.worth},
            "link": link,
            "sources": {name: report.source_status(source) for name, source in self._sources.items()},
            "lines": {
                name: report.line_status(
                    line, record, self._words, self.telemetry, self._host.verdicts(name), self._fps(name)
                )
                for name, line in self._lines.items()
            },
            "conditions": report.conditions(self._lines, self._sources, record, link, self._words),
            "process": {
                "pid": os.getpid(),
                "rss_bytes": self._process.memory_info().rss,
                "uptime_s": round(time.monotonic() - self._started, 1),
            },
        }

    # --- parts -------------------------------------------------------------------------------------------------------

    def _source(self, name: str) -> SourceRuntime:
        settings = next(s for s in self._config.sources if s.name == name)
        return SourceRuntime(
            settings,
            self._supervisor,
            on_dropped=self._on_dropped,
            on_restarted=self._on_source_restarted,
            on_state=self._on_source_state,
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
        )

    def _make_link(self, opened: keys.DeviceKeys) -> Link:
        enrolment = self._enrolment
        settings = LinkSettings(
            enrolment.host,
            enrolment.port,
            Topics(enrolment.tenant, enrolment.device),
            Tls(str(enrolment.ca), str(enrolment.certificate), str(opened.tls_key)),
            flush_s=self._config.telemetry.interval_s,
        )
        return Link(
            settings,
            LinkIdentity(self._boot_id, secrets.token_hex(8)),
            Orders(command=self._command, hint=self._hint),
            self.telemetry,
            rng=self._rng,
            clock=time.monotonic,
            wall=time.time,
        )

    def _make_updater(self, fs: Fs, opened: keys.DeviceKeys) -> Updater:
        transports: list[Transport] = [] if self.link is None else [self.link.transport]
        public = opened.hpke.public_key().public_bytes_raw()
        return Updater(
            fs,
            Identity(self._enrolment.device, self._profile.name, __version__),
            DeviceKeys({key_id(public): opened.hpke}, opened.storage),
            self._enrolment.root,
            transports,
            self._host,
            lambda: datetime.datetime.now(datetime.UTC),
            self._rng,
            Limits(),
            self._on_update,
        )

    def _routes(self) -> dict[str, Any]:
        return {
            "GET /status": self._get_status,
            "GET /metrics": self._get_metrics,
            "GET /modules": self._get_modules,
            "POST /check": self._post_check,
            "POST /rollback": self._post_rollback,
            "POST /sideload": self._post_sideload,
        }

    # --- tasks -------------------------------------------------------------------------------------------------------

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task %s ended: %r", task.get_name(), error, exc_info=error)
            if task.get_name() in ESSENTIAL_TASKS:
                self.failed.set()

    async def _resume(self, name: str) -> None:
        try:
            candidate = self._updater.active(name)
            if candidate is not None:
                await self._host.resume(candidate)
        except (AgentError, OtaError) as e:
            log.error("line %s: %s", name, e.message, extra={"reason": e.reason.value, "hint": e.hint})

    async def _look(self) -> bool:
        events = await self._updater.check()
        return any(e.outcome == "failed" for e in events)

    def _can_look(self) -> bool:
        waiting = any(line.candidate is not None for line in self._updater.record.lines.values())
        return waiting or (self.link is not None and self.link.connected)

    async def _tick(self) -> None:
        """Once a second: beat for the watchdog, figures, and a look as soon as the broker is there."""
        ticks, was_connected = 0, False
        while True:
            await asyncio.sleep(TICK_S)
            ticks += 1
            for name, line in self._lines.items():
                self._history[name] = [*self._history[name][-FPS_WINDOW_TICKS:], line.results]
            # this loop and the network thread are the daemon's own heartbeats; a worker or the uplink is not
            if self.link is None or self.link.alive:
                self._notifier.send("WATCHDOG=1")
            if self.link is None:
                continue
            if self.link.connected and not was_connected:
                self._updates.poke()
            was_connected = self.link.connected
            self.link.report(self._reported())
            if ticks % METRICS_EVERY_TICKS == 0:
                self.telemetry.metrics(self._figures())

    # --- what happens ------------------------------------------------------------------------------------------------

    def _command(self, command: Command) -> None:
        if isinstance(command, Check):
            self._updates.poke()
        elif isinstance(command, Rollback):
            self._check_rollback(command.line)
            self._spawn(self._roll_back(command.line), f"rollback {command.line}")
        elif self.link is not None:
            self.link.report({**self._reported(), "asked": command.id})

    def _check_rollback(self, line: object) -> str:
        if not isinstance(line, str) or line not in self._lines:
            raise ControlError(
                Reason.UNKNOWN_LINE, f"this device has no line {line!r}", hint=f"lines: {', '.join(self._lines)}"
            )
        if self._updater.record.line(line).previous is None:
            raise ControlError(
                Reason.NO_PREVIOUS, f"{line} has no previous release", hint="edge-agent status shows what is installed"
            )
        return line

    async def _roll_back(self, line: str) -> None:
        """An operator's wish, accepted before it was known whether it can be fulfilled: what hinders it is told."""
        try:
            await self._updater.rollback(line)
        except OtaError as e:
            log.error("line %s: no rollback: %s", line, e.message, extra={"reason": e.reason.value, "hint": e.hint})
            facts = {"line": line, "reason": e.reason.value, "message": e.message, "hint": e.hint}
            self.telemetry.event("rollback_refused", facts, alarm=True)

    def _hint(self, hint: Hint, delay_s: float) -> None:
        self._updates.poke(delay_s)

    def _on_update(self, event: UpdateEvent) -> None:
        self._words.add(event)
        level = logging.WARNING if event.reason else logging.INFO
        if event.outcome != "up_to_date":
            text = event.message or f"{event.line} {event.version} {event.state} {event.outcome or ''}"
            log.log(level, "update: %s", text, extra={"reason": event.reason.value if event.reason else ""})
            self.telemetry.event("update", report.event_facts(event), alarm=event.outcome is not None)

    def _on_verdicts(self, line: str, version: str, verdicts: Sequence[Verdict]) -> None:
        self.telemetry.event("verdicts", report.verdict_facts(line, version, list(verdicts)))

    def _on_dropped(self, line: str, seqs: list[int], reason: str) -> None:
        if reason not in ("worker_lost", "stopped"):
            self.telemetry.dropped(line, seqs, reason)
            return

        def settle() -> None:
            """A worker may be parted from the frame that it has answered, or answers yet: then the answer counts."""
            self._unsettled.pop(handle, None)
            lost = [seq for seq in seqs if not self._lines[line].answered(seq)]
            if lost:
                self.telemetry.dropped(line, lost, reason)

        # what the worker said is on its way through another socket
        handle = asyncio.get_running_loop().call_later(SETTLE_S, settle)
        self._unsettled[handle] = settle

    def _on_source_restarted(self, source: SourceRuntime) -> None:
        self.telemetry.event("source_restarted", {"source": source.config.name, "restarts": source.restarts})
        for line in self._lines.values():
            if line.source is source:
                line.source_restarted()

    def _on_source_state(self, source: SourceRuntime) -> None:
        facts = {"source": source.config.name, "state": source.state, "detail": source.detail}
        self.telemetry.event("source", facts, alarm=source.state in ("stale", "reconnecting"))

    # --- control -----------------------------------------------------------------------------------------------------

    async def _get_status(self, _: Mapping[str, Any]) -> Reply:
        return json_reply(self.status())

    async def _get_metrics(self, _: Mapping[str, Any]) -> Reply:
        return text_reply(metrics.render(self.status()))

    async def _get_modules(self, _: Mapping[str, Any]) -> Reply:
        return json_reply({"modules": sorted({name.partition(".")[0] for name in sys.modules})})

    async def _post_check(self, _: Mapping[str, Any]) -> Reply:
        if self.link is not None:
            self.link.retry_now()
        self._updates.poke()
        return json_reply({"state": "looking"})

    async def _post_rollback(self, fields: Mapping[str, Any]) -> Reply:
        line = self._check_rollback(fields.get("line"))
        event = await self._updater.rollback(line)
        return json_reply({"line": line, "version": event.version, "outcome": event.outcome})

    async def _post_sideload(self, fields: Mapping[str, Any]) -> Reply:
        path = fields.get("path")
        if not isinstance(path, str) or not path.startswith("/"):
            raise ControlError(Reason.BAD_USAGE, "path is not an absolute path")
        return json_reply(await self.sideload(Path(path)))

    # --- figures -----------------------------------------------------------------------------------------------------

    def _link_status(self) -> dict[str, Any]:
        if self.link is None:
            return {"state": "offline by configuration", "message": "", "bytes": {}, "broker": ""}
        return self.link.status()

    def _fps(self, name: str) -> float:
        history = self._history[name]
        return (history[-1] - history[0]) / ((len(history) - 1) * TICK_S) if len(history) > 1 else 0.0

    def _figures(self) -> dict[str, Any]:
        return {
            "rss_bytes": self._process.memory_info().rss,
            "cpu_s": round(sum(self._process.cpu_times()[:2]), 2),
            "load": os.getloadavg()[0],
            "bytes": self.link.bytes_by_purpose() if self.link else {},
            "lost": self.telemetry.lost,
        }

    def _reported(self) -> dict[str, Any]:
        """The retained document: what changes rarely and an operator filters by."""
        status = self.status()
        line_keys = ("version", "committed", "component", "delegate", "update")
        return {
            "v": 1,
            "device": {key: status["device"][key] for key in ("id", "profile", "agent")},
            "isolation": status["isolation"],
            "custody": status["custody"]["kind"],
            "lines": {name: {key: line[key] for key in line_keys} for name, line in status["lines"].items()},
            "conditions": [c for c in status["conditions"] if c["type"] != "LinkConnected"],
        }


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return secrets.token_hex(16)


def run_daemon(config: Config, environment: Mapping[str, str], host_command: Sequence[str] | None = None) -> int:
    """Run the daemon until SIGTERM or SIGINT; returns its exit code.

    Raises:
        AgentError: it cannot start.
    """

    async def serve() -> int:
        device = Device(config, environment, host_command=host_command)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        starting = asyncio.create_task(device.start(), name="start")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        failing = asyncio.create_task(device.failed.wait(), name="failed")
        await asyncio.wait((starting, stopping, failing), return_when=asyncio.FIRST_COMPLETED)
        try:
            if starting.done():
                starting.result()
                await asyncio.wait((stopping, failing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel([starting, stopping, failing])
            await device.stop()
        return EXIT_SOFTWARE if device.failed.is_set() else 0

    with locked(config.state_dir):
        return asyncio.run(serve())


def sideload_once(config: Config, environment: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Install from a directory while no daemon runs, and leave nothing running.

    Raises:
        AgentError, OtaError: nothing was installed.
    """

    async def once(own: Config) -> dict[str, Any]:
        device = Device(own, environment, online=False)
        try:
            await device.start()
            return await device.sideload(path)
        finally:
            await device.stop()

    become_owner(config.state_dir)
    # the service's run directory went with it, and the workers' unit waits for a daemon there
    with locked(config.state_dir), tempfile.TemporaryDirectory(prefix="edge-sideload-") as run_dir:
        return asyncio.run(once(replace(config, workers="process", run_dir=Path(run_dir))))


def main() -> int:
    """Entry of `edge-agent`."""
    return cli.main(sys.argv[1:])


def ota_main() -> int:
    """Entry of `edge-ota`: the publisher with the agent's workers as its way to run models."""
    from agent.recording import WorkerRecorder
    from ota.publisher import cli as publisher_cli

    return publisher_cli.main(sys.argv[1:], recorder=WorkerRecorder())
