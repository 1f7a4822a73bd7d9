"""Settings that take the place of agent.toml: chosen at the start, on trial until they have proved that they work.

The daemon starts anew inside its process with the settings on trial and has a time in which everything that worked
before, and every source that is new, must work with them; else it goes back to what was in force before. What is kept
of this, and when a trial is given up, is `ota.client.settings`.
Invariants: nothing changes before the settings were read and found usable; where the state lies, where the sockets are
and how workers run are the device's own; every end is told once.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent import config, profile
from agent.config import Config
from agent.daemon.control import Reply, Route, json_reply
from agent.daemon.working import Working
from agent.errors import AgentError, ConfigError, ControlError, Reason
from ota.client import settings
from ota.client.configuration import Configuration
from ota.client.desired import MAX_SETTINGS_BYTES
from ota.client.limits import Limits
from ota.client.machine import Outcome
from ota.client.settings import Origin, State
from ota.errors import OtaError, StoreError
from ota.errors import Reason as OtaReason

log = logging.getLogger(__name__)

HELD_S = 2.0
REFUSED_S = 30.0  # a disk that refuses is not asked every second
# the limit of trials that were interrupted, as for releases
MAX_ATTEMPTS = Limits().trial_attempts
Event = Mapping[str, Any]


@dataclass(frozen=True)
class Chosen:
    """What a daemon runs with.

    Attributes:
        own: the device's own file, as it was when the process started; own_sha256: of its bytes.
        config: in force: that, or settings in its place.
        sha256: of the settings document in force; empty for the file.
        trial: whether the settings are on trial.
        news: what became of settings before, to be told as events.
    """

    own: Config
    own_sha256: str
    config: Config
    sha256: str = ""
    trial: bool = False
    news: tuple[Event, ...] = ()


def file_sha256(own: Config) -> str:
    """Hash of the device's own file; of nothing when it cannot be read any more."""
    try:
        return hashlib.sha256(own.path.read_bytes()).hexdigest()
    except OSError:
        return hashlib.sha256(b"").hexdigest()


def read(text: str, own: Config) -> Config:
    """The configuration that settings make of this device.

    Raises:
        ConfigError: `bad_config`, `bad_profile`: they cannot be used here.
    """
    if len(text.encode("utf-8", "replace")) > MAX_SETTINGS_BYTES:
        raise ConfigError(
            Reason.BAD_CONFIG, f"settings: longer than {MAX_SETTINGS_BYTES} bytes", hint="shorten comments"
        )
    parsed = config.parse_settings(text, own)
    profile.recognise(parsed.profile, profile.load_all())
    return parsed


def choose(own: Config, own_sha256: str, kept: Configuration, max_attempts: int, *, restarted: bool) -> Chosen:
    """What to run with now. A trial that is about to begin is counted first.

    Args:
        restarted: the process is new; False when the daemon starts anew within it.

    Raises:
        StoreError: the journal cannot be written.
    """
    news: list[Event] = []

    def tell(outcome: Outcome | None, sha256: str, reason: OtaReason | None, message: str) -> None:
        if outcome is not None:
            news.append(facts(outcome, sha256, reason, message))

    record = kept.record
    if (record.active or record.trial) and record.file != own_sha256:
        outcome = kept.apply(settings.FileChanged())
        tell(outcome, record.active or record.trial, None, f"{own.path} was changed and is in force again")
    record = kept.record
    if record.state is not State.IDLE and (restarted or record.attempts):
        outcome = kept.apply(settings.Interrupted(max_attempts))
        message = f"the trial of settings was interrupted {record.attempts} times"
        tell(outcome, record.trial, OtaReason.INTERRUPTED, message)
    if kept.record.state is State.TRIAL:
        chosen = _on_trial(own, own_sha256, kept, tell)
        if chosen is not None:
            return Chosen(own, own_sha256, chosen, kept.record.trial, trial=True, news=tuple(news))
    if kept.record.active:
        sha256 = kept.record.active
        try:
            return Chosen(own, own_sha256, read(kept.document(sha256), own), sha256, news=tuple(news))
        except (OtaError, ConfigError) as e:
            outcome = kept.apply(settings.ActiveDamaged())
            tell(outcome, sha256, OtaReason.STATE_CORRUPT, f"{e.message}; {own.path} is in force again")
    return Chosen(own, own_sha256, own, news=tuple(news))


def _on_trial(
    own: Config, own_sha256: str, kept: Configuration, tell: Callable[[Outcome | None, str, OtaReason, str], None]
) -> Config | None:
    sha256 = kept.record.trial
    try:
        wanted = read(kept.document(sha256), own)
    except (OtaError, ConfigError) as e:
        tell(kept.apply(settings.TrialFailed(OtaReason.SETTINGS_FAILED)), sha256, OtaReason.SETTINGS_FAILED, e.message)
        return None
    kept.apply(settings.TrialBegun())
    return wanted


