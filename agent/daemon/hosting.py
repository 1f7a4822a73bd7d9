"""The updater's view of this board: choose a component, transform, self-test, activate, watch, revert.

Implements `ota.client.ports.Host` over the workers. The last verdicts of each line are kept, so that a restart serves
at once on the delegate that was measured before, and `choose` fetches only what can be expected to win. Invariants: no
two trials measure at once; a line never runs below the rung it should run on without saying so, and not at all where
its policy forbids that; what goes on in the background for a line ends before anything else is done with that line.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from agent import protocol
from agent.config import Config
from agent.daemon.background import Background
from agent.daemon.compiled import CompiledModels
from agent.daemon.contest import Contest
from agent.daemon.lines import LineRuntime
from agent.daemon.rejections import HEALING, REJECTIONS, busy, refusal, rejection
from agent.daemon.rungs import Rungs, selection_status
from agent.daemon.selection import Fall, Verdict, explain, figure, quantile, rank
from agent.daemon.supervisor import Supervisor
from agent.daemon.trial import MAX_NAME_CHARS
from agent.daemon.trials import Late, TrialRunner, candidates, component_order, subject_of, transform
from agent.daemon.verdicts import Verdicts, stale
from agent.daemon.worker import one_line
from agent.errors import AgentError
from agent.errors import Reason as AgentReason
from agent.profile import Profile
from ota.client.ports import Candidate, Choice, Probation, Tested
from ota.errors import OtaError, PayloadError, Reason, Rejected
from ota.release import Release

log = logging.getLogger(__name__)

TRANSFORM_TIMEOUT_S = 120.0
PROBATION_TICK_S = 0.1
MAX_PROBATION_CRASHES = 2
SYNTHETIC_BEATS = 3


class ModelHost:
    """`ota.client.ports.Host` for the lines of one device.

    Args:
        write: durable write of (name under the state directory, bytes).
        on_verdicts: called with (line, version, verdicts) after each trial.
        on_event: called with (kind, facts) for falls, stale verdicts, slow compilers and what was learnt of delegates.
        compiled: where what runtimes compiled is kept.
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
        on_event: Callable[[str, dict[str, object]], None] = lambda *_: None,
        compiled: CompiledModels | None = None,
    ) -> None:
        self._compilations = compiled
        self._config = config
        self._profile = profile
        self._supervisor = supervisor
        self._lines = lines
        self._on_verdicts = on_verdicts
        self._on_event = on_event
        self._trials = TrialRunner(supervisor, config.update)
        self._rungs = Rungs(profile, lines)
        self._contest = Contest(self._trials, self._rungs, lines, on_event)
        self._kept = Verdicts(config.state_dir, write, profile.name)
        self._stale: dict[str, str] = {}
        self._background = Background()

    def verdicts(self, line: str) -> list[Verdict]:
        """The last verdicts on every component of `line`; empty before the first trial."""
        return self._kept.of(line)

    def owners(self) -> dict[str, str]:
        """The line that owns each exclusive delegate in service."""
        return self._rungs.owners()

    def selection(self, line: str) -> dict[str, Any]:
        """How the line's delegate is chosen, for status: by what, what should serve and does not, what is tried now."""
        runtime = self._lines[line]
        serving = runtime.serving
        fallen = self._falls(serving.candidate, runtime, serving.verdict) if serving is not None else []
        return selection_status(runtime.config, fallen, self._stale.get(line, ""), self._trials.at_work)

    async def close(self) -> None:
        """End what goes on in the background."""
        await self._background.close()

    async def choose(self, release: Release) -> Choice:
        """See `ota.client.ports.Host.choose`."""
        runtime = self._line(release.line)
        last = self.verdicts(release.line)
        objective = runtime.config.objective
        order = component_order(release, self._rungs.ladder(runtime), last, self._profile.name, objective)
        if not order:
            self._rungs.refuse_taken(runtime, candidates(release.components, self._rungs.allowed(runtime)))
            raise Rejected(
                Reason.NO_DELEGATE,
                f"{release.line} {release.version} has no component that profile {self._profile.name} can run",
                hint="publish a component in a format this device runs, see edge-agent status",
            )
        explore = runtime.config.explore
        wanted = explore == "always" or (explore == "unmetered" and not self._config.update.metered)
        # without a verdict nothing is known about this line here: look at all components once
        return Choice(tuple(order), together=wanted and not rank(last))

    async def transform(self, codec: str, out_length: int, payload_fd: int, base_fd: int | None) -> int:
        """See `ota.client.ports.Host.transform`."""
        try:
            return await transform(
                self._supervisor, codec, out_length, payload_fd, base_fd, timeout_s=TRANSFORM_TIMEOUT_S
            )
        except AgentError as e:
            if e.reason is AgentReason.WORKER_UNAVAILABLE:
                raise busy(e) from e
            if e.reason in REJECTIONS:
                raise Rejected(REJECTIONS[e.reason], e.message, hint=e.hint) from e
            reason = Reason.DELTA_CORRUPT if base_fd is not None else Reason.PAYLOAD_CORRUPT
            raise PayloadError(reason, e.message, hint=e.hint) from e

    def exclusive(self, candidate: Candidate) -> Sequence[str]:
        """See `ota.client.ports.Host.exclusive`."""
        ladder = self._rungs.ladder(self._line(candidate.line))
        tried = {delegate for _, delegate in candidates(candidate.components, ladder)}
        return [delegate for delegate in self._rungs.exclusive if delegate in tried]

    async def self_test(self, candidate: Candidate) -> Tested:
        """See `ota.client.ports.Host.self_test`."""
        await self._background.settle(candidate.line)
        return await self._self_test(candidate)

    async def _self_test(self, candidate: Candidate) -> Tested:
        runtime = self._line(candidate.line)
        pairs = candidates(candidate.components, self._rungs.ladder(runtime))
        if not pairs:
            self._rungs.refuse_taken(runtime, candidates(candidate.components, self._rungs.allowed(runtime)))
            raise Rejected(
                Reason.NO_DELEGATE,
                f"no delegate allowed on this device runs {candidate.component.name}",
                hint="see delegates in agent.toml and the device profile",
            )
        subject = subject_of(candidate, runtime.config.threads, runtime.config.min_coverage, self._compilations)
        later = None if runtime.config.fallback == "error" else lambda late: self._compiles(candidate, late)
        try:
            verdicts = self._stamped(candidate, await self._contest.run(runtime, subject, pairs, later))
        except AgentError as e:
            raise busy(e) from e
        self._on_verdicts(candidate.line, candidate.version, verdicts)
        open_elsewhere = next((v for v in verdicts if v.reason == AgentReason.DELEGATE_BUSY.value), None)
        if open_elsewhere is not None:
            # waiting may take long, and still nothing below it is chosen because of it
            raise OtaError(Reason.BUSY, open_elsewhere.message, hint="it is tried again by itself", retry=True)
        objective = runtime.config.objective
        ranked = rank(verdicts, objective)
        if not ranked:
            raise refusal(f"{candidate.line} {candidate.version}", verdicts)
        log.info("line %s %s: %s", candidate.line, candidate.version, explain(verdicts, objective))
        self._kept.keep(candidate.line, verdicts)
        self._stale.pop(candidate.line, None)
        best = ranked[0]
        self._refuse_fall(candidate, runtime, best)
        return Tested(best.component, best.requested, best.p50_ms, best.p95_ms, best.load_ms, best.rss_bytes)

    async def activate(self, candidate: Candidate, tested: Tested) -> None:
        """See `ota.client.ports.Host.activate`."""
        runtime = self._line(candidate.line)
        await self._serve(candidate, self._verdict(candidate, tested.component, tested.delegate))
        # what compiled for long may have come in between
        ladder, config = self._rungs.ladder(runtime), runtime.config
        for component in candidate.components:
            model = component.plain_sha256
            if late := self._kept.best(candidate.line, model, ladder, config.threads, config.objective):
                await self._improve(candidate, late)

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
        await self._background.settle(line)
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
        await self._background.settle(candidate.line)
        runtime, model = self._line(candidate.line), candidate.component.plain_sha256
        config = runtime.config
        while True:
            ladder = self._rungs.ladder(runtime)
            best = self._kept.best(candidate.line, model, ladder, config.threads, config.objective)
            fallen = self._falls(candidate, runtime, best) if best is not None else []
            if best is None or (fallen and config.fallback == "error"):
                # where the policy forbids to fall, what failed another day is asked anew
                tested = await self._self_test(candidate)
                best = self._verdict(candidate, tested.component, tested.delegate)
            try:
                await self._serve(candidate, best)
            except OtaError:
                if self._rungs.owner(best.requested, runtime):
                    continue  # another line came first: on what is left
                runtime.keep_trying(candidate, best)
                raise
            if any(fall.reason in HEALING for fall in fallen):
                self._background.spawn(candidate.line, self._again(candidate))
            return

    async def _serve(self, candidate: Candidate, verdict: Verdict) -> None:
        runtime, exclusive = self._line(candidate.line), verdict.requested in self._rungs.exclusive
        runtime.on_loaded = self._loaded
        self._refuse_fall(candidate, runtime, verdict)
        try:
            # a trial of another line may have it open
            async with self._contest.lending if exclusive else nullcontext():
                # another line may have come first while this one was tried
                self._rungs.refuse_taken(runtime, [(verdict.component, verdict.requested)])
                await runtime.serve(candidate, verdict, alone=exclusive and runtime.holds(verdict.requested))
        except AgentError as e:
            if e.reason in (AgentReason.WORKER_UNAVAILABLE, AgentReason.DELEGATE_BUSY):
                raise busy(e) from e  # no source, no host, no turn: that is no verdict on the release
            reason = rejection(e.reason)
            raise Rejected(reason, f"{candidate.line} {candidate.version}: {e.message}", hint=e.hint) from e
        for fall in self._falls(candidate, runtime, verdict):
            facts = {"line": candidate.line, "version": candidate.version, "wanted": fall.wanted}
            self._on_event(
                "delegate_fell", {**facts, "reason": fall.reason, "message": fall.message, "using": fall.using}
            )

    def _check_probation(self, candidate: Candidate, runtime: LineRuntime) -> None:
        tally, budget = runtime.tally, candidate.release.budgets.p95_ms
        if tally.crashes >= MAX_PROBATION_CRASHES:
            cause = tally.last_crash or AgentReason.WORKER_CRASHED
            raise Rejected(
                rejection(cause),
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
                    raise busy(e) from e
                reason = rejection(e.reason, Reason.PROBATION_FAILED)
                raise Rejected(reason, f"{candidate.line} {candidate.version}: {e.message}") from e
            finally:
                os.close(golden)
        return Probation(runtime.tally.results, elapsed, runtime.tally.p95_ms(), synthetic=True)

    def _verdict(self, candidate: Candidate, component: str, delegate: str) -> Verdict:
        model = candidate.release.component(component).plain_sha256
        return self._kept.find(candidate.line, component, model, delegate)

    def _stamped(self, candidate: Candidate, verdicts: Sequence[Verdict]) -> list[Verdict]:
        models = {component.name: component.plain_sha256 for component in candidate.components}
        return self._kept.stamp(verdicts, models, self._line(candidate.line).config.threads)

    def _line(self, name: str) -> LineRuntime:
        if name not in self._lines:
            raise Rejected(
                Reason.INCOMPATIBLE, f"this device has no line {name!r}", hint="add a [[line]] table to agent.toml"
            )
        return self._lines[name]

    # --- falls -------------------------------------------------------------------------------------------------------

    def _falls(self, candidate: Candidate, runtime: LineRuntime, verdict: Verdict) -> list[Fall]:
        known = self._kept.about(candidate.line, [c.plain_sha256 for c in candidate.release.components])
        return self._rungs.falls(runtime, candidate.release, verdict.requested, known)

    def _refuse_fall(self, candidate: Candidate, runtime: LineRuntime, verdict: Verdict) -> None:
        """Where the line's policy forbids it, nothing runs below the rung that should serve.

        Raises:
            Rejected: the release is at fault that a rung does not serve, or `busy`: another line has it.
            OtaError: the board is.
        """
        fallen = self._falls(candidate, runtime, verdict) if runtime.config.fallback == "error" else []
        if not fallen:
            return
        fall = fallen[0]
        said = f"{candidate.line} {candidate.version} may not fall back to {fall.using}: {fall.wanted}: {fall.message}"
        hint = f'mend {fall.wanted}, or set fallback = "allow" in agent.toml'
        if fall.reason in (AgentReason.DELEGATE_TAKEN.value, AgentReason.DELEGATE_BUSY.value):
            raise Rejected(Reason.BUSY, said, hint=hint, retry=True)
        reason = rejection(AgentReason(fall.reason))
        if fall.reason in HEALING:
            raise OtaError(reason, said, hint=hint, retry=True)
        raise Rejected(reason, said, hint=hint)

    # --- in the background -------------------------------------------------------------------------------------------

    def _loaded(self, candidate: Candidate, verdict: Verdict, loaded: protocol.ModelLoaded) -> None:
        """A worker that serves says on what: a verdict of another runtime or driver is made anew beside it.

        Raises:
            AgentError: `delegate_fell_back`: it is not what was asked for.
        """
        if loaded.actual != verdict.requested:
            raise AgentError(AgentReason.DELEGATE_FELL_BACK, f"asked for {verdict.requested}, got {loaded.actual}")
        why = stale(verdict, one_line(loaded.runtime)[:MAX_NAME_CHARS], one_line(loaded.driver)[:MAX_NAME_CHARS])
        if not why or candidate.line in self._stale:
            return
        self._stale[candidate.line] = f"{verdict.requested}: {why}"
        log.warning("line %s: the verdict on %s is not used any more: %s", candidate.line, verdict.requested, why)
        facts: dict[str, object] = {"line": candidate.line, "delegate": verdict.requested, "message": why}
        self._on_event("verdict_stale", facts)
        self._background.spawn(candidate.line, self._again(candidate))

    async def _again(self, candidate: Candidate) -> None:
        """Try what serves once more on everything, and serve on what is best now."""
        try:
            tested = await self._self_test(candidate)
            await self._improve(candidate, self._verdict(candidate, tested.component, tested.delegate))
        except (AgentError, OtaError) as e:
            log.error("line %s: no new verdict: %s", candidate.line, e.message, extra={"reason": e.reason.value})

    def _compiles(self, candidate: Candidate, late: Late) -> None:
        facts: dict[str, object] = {"line": candidate.line, "version": candidate.version, "delegate": late.delegate}
        self._on_event("delegate_compiling", {**facts, "limit_s": self._config.update.compile_timeout_s})
        self._background.spawn(candidate.line, self._compiled(candidate, late))

    async def _compiled(self, candidate: Candidate, late: Late) -> None:
        """Serve on what has compiled at last, if it is better than what serves."""
        try:
            await late.compiled()
            async with self._contest.measuring:
                (verdict,) = self._stamped(candidate, [await late.verdict()])
            self._kept.keep(candidate.line, [verdict])
            facts: dict[str, object] = {"line": candidate.line, "delegate": verdict.requested}
            self._on_event(
                "delegate_compiled",
                {**facts, "reason": verdict.reason, "message": verdict.message, "load_ms": verdict.load_ms},
            )
            if verdict.passed:
                await self._improve(candidate, verdict)
        except (AgentError, OtaError) as e:
            log.error("line %s: %s", candidate.line, e.message, extra={"reason": e.reason.value})
        finally:
            await late.close()

    async def _improve(self, candidate: Candidate, verdict: Verdict) -> None:
        """Serve `candidate` on what `verdict` is about, if that is better for the line than what serves it now."""
        runtime = self._line(candidate.line)
        serving, objective = runtime.serving, runtime.config.objective
        if serving is None or serving.candidate.release.sha256 != candidate.release.sha256:
            return
        now = self._verdict(candidate, serving.verdict.component, serving.verdict.requested)
        same = (now.component, now.requested) == (verdict.component, verdict.requested)
        if not same and (not now.passed or figure(verdict, objective) < figure(now, objective)):
            await self._serve(candidate, verdict)
