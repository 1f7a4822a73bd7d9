"""What a worker's or a delegate's fault means for the release in an update; all else is the device's own trouble."""

from __future__ import annotations

from collections.abc import Sequence

from agent.daemon.selection import Verdict, failure, on_cpu
from agent.errors import AgentError
from agent.errors import Reason as AgentReason
from ota.errors import OtaError, Reason, Rejected

REJECTIONS = {
    AgentReason.GOLDEN_MISMATCH: Reason.GOLDEN_MISMATCH,
    AgentReason.OUTPUT_NOT_FINITE: Reason.GOLDEN_MISMATCH,
    AgentReason.DELEGATE_UNSTEADY: Reason.GOLDEN_MISMATCH,
    AgentReason.WORKER_CRASHED: Reason.WORKER_CRASHED,
    AgentReason.WORKER_HUNG: Reason.WORKER_HUNG,
    AgentReason.WORKER_OUT_OF_MEMORY: Reason.WORKER_OUT_OF_MEMORY,
    AgentReason.DELEGATE_LEAKS: Reason.WORKER_OUT_OF_MEMORY,
    AgentReason.MODEL_UNLOADABLE: Reason.MODEL_UNLOADABLE,
    AgentReason.MODEL_SHAPE: Reason.MODEL_UNLOADABLE,
    AgentReason.UNKNOWN_FORMAT: Reason.MODEL_UNLOADABLE,
    AgentReason.OVER_BUDGET: Reason.OVER_BUDGET,
    AgentReason.RUNTIME_MISSING: Reason.NO_DELEGATE,
    AgentReason.UNKNOWN_DELEGATE: Reason.NO_DELEGATE,
    AgentReason.NO_DELEGATE: Reason.NO_DELEGATE,
    AgentReason.DELEGATE_FELL_BACK: Reason.NO_DELEGATE,
    AgentReason.DELEGATE_PARTIAL: Reason.NO_DELEGATE,
    AgentReason.DELEGATE_BROKEN: Reason.NO_DELEGATE,
    AgentReason.DELEGATE_EXCLUSIVE: Reason.NO_DELEGATE,
}
# a rung that does not serve because of these may serve another day: the board's trouble, not the release's
HEALING = frozenset({
    AgentReason.RUNTIME_MISSING.value, AgentReason.DELEGATE_BROKEN.value, AgentReason.DELEGATE_TAKEN.value,
    AgentReason.DELEGATE_BUSY.value, AgentReason.DELEGATE_COMPILING.value,
})  # fmt: skip


def rejection(reason: AgentReason, otherwise: Reason = Reason.WORKER_CRASHED) -> Reason:
    """What a worker's fault is called in an update."""
    return REJECTIONS.get(reason, otherwise)


def refusal(what: str, verdicts: Sequence[Verdict]) -> Rejected:
    """Why release `what` does not run here: none of its `verdicts` passed. With `retry` only hardware is at fault that
    may be mended; a runtime of the processor comes with the system, and its absence is no such fault."""
    bad = failure(verdicts)
    board = [v for v in verdicts if v.reason in HEALING and not on_cpu(v.requested)] if bad.reason in HEALING else []
    bad = board[0] if board else bad
    mend = f"mend {bad.requested}; it is tried again by itself"
    hint = mend if board else "the release is quarantined here; publish a newer one"
    message = f"{what} on {bad.requested}: {bad.message}"
    return Rejected(rejection(AgentReason(bad.reason)), message, hint=hint, retry=bool(board))


def busy(error: AgentError) -> OtaError:
    """The device's own trouble, which the next look may find gone."""
    return OtaError(Reason.BUSY, error.message, hint=error.hint, retry=True)
