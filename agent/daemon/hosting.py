"""The updater's view of this board: choose a component, transform, self-test, activate, watch, revert.

Implements `ota.client.ports.Host` over the workers. The last verdicts of each line are kept, so that a restart serves
at once on the delegate that was measured before, and `choose` fetches only what can be expected to win.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

from agent.config import Config
from agent.daemon.lines import LineRuntime
from agent.daemon.selection import Verdict, explain, failure, quantile, rank
from agent.daemon.supervisor import Supervisor
from agent.daemon.trials import Subject, TrialRunner, candidates, component_order, subject_of, transform
from agent.errors import AgentError
from agent.errors import Reason as AgentReason
from agent.profile import Profile
from ota import strictjson
from ota.client.ports import Candidate, Choice, Probation, Tested
from ota.errors import OtaError, PayloadError, Reason, Rejected
from ota.release import Release

log = logging.getLogger(__name__)

TRANSFORM_TIMEOUT_S = 120.0
PROBATION_TICK_S = 0.1
MAX_PROBATION_CRASHES = 2
SYNTHETIC_BEATS = 3
MAX_KEPT_VERDICTS = 32
MAX_VERDICTS_BYTES = 1 << 20
VERDICTS_NAME = "verdicts.json"

# what a worker's fault means for the release under trial; all else is the device's own trouble
_REJECTIONS = {
    AgentReason.GOLDEN_MISMATCH: Reason.GOLDEN_MISMATCH,
    AgentReason.WORKER_CRASHED: Reason.WORKER_CRASHED,
    AgentReason.WORKER_HUNG: Reason.WORKER_HUNG,
    AgentReason.WORKER_OUT_OF_MEMORY: Reason.WORKER_OUT_OF_MEMORY,
    AgentReason.MODEL_UNLOADABLE: Reason.MODEL_UNLOADABLE,
    AgentReason.MODEL_SHAPE: Reason.MODEL_UNLOADABLE,
    AgentReason.UNKNOWN_FORMAT: Reason.MODEL_UNLOADABLE,
    AgentReason.OVER_BUDGET: Reason.OVER_BUDGET,
    AgentReason.RUNTIME_MISSING: Reason.NO_DELEGATE,
    AgentReason.UNKNOWN_DELEGATE: Reason.NO_DELEGATE,
    AgentReason.DELEGATE_FELL_BACK: Reason.NO_DELEGATE,
}


class ModelHost:
    """`ota.client.ports.Host` for the lines of one device.

    Args:
        write: durable write of (name under the state directory, bytes).
        on_verdicts: called with (line, version, verdicts) after each trial.
    """

    def __init__(
        self,
        config: Config,
        profile: Profile,
        supervisor: Supervisor,
        lines: Mapping[str, LineRuntime],
        *,
        write: Callable[[str, bytes], None],
        on_verdicts: Callable[[str, str, Sequence[Verdict]], None],
    ) -> None:
        self._config = config
        self._profile = profile
        self._supervisor = supervisor
        self._lines = lines
        self._write = write
        self._on_verdicts = on_verdicts
        self._trials = TrialRunner(supervisor, config.update)
        self._lending = asyncio.Lock()
        self._verdicts: dict[str, list[Verdict]] = _load_verdicts(config.state_dir / VERDICTS_NAME)

    def verdicts(self, line: str) -> list[Verdict]:
        """The last verdicts on every component of `line`; empty before the first trial."""
        kept = self._verdicts.get(line, [])
        newest: dict[str, str] = {}
        for verdict in kept:
            newest.setdefault(verdict.component, verdict.model)
        return [v for v in kept if v.model == newest[v.component]]

    def owners(self) -> dict[str, str]:
        """The line that owns each exclusive delegate in service."""
        owned = {delegate: self._owner(delegate) for delegate in self._profile.exclusive}
        return {delegate: line for delegate, line in owned.items() if line}

    async def choose(self, release: Release) -> Choice:
        """See `ota.client.ports.Host.choose`."""
        runtime = self._line(release.line)
        last = rank(self.verdicts(release.line))
        order = component_order(release, self._ladder(runtime), last[0] if last else None)
        if not order:
            self._refuse_taken(runtime, candidates(release.components, self._allowed(runtime)))
            raise Rejected(
                Reason.NO_DELEGATE,
                f"{release.line} {release.version} has no component that profile {self._profile.name} can run",
                hint="publish a component in a format this device runs, see edge-agent status",
            )
        explore = runtime.config.explore
        wanted = explore == "always" or (explore == "unmetered" and not self._config.update.metered)
        # without a verdict nothing is known about this line here: look at all components once
        return Choice(tuple(order), together=wanted and not last)

    async def transform(self, codec: str, out_length: int, payload_fd: int, base_fd: int | None) -> int:
        """See `ota.client.ports.Host.transform`."""
        try:
            return await transform(
                self._supervisor, codec, out_length, payload_fd, base_fd, timeout_s=TRANSFORM_TIMEOUT_S
            )
        except AgentError as e:
            if e.reason is AgentReason.WORKER_UNAVAILABLE:
                raise _busy(e) from e
            if e.reason in _REJECTIONS:
                raise Rejected(_REJECTIONS[e.reason], e.message, hint=e.hint) from e
            reason = Reason.DELTA_CORRUPT if base_fd is not None else Reason.PAYLOAD_CORRUPT
            raise PayloadError(reason, e.message, hint=e.hint) from e

    def exclusive(self, candidate: Candidate) -> Sequence[str]:
        """See `ota.client.ports.Host.exclusive`."""
        ladder = self._ladder(self._line(candidate.line))
        tried = {delegate for _, delegate in candidates(candidate.components, ladder)}
        return [delegate for delegate in self._profile.exclusive if delegate in tried]

    async def self_test(self, candidate: Candidate) -> Tested:
        """See `ota.client.ports.Host.self_test`."""
        runtime = self._line(candidate.line)
        pairs = candidates(candidate.components, self._ladder(runtime))
        if not pairs:
            self._refuse_taken(runtime, candidates(candidate.components, self._allowed(runtime)))
            raise Rejected(
                Reason.NO_DELEGATE,
                f"no delegate allowed on this device runs {candidate.component.name}",
                hint="see delegates in agent.toml and the device profile",
            )
        try:
            verdicts = await self._try(runtime, subject_of(candidate), pairs)
        except AgentError as e:
            raise _busy(e) from e
        models = {component.name: component.plain_sha256 for component in candidate.components}
        verdicts = [replace(v, model=models[v.component]) for v in verdicts]
        self._on_verdicts(candidate.line, candidate.version, verdicts)
        ranked = rank(verdicts)
        if not ranked:
            bad = failure(verdicts)
            raise Rejected(
                _REJECTIONS.get(AgentReason(bad.reason), Reason.WORKER_CRASHED),
                f"{candidate.line} {candidate.version} on {bad.requested}: {bad.message}",
                hint="the release is quarantined here; publish a newer one",
            )
        log.info("line %s %s: %s", candidate.line, candidate.version, explain(verdicts))
        self._keep(candidate.line, verdicts)
        best = ranked[0]
        return Tested(best.component, best.requested, best.p50_ms, best.p95_ms, best.load_ms, best.rss_bytes)

    async def activate(self, candidate: Candidate, tested: Tested) -> None:
        """See `ota.client.ports.Host.activate`."""
        await self._serve(candidate, self._verdict(candidate, tested.component, tested.delegate))

    async def probation(self, candidate: Candidate) -> Probation:
        """See `ota.client.ports.Host.probation`."""
        limits, runtime = self._config.update, self._line(candidate.line)
        seconds = limits.probation_s * limits.probation_scale
        wanted = max(1, round(limits.probation_results * limits.probation_scale))
        started = time.monotonic()
        while True:
            tally, elapsed = runtime.tally, time.monotonic() - started
            self._check_probation(candidate, runtime)
            if elapsed >= seconds and tally.results >= wanted:
                return Probation(tally.results, elapsed, tally.p95_ms(), synthetic=False)
            if elapsed >= 2 * seconds + limits.run_timeout_s:
                return await self._synthetic(candidate, runtime, elapsed)
            await asyncio.sleep(PROBATION_TICK_S)

    async def revert(self, line: str, previous: Candidate | None) -> None:
        """See `ota.client.ports.Host.revert`."""
        runtime = self._line(line)
        if previous is None:
            await runtime.stop()
            return
        if runtime.serving is not None and runtime.serving.candidate.release.sha256 == previous.release.sha256:
            return
        await self.resume(previous)

    async def resume(self, candidate: Candidate) -> None:
        """Serve a committed release after a start: by its kept verdict, or by a new trial where there is none.

        Raises:
            OtaError: it cannot be served now; where a verdict is known the line goes on trying.
        """
        runtime, model = self._line(candidate.line), candidate.component.plain_sha256
        while True:
            ladder, ranked = self._ladder(runtime), rank(self._verdicts.get(candidate.line, []))
            best = next((v for v in ranked if v.model == model and v.requested in ladder), None)
            if best is None:
                tested = await self.self_test(candidate)
                best = self._verdict(candidate, tested.component, tested.delegate)
            try:
                return await self._serve(candidate, best)
            except OtaError:
                if self._owner(best.requested, runtime):
                    continue  # another line came first: on what is left
                runtime.keep_trying(candidate, best)
                raise

    async def _serve(self, candidate: Candidate, verdict: Verdict) -> None:
        runtime, exclusive = self._line(candidate.line), verdict.requested in self._profile.exclusive
        try:
            # a trial of another line may have it open
            async with self._lending if exclusive else nullcontext():
                # another line may have come first while this one was tried
                self._refuse_taken(runtime, [(verdict.component, verdict.requested)])
                await runtime.serve(candidate, verdict, alone=exclusive and runtime.holds(verdict.requested))
        except AgentError as e:
            if e.reason is AgentReason.WORKER_UNAVAILABLE:
                raise _busy(e) from e  # no source, no host: that is no verdict on the release
            reason = _REJECTIONS.get(e.reason, Reason.WORKER_CRASHED)
            raise Rejected(reason, f"{candidate.line} {candidate.version}: {e.message}", hint=e.hint) from e

    def _check_probation(self, candidate: Candidate, runtime: LineRuntime) -> None:
        tally, budget = runtime.tally, candidate.release.budgets.p95_ms
        if tally.crashes >= MAX_PROBATION_CRASHES:
            cause = tally.last_crash or AgentReason.WORKER_CRASHED
            raise Rejected(
                _REJECTIONS.get(cause, Reason.WORKER_CRASHED),
                f"{candidate.line} {candidate.version} ended {tally.crashes} times in probation",
            )
        if budget is not None and tally.results >= 100 and quantile(tally.recent_ms, 0.95) > budget:
            raise Rejected(
                Reason.OVER_BUDGET,
                f"{candidate.line} {candidate.version}: p95 {tally.p95_ms():.2f} ms in service, budget {budget:.2f} ms",
            )

    async def _synthetic(self, candidate: Candidate, runtime: LineRuntime, elapsed: float) -> Probation:
        """Too few frames came (a dark or absent camera): golden vectors stand in as heartbeats."""
        tested = runtime.serving.verdict.component if runtime.serving else candidate.component.name
        for _ in range(SYNTHETIC_BEATS):
            golden = await candidate.open(candidate.release.golden.name)
            try:
                await runtime.heartbeat(golden, tested, dict(candidate.release.graph.get("golden", {})))
            except AgentError as e:
                if e.reason is AgentReason.WORKER_UNAVAILABLE:
                    raise _busy(e) from e
                reason = _REJECTIONS.get(e.reason, Reason.PROBATION_FAILED)
                raise Rejected(reason, f"{candidate.line} {candidate.version}: {e.message}") from e
            finally:
                os.close(golden)
        return Probation(runtime.tally.results, elapsed, runtime.tally.p95_ms(), synthetic=True)

    def _verdict(self, candidate: Candidate, component: str, delegate: str) -> Verdict:
        model = candidate.release.component(component).plain_sha256
        for verdict in self._verdicts.get(candidate.line, []):
            if (verdict.model, verdict.requested) == (model, delegate):
                return verdict
        return Verdict(component, delegate, model=model)

    def _line(self, name: str) -> LineRuntime:
        if name not in self._lines:
            raise Rejected(
                Reason.INCOMPATIBLE, f"this device has no line {name!r}", hint="add a [[line]] table to agent.toml"
            )
        return self._lines[name]

    def _ladder(self, runtime: LineRuntime) -> tuple[str, ...]:
        """The delegates that the line may use now: one that a single process may have open is the line's it serves."""
        return tuple(name for name in self._allowed(runtime) if not self._owner(name, runtime))

    def _allowed(self, runtime: LineRuntime) -> tuple[str, ...]:
        return runtime.config.delegates or self._profile.delegates

    def _owner(self, delegate: str, but: LineRuntime | None = None) -> str:
        """The line, other than `but`, that owns an exclusive delegate; empty for none and for any other delegate."""
        if delegate not in self._profile.exclusive:
            return ""
        return next((name for name, line in self._lines.items() if line is not but and line.holds(delegate)), "")

    def _refuse_taken(self, runtime: LineRuntime, pairs: Sequence[tuple[str, str]]) -> None:
        """Say "not now" when one of the (component, delegate) `pairs` needs what another line owns.

        Raises:
            Rejected: `busy`.
        """
        for _, delegate in pairs:
            if owner := self._owner(delegate, runtime):
                raise Rejected(
                    Reason.BUSY,
                    f"{delegate} serves line {owner}, and one process alone may have it open",
                    hint=f"allow line {runtime.config.name} or {owner} another delegate in agent.toml",
                    retry=True,
                )

    async def _try(self, runtime: LineRuntime, subject: Subject, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Try `pairs`: what needs an exclusive delegate one after the other, while nothing else has it open."""
        alone = [pair for pair in pairs if pair[1] in self._profile.exclusive]
        beside = [pair for pair in pairs if pair not in alone]
        found = dict(zip(beside, await self._trials.run(subject, beside), strict=True))
        async with AsyncExitStack() as stack:
            if alone:
                await stack.enter_async_context(self._lending)
                # another line may have come first while this one waited
                self._refuse_taken(runtime, alone)
            if any(runtime.holds(delegate) for _, delegate in alone):
                await stack.enter_async_context(runtime.lend())
            for pair in alone:
                (found[pair],) = await self._trials.run(subject, [pair])
        return [found[pair] for pair in pairs]

    def _keep(self, line: str, verdicts: Sequence[Verdict]) -> None:
        """A trial says nothing new about other files, the release before among them: their older verdicts stay."""
        tried = {v.model for v in verdicts}
        older = [v for v in self._verdicts.get(line, []) if v.model not in tried]
        self._verdicts[line] = [*verdicts, *older][:MAX_KEPT_VERDICTS]
        document = {name: [v.to_json() for v in kept] for name, kept in self._verdicts.items()}
        try:
            self._write(VERDICTS_NAME, json.dumps(document, indent=1).encode())
        except OtaError as e:
            log.warning("verdicts are not kept: %s", e.message, extra={"reason": e.reason.value})


def rejection(reason: AgentReason, otherwise: Reason) -> Reason:
    """What a worker's fault is called in an update."""
    return _REJECTIONS.get(reason, otherwise)


def _busy(error: AgentError) -> OtaError:
    """The device's own trouble, which the next look may find gone."""
    return OtaError(Reason.BUSY, error.message, hint=error.hint, retry=True)


def _load_verdicts(path: Path) -> dict[str, list[Verdict]]:
    """Kept verdicts; a damaged file only costs a new trial."""
    try:
        data = strictjson.loads(path.read_bytes(), max_bytes=MAX_VERDICTS_BYTES, what=path.name)
        return {line: [Verdict(**item) for item in items] for line, items in data.items()}
    except FileNotFoundError:
        return {}
    except (OSError, OtaError, TypeError, AttributeError) as e:
        log.warning("%s is unreadable and will be made anew: %s", path, e)
        return {}
