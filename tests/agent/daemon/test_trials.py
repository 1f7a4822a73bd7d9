"""Trials over the real host: honest workers, dead hosts, cancelled trials, and workers that were taken over."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import pytest

from agent.daemon.selection import Verdict, rank
from agent.daemon.supervisor import Supervisor
from agent.daemon.trial import Subject
from agent.daemon.trials import TrialRunner, candidates, component_order, subject_of, transform
from agent.errors import AgentError, Reason
from ota.client.ports import Candidate
from tests.agent.daemon.rig import LIMITS, children, descriptors, hostile_host
from tests.workerpython import host_command

XNNPACK = "litert:xnnpack"


def run(
    body: Callable[[Supervisor, TrialRunner], Awaitable[None]],
    host: Sequence[str] | None = None,
    limits: object = LIMITS,
) -> None:
    """Run `body`; afterwards no worker and no descriptor of it is left."""

    async def main() -> None:
        before = descriptors()
        supervisor = Supervisor(listen=None, host_command=host or host_command(), on_lost=lambda: None)
        await supervisor.start()
        try:
            await body(supervisor, TrialRunner(supervisor, limits))  # type: ignore[arg-type]
            async with asyncio.timeout(60):
                while (
                    supervisor.host and os.path.exists(f"/proc/{supervisor.host.pid}") and children(supervisor.host.pid)
                ):
                    await asyncio.sleep(0.02)
        finally:
            await supervisor.stop()
        assert descriptors() <= before

    asyncio.run(main())


def one(subject: Subject, candidate: Candidate, host: Sequence[str] | None = None, limits: object = LIMITS) -> Verdict:
    """The verdict on the first component on XNNPACK."""
    verdicts: list[Verdict] = []

    async def body(_: Supervisor, trials: TrialRunner) -> None:
        verdicts.extend(await trials.run(subject, [(candidate.component.name, XNNPACK)]))

    run(body, host, limits)
    return verdicts[0]


def test_every_pair_gets_a_verdict_in_order_and_the_fastest_is_first_in_rank(parts: Candidate) -> None:
    async def body(_: Supervisor, trials: TrialRunner) -> None:
        pairs = candidates(parts.components, ("onnx:cpu", XNNPACK))
        assert {delegate for _, delegate in pairs} == {"onnx:cpu", XNNPACK}
        verdicts = await trials.run(subject_of(parts), pairs)
        assert [(v.component, v.requested) for v in verdicts] == pairs
        assert all(v.passed and 0 < v.min_ms <= v.p50_ms <= v.p95_ms for v in verdicts)
        assert rank(verdicts)[0].min_ms == min(v.min_ms for v in verdicts)

    run(body)


def test_a_format_that_a_delegate_does_not_take_is_a_verdict_and_spoils_no_other(parts: Candidate) -> None:
    async def body(_: Supervisor, trials: TrialRunner) -> None:
        name = parts.component.name
        wrong, right = await trials.run(subject_of(parts), [(name, "onnx:cpu"), (name, XNNPACK)])
        assert wrong.reason == "unknown_format"
        assert right.passed

    run(body)


def test_golden_vectors_that_do_not_come_out_are_a_verdict(parts: Candidate) -> None:
    strict = dict(subject_of(parts).tolerance)
    strict["atol"] = {name: [-1.0 for _ in values] for name, values in strict["atol"].items()}
    assert one(replace(subject_of(parts), tolerance=strict), parts).reason in ("golden_mismatch", "bad_message")


def test_a_model_that_kills_its_worker_is_a_verdict(parts: Candidate) -> None:
    async def body(supervisor: Supervisor, trials: TrialRunner) -> None:
        async def kill() -> int:
            assert supervisor.host is not None
            for pid in children(supervisor.host.pid):
                os.kill(pid, signal.SIGSEGV)
            await asyncio.sleep(0.3)
            return await parts.open(parts.release.golden.name)

        (verdict,) = await trials.run(replace(subject_of(parts), golden=kill), [(parts.component.name, XNNPACK)])
        assert verdict.reason == "worker_crashed"
        assert "SIGSEGV" in verdict.message

    run(body)


def test_a_host_that_dies_during_a_trial_is_no_verdict_on_the_model(parts: Candidate) -> None:
    async def body(supervisor: Supervisor, trials: TrialRunner) -> None:
        async def kill_host() -> int:
            assert supervisor.host is not None
            os.kill(supervisor.host.pid, signal.SIGKILL)
            await asyncio.sleep(0.3)
            return await parts.open(parts.release.golden.name)

        with pytest.raises(AgentError) as caught:
            await trials.run(replace(subject_of(parts), golden=kill_host), [(parts.component.name, XNNPACK)])
        assert caught.value.reason is Reason.WORKER_UNAVAILABLE

    run(body)


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.2, 0.5, 0.8])
def test_a_trial_cancelled_at_any_moment_leaves_nothing_behind(parts: Candidate, delay_s: float) -> None:
    async def body(_: Supervisor, trials: TrialRunner) -> None:
        pairs = candidates(parts.components, ("onnx:cpu", XNNPACK))
        trial = asyncio.create_task(trials.run(subject_of(parts), pairs))
        await asyncio.sleep(delay_s)
        trial.cancel()
        await asyncio.gather(trial, return_exceptions=True)
        assert trial.done()

    run(body)


def test_descriptors_that_a_worker_slips_into_its_answers_are_closed(parts: Candidate) -> None:
    assert one(subject_of(parts), parts, hostile_host("descriptors")).passed


@pytest.mark.parametrize("behaviour", ["no_runs", "huge_runs", "nan"])
def test_figures_that_no_honest_worker_gives_are_a_verdict_not_an_accident(parts: Candidate, behaviour: str) -> None:
    verdict = one(subject_of(parts), parts, hostile_host(behaviour))
    assert verdict.reason in ("bad_message", "worker_crashed")


def test_a_worker_cannot_buy_its_model_time_by_saying_that_it_loaded_for_years(parts: Candidate) -> None:
    """How long the one that serves may take to load follows from it."""
    verdict = one(subject_of(parts), parts, hostile_host("slow"))
    assert verdict.passed
    assert 0 < verdict.load_ms <= 1000 * LIMITS.load_timeout_s


def test_what_a_worker_says_reaches_nobody_as_control_characters(parts: Candidate) -> None:
    """Half a surrogate pair would stop the retained report, a line break would forge a log line."""
    assert one(subject_of(parts), parts, hostile_host("surrogate")).reason == "worker_crashed"


def test_a_worker_cannot_excuse_its_model_with_a_missing_host(parts: Candidate) -> None:
    assert one(subject_of(parts), parts, hostile_host("excuse")).reason == "worker_crashed"


def test_a_model_that_hangs_is_killed_and_called_hung(parts: Candidate) -> None:
    limits = replace(LIMITS, run_timeout_s=0.5)
    assert one(subject_of(parts), parts, hostile_host("deaf"), limits).reason == "worker_hung"


def test_a_worker_that_speaks_nonsense_has_crashed_and_did_not_run_out_of_memory(parts: Candidate) -> None:
    assert one(subject_of(parts), parts, hostile_host("garbage")).reason == "worker_crashed"


def test_a_worker_that_closes_its_socket_first_may_still_tell_its_exit_code(parts: Candidate) -> None:
    verdict = one(subject_of(parts), parts, hostile_host("cut"))
    assert verdict.reason == "worker_crashed"
    assert "exit code 3" in verdict.message


def test_a_transform_that_hangs_or_is_cancelled_leaves_nothing_behind() -> None:
    async def body(supervisor: Supervisor, _: TrialRunner) -> None:
        payload = os.memfd_create("payload")
        try:
            task = asyncio.create_task(transform(supervisor, "zstd", 10, payload, None, timeout_s=30))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            with pytest.raises(AgentError):
                await transform(supervisor, "zstd", 10, payload, None, timeout_s=30)
        finally:
            os.close(payload)

    run(body)


def test_the_component_of_the_last_verdict_is_fetched_first(parts: Candidate) -> None:
    ladder = (XNNPACK, "onnx:cpu")
    names = component_order(parts.release, ladder)
    assert set(names) == {component.name for component in parts.release.components}
    assert component_order(parts.release, ladder, [Verdict(names[1], "onnx:cpu")])[0] == names[1]
    assert component_order(parts.release, ladder, [Verdict("gone", "onnx:cpu")]) == names
    assert component_order(parts.release, ()) == []


def test_the_best_by_the_objective_of_the_line_is_fetched_first(parts: Candidate) -> None:
    ladder = (XNNPACK, "onnx:cpu")
    first, second = component_order(parts.release, ladder)
    last = [Verdict(first, XNNPACK, min_ms=1, cpu_ms=2), Verdict(second, "onnx:cpu", min_ms=2, cpu_ms=1)]
    assert component_order(parts.release, ladder, last)[0] == first
    assert component_order(parts.release, ladder, last, objective="power")[0] == second
    # on a rung that is no longer the line's it cannot win
    assert component_order(parts.release, (XNNPACK,), last, objective="power") == [first]


def test_the_publishers_order_for_the_profile_comes_before_the_last_verdict(parts: Candidate) -> None:
    ladder = (XNNPACK, "onnx:cpu")
    first, second = component_order(parts.release, ladder)
    stated = replace(parts.release, order={"board": (second, first)})
    assert component_order(stated, ladder, [Verdict(first, XNNPACK)], "board") == [second, first]
    assert component_order(stated, ladder, [], "another") == [first, second]


def test_a_component_whose_runtimes_were_all_missing_is_fetched_last(parts: Candidate) -> None:
    ladder = (XNNPACK, "onnx:cpu")
    first, second = component_order(parts.release, ladder)
    missing = [Verdict(first, XNNPACK, reason="runtime_missing"), Verdict(second, "onnx:cpu")]
    stated = replace(parts.release, order={"board": (first, second)})
    assert component_order(stated, ladder, missing, "board") == [second, first]