def facts(outcome: Outcome, sha256: str, reason: OtaReason | None, message: str) -> Event:
    """The end of a trial, or of settings, as an event."""
    told = {"outcome": outcome.value, "sha256": sha256, "reason": reason.value if reason else "", "message": message}
    return {key: value for key, value in told.items() if value}


@dataclass
class SettingsTrials:
    """Takes new settings in, and watches those on trial. `tick` is called once a second.

    Args:
        kept: the record and the documents. chosen: what this daemon runs with.
        tell: told of every end, as an event's facts. restart: starts the daemon anew within the process.
        limit_s: time of a trial. clock: monotonic seconds.
    """

    kept: Configuration
    chosen: Chosen
    working: Working
    tell: Callable[[Event], None]
    restart: Callable[[], object]
    limit_s: float
    clock: Callable[[], float]
    untold: tuple[Event, ...] = field(default=(), init=False)
    _wanted: str | None = field(default=None, init=False)
    _began_s: float = field(default=0.0, init=False)
    _held_since_s: float | None = field(default=None, init=False)
    _not_before_s: float = field(default=-math.inf, init=False)
    _ends: bool = field(default=False, init=False)

    def start(self) -> None:
        """Begin the time of the trial, if there is one, and tell what was before."""
        self._began_s = self.clock()
        for event in self.chosen.news:
            self.tell(event)

    # --- new settings ------------------------------------------------------------------------------------------------

    def propose(self, text: str, origin: Origin) -> str:
        """Put settings on trial; returns their hash. The daemon starts anew at once.

        Raises:
            ConfigError: they cannot be used; nothing changed.
            ControlError: `busy`: other settings are on trial, or an update is under way.
            StoreError: the disk refuses; nothing changed.
        """
        wanted = read(text, self.chosen.own)
        if self.kept.record.state is not State.IDLE:
            raise OtaError(
                OtaReason.BUSY, "other settings are on trial", hint="edge-agent config show tells when it ends"
            )
        if self.working.busy():
            raise OtaError(
                OtaReason.BUSY, "an update is under way", hint="wait for its end, or: edge-agent update cancel LINE"
            )
        sha256 = self.kept.propose(text.encode(), self.chosen.own_sha256, origin, self._expect(wanted))
        log.warning("settings %s go on trial for %g s", sha256[:12], self.limit_s)
        self._ends = True
        self.restart()
        return sha256

    def fleet_wants(self, text: str | None) -> None:
        """What verified metadata wants; looked at once for each document, and only between updates (`tick`)."""
        dealt_with = text is None or hashlib.sha256(text.encode()).hexdigest() == self.kept.record.fleet
        self._wanted = None if dealt_with else text

    def _take_wanted(self, text: str) -> None:
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        record = self.kept.record
        if sha256 in (record.fleet, record.active) or sha256 in record.quarantine:
            self._wanted = None
            return
        try:
            self.propose(text, Origin.FLEET)
        except ConfigError as e:
            outcome = self.kept.apply(settings.SettingsRefused(sha256, OtaReason.SETTINGS_REFUSED))
            if outcome is not None:
                self.tell(facts(outcome, sha256, OtaReason.SETTINGS_REFUSED, e.message))
        self._wanted = None

    def _expect(self, wanted: Config) -> tuple[str, ...]:
        """What works now, as far as it is still there, and every source that is new."""
        link, before = self.working.link(), self.chosen.config
        sources = {source.name: source for source in before.sources}
        expected = ["link"] if link is not None and (link.connected or wanted.broker != before.broker) else []
        expected += [
            f"source {source.name}"
            for source in wanted.sources
            if source.name not in sources or self._holds(f"source {source.name}")
        ]
        expected += [f"line {line.name}" for line in wanted.lines if self._holds(f"line {line.name}")]
        return tuple(expected)

    # --- the trial ---------------------------------------------------------------------------------------------------

    @property
    def on_trial(self) -> bool:
        """Whether this daemon runs with settings that have not proved themselves yet, or is ending for them."""
        return self.kept.record.state is not State.IDLE and (self.chosen.trial or self._ends)

    def tick(self) -> bool:
        """Take in what the fleet wants, or look how the trial goes; True when it has just been passed."""
        before = self.on_trial
        if self.clock() < self._not_before_s:
            return False
        try:
            self._tick()
        except OtaError as e:
            self._not_before_s = self.clock() + REFUSED_S
            log.error("settings: %s", e.message, extra={"reason": e.reason.value, "hint": e.hint})
        return before and not self.on_trial and not self.untold

    def _tick(self) -> None:
        now = self.clock()
        if self.kept.record.state is not State.TRIAL:
            if self._wanted is not None and not self.working.busy():
                self._take_wanted(self._wanted)
            return
        if not self.chosen.trial:
            return  # this daemon ends, or could not note the beginning of the trial: the next start begins it
        missing = [what for what in self.kept.record.expect if not self._holds(what)]
        if missing:
            self._held_since_s = None
            if now - self._began_s > self.limit_s:
                why = "; ".join(self.working.why(what) for what in missing)
                self._end(settings.TrialFailed(OtaReason.SETTINGS_FAILED), f"within {self.limit_s:g} s: {why}")
                self.restart()
        elif self._held_since_s is None:
            self._held_since_s = now
        elif now - self._held_since_s >= HELD_S:
            self._end(settings.TrialPassed(), "link, sources and lines work with the new settings")

    def _end(self, event: settings.TrialPassed | settings.TrialFailed, message: str) -> None:
        sha256 = self.kept.record.trial
        outcome = self.kept.apply(event)
        reason = event.reason if isinstance(event, settings.TrialFailed) else None
        log.warning("settings %s: %s", sha256[:12], message, extra={"reason": reason.value if reason else ""})
        if outcome is None:
            return
        if reason is None:
            self.tell(facts(outcome, sha256, reason, message))
        else:
            # the link may be what does not work: the next daemon tells it
            self.untold = (facts(outcome, sha256, reason, message),)

    def _holds(self, what: str) -> bool:
        return self.working.holds(what, excused=self._excused())

    def _excused(self) -> bool:
        """Whether no frame comes because the board is too hot, and not because the settings on trial call it so."""
        if not self.working.paused():
            return False
        before, now = in_force(self.chosen.own, self.kept), self.chosen.config
        return (before.profile, before.governor) == (now.profile, now.governor)

    # --- control -----------------------------------------------------------------------------------------------------

    def routes(self) -> dict[str, Route]:
        """The requests that concern settings."""
        return {"GET /config": self._get, "POST /config": self._post}

    async def _get(self, _: Mapping[str, Any]) -> Reply:
        told = (*self.chosen.news, *self.untold)
        return json_reply(show(self.chosen.own, self.kept) | {"last": told[-1]["message"] if told else ""})

    async def _post(self, fields: Mapping[str, Any]) -> Reply:
        text = fields.get("text")
        if not isinstance(text, str):
            raise ControlError(Reason.BAD_USAGE, "text is not a text", hint="edge-agent config apply FILE")
        sha256 = self.propose(text, Origin.PERSON)
        return json_reply({"state": "trial", "sha256": sha256, "limit_s": self.limit_s})


