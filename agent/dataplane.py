"""How a daemon's cameras, sensors and models are put together; `agent.app` puts the rest around it.

Like `agent.app` it names concrete adapters and decides nothing. Everything here speaks with workers; keys, releases and
the network are elsewhere.
"""

from __future__ import annotations

import asyncio
import datetime
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.config import Config, fuses
from agent.daemon import governor
from agent.daemon.captures import Captures
from agent.daemon.compiled import CompiledModels
from agent.daemon.fusedsource import FusedSource
from agent.daemon.hosting import ModelHost
from agent.daemon.lines import LineRuntime
from agent.daemon.news import News
from agent.daemon.ruling import Ruling
from agent.daemon.sources import SourceRuntime, network_host
from agent.daemon.supervisor import Supervisor
from agent.daemon.telemetry import Telemetry
from agent.daemon.topicsource import TopicSources
from agent.daemon.updates import LastWords, limits_of
from agent.errors import Reason
from agent.governorconfig import merged
from agent.profile import Profile
from agent.sourceconfig import NETWORK_KINDS, SourceConfig
from agent.sourcesecret import with_secrets
from ota.client.fsops import Fs
from ota.client.ports import Candidate


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the parts take from outside.

    Attributes:
        device: id, for captures.
        storage: keys under which this device seals, the current one first.
        host_command: starts the host of the workers.
        on_crash: called with (line, candidate, reason) when a serving worker died by its own fault.
    """

    environment: Mapping[str, str]
    device: str
    fs: Fs
    storage: Callable[[], Sequence[bytes]]
    host_command: Sequence[str]
    telemetry: Telemetry
    words: LastWords
    rng: random.Random
    on_crash: Callable[[str, Candidate, Reason], None]
    now: Callable[[], datetime.datetime]


class DataPlane:
    """Sources, lines and models of one device.

    Attributes:
        sources, lines: by name.
        supervisor: hands out workers; sources of the network have a host of their own.
        inputs: sources that the daemon itself hears.
        models: the updater's view of all this.
    """

    def __init__(self, config: Config, profile: Profile, around: Surroundings) -> None:
        self._config, self._profile, self._around = config, profile, around
        telemetry = around.telemetry
        reserve_bytes = limits_of(config.update).reserve_bytes
        self.compiled = CompiledModels(around.fs, around.storage, reserve_bytes=reserve_bytes)
        self.supervisor = Supervisor(
            listen=config.worker_socket if config.workers == "unit" else None,
            host_command=around.host_command,
            on_lost=lambda: telemetry.event("worker_host_lost", {}),
            zygote=profile.zygote,
        )
        self._network = network_host(config, lambda: telemetry.event("source_host_lost", {}))
        about = (config.capture, around.device)
        self._captures = Captures(around.fs, *about, clock=time.monotonic, now=around.now, reserve_bytes=reserve_bytes)
        self.lines: dict[str, LineRuntime] = {}
        self.news = News(telemetry, around.words, self.lines)
        self.sources = {source.name: self._source(source) for source in config.sources}
        self.inputs = TopicSources(self.sources.values())
        self.lines |= {line.name: self._line(line.name) for line in config.lines}
        self.models = ModelHost(
            config,
            profile,
            self.supervisor,
            self.lines,
            write=around.fs.write_atomic,
            on_verdicts=self.news.tried,
            on_event=telemetry.event,
            compiled=self.compiled,
        )
        self.governor = governor.governor_of(
            merged(profile.governor, config.governor),
            self.sources.values(),
            lambda facts: telemetry.event("governor", facts, alarm=True),
        )

    async def start_hosts(self) -> None:
        """Let workers come."""
        for host in self._hosts:
            await host.start()

    def open_sources(self) -> None:
        """Open every source and keep it open."""
        for source in self.sources.values():
            source.start()

    async def stop(self) -> None:
        """End trials, lines and sources; frames in hand are answered or counted."""
        await self.models.close()
        await asyncio.gather(*(line.stop() for line in self.lines.values()))
        self.news.settle()
        await asyncio.gather(*(source.stop() for source in self.sources.values()))

    async def stop_hosts(self) -> None:
        """End whatever worker is left."""
        await asyncio.gather(*(host.stop() for host in self._hosts))

    @property
    def _hosts(self) -> list[Supervisor]:
        return [self.supervisor] + ([self._network] if self._network is not None else [])

    def _source(self, settings: SourceConfig) -> SourceRuntime:
        kind = FusedSource if fuses(self._config, settings, self._profile.fused) else SourceRuntime
        folder: Path = self._config.path.parent
        return kind(
            settings,
            self._network if self._network is not None and settings.kind in NETWORK_KINDS else self.supervisor,
            options=lambda source: with_secrets(source, folder, self._around.environment),
            rng=self._around.rng,
            on_dropped=self.news.dropped,
            on_restarted=self.news.source_restarted,
            on_state=self.news.source_state,
        )

    def _line(self, name: str) -> LineRuntime:
        settings = next(line for line in self._config.lines if line.name == name)
        telemetry = self._around.telemetry
        runtime = LineRuntime(
            settings,
            self.sources[settings.source],
            self.supervisor,
            self._config.update,
            on_result=telemetry.result,
            on_event=telemetry.event,
            on_crash=self._around.on_crash,
            compiled=self.compiled,
        )
        runtime.ruling = Ruling(settings, self._config.rules, self._captures, telemetry.event)
        return runtime