def show(own: Config, kept: Configuration) -> dict[str, Any]:
    """Which settings are in force, as `edge-agent config show` prints it."""
    record = kept.record
    return {
        "in_force": f"settings {record.active}" if record.active else str(own.path.absolute()),
        "state": record.state.value,
        "trial": record.trial,
        "attempts": record.attempts,
        "expected": list(record.expect),
        "fleet": record.fleet,
        "quarantine": {sha256: reason.value for sha256, reason in record.quarantine.items()},
    }


def propose_beside(own: Config, kept: Configuration, text: str) -> str:
    """Put settings on trial while no daemon runs; it begins at the next start.

    Raises:
        ConfigError: they cannot be used. OtaError: `busy`: others are on trial already. StoreError: the disk refuses.
    """
    wanted = read(text, own)
    if kept.record.state is not State.IDLE:
        raise OtaError(OtaReason.BUSY, "other settings are on trial", hint="start the agent and let it end")
    before = in_force(own, kept)
    expect = [f"source {source.name}" for source in wanted.sources]
    # nobody knows whether the link was there; a new address has to bring it
    expect += ["link"] if wanted.broker != before.broker else []
    return kept.propose(text.encode(), file_sha256(own), Origin.PERSON, tuple(expect))


def take_back(kept: Configuration, error: AgentError) -> tuple[Event, ...]:
    """End a trial whose settings the daemon cannot even start with; what is to be told.

    Raises:
        StoreError: the journal cannot be written.
    """
    sha256 = kept.record.trial
    outcome = kept.apply(settings.TrialFailed(OtaReason.SETTINGS_FAILED))
    log.warning("settings %s: %s", sha256[:12], error.message, extra={"reason": error.reason.value})
    return () if outcome is None else (facts(outcome, sha256, OtaReason.SETTINGS_FAILED, error.message),)


def in_force(own: Config, kept: Configuration) -> Config:
    """The active settings, or the device's own file where there are none that can be read; begins no trial."""
    if not kept.record.active:
        return own
    try:
        return read(kept.document(kept.record.active), own)
    except (AgentError, StoreError):
        return own
