"""Errors of the `agent` package: one root, a closed set of reasons, and what to do next.

A reason is at once the telemetry value, the key of the exit code and what a test asserts; its text never changes.
Importable on Python 3.10 with the standard library alone: workers raise these too.
"""

from __future__ import annotations

import enum


class Reason(str, enum.Enum):
    """Why the agent refused to start, to run a model, or to obey."""

    BAD_CONFIG = "bad_config"
    BAD_PROFILE = "bad_profile"
    BAD_MESSAGE = "bad_message"
    BAD_USAGE = "bad_usage"
    SOURCE_MISSING = "source_missing"
    SOURCE_UNREADABLE = "source_unreadable"
    RUNTIME_MISSING = "runtime_missing"
    UNKNOWN_DELEGATE = "unknown_delegate"
    UNKNOWN_FORMAT = "unknown_format"
    MODEL_MISSING = "model_missing"
    MODEL_UNLOADABLE = "model_unloadable"
    MODEL_SHAPE = "model_shape"
    IMAGE_UNREADABLE = "image_unreadable"
    DELEGATE_FELL_BACK = "delegate_fell_back"
    GOLDEN_MISMATCH = "golden_mismatch"
    WORKER_CRASHED = "worker_crashed"
    WORKER_HUNG = "worker_hung"
    WORKER_OUT_OF_MEMORY = "worker_out_of_memory"
    WORKER_UNAVAILABLE = "worker_unavailable"
    NO_DELEGATE = "no_delegate"
    OVER_BUDGET = "over_budget"
    KEY_UNSAFE = "key_unsafe"
    KEY_MISSING = "key_missing"
    NOT_ENROLLED = "not_enrolled"
    BAD_BUNDLE = "bad_bundle"
    BROKER_UNREACHABLE = "broker_unreachable"
    BROKER_REFUSED = "broker_refused"
    BROKER_TLS = "broker_tls"
    UNKNOWN_COMMAND = "unknown_command"
    COMMAND_EXPIRED = "command_expired"
    COMMAND_RETAINED = "command_retained"
    COMMAND_FLOOD = "command_flood"
    DAEMON_UNREACHABLE = "daemon_unreachable"
    DAEMON_RUNNING = "daemon_running"
    UNKNOWN_LINE = "unknown_line"
    NO_PREVIOUS = "no_previous"
    STATE_UNWRITABLE = "state_unwritable"


class AgentError(Exception):
    """Root of every error this package raises on purpose.

    Args:
        reason: stable cause.
        message: one line, names the thing at fault; never contains a secret.
        hint: one line, what a person can do next.
    """

    def __init__(self, reason: Reason, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.hint = hint


class ConfigError(AgentError):
    """The configuration file, a profile or the command line is wrong."""


class SourceError(AgentError):
    """Where frames come from is absent or broken."""


class ModelError(AgentError):
    """A model that cannot be loaded, or answers wrongly."""


class WorkerError(AgentError):
    """A worker process died, hung or cannot be started."""


class CustodyError(AgentError):
    """A key or credential is absent or kept unsafely."""


class ControlError(AgentError):
    """A command cannot be carried out by the daemon."""


# sysexits, so that shell scripts can tell classes apart
_EXIT = {
    Reason.BAD_CONFIG: 78,
    Reason.BAD_PROFILE: 78,
    Reason.NOT_ENROLLED: 78,
    Reason.BAD_USAGE: 64,
    Reason.UNKNOWN_DELEGATE: 64,
    Reason.BAD_BUNDLE: 65,
    Reason.IMAGE_UNREADABLE: 65,
    Reason.MODEL_UNLOADABLE: 65,
    Reason.MODEL_SHAPE: 65,
    Reason.UNKNOWN_FORMAT: 65,
    Reason.MODEL_MISSING: 66,
    Reason.SOURCE_MISSING: 66,
    Reason.SOURCE_UNREADABLE: 66,
    Reason.KEY_MISSING: 66,
    Reason.UNKNOWN_LINE: 66,
    Reason.NO_PREVIOUS: 66,
    Reason.BROKER_UNREACHABLE: 69,
    Reason.BROKER_REFUSED: 69,
    Reason.BROKER_TLS: 69,
    Reason.DAEMON_UNREACHABLE: 69,
    Reason.RUNTIME_MISSING: 69,
    Reason.WORKER_UNAVAILABLE: 69,
    Reason.STATE_UNWRITABLE: 73,
    Reason.DAEMON_RUNNING: 75,
    Reason.KEY_UNSAFE: 77,
}


def exit_code(reason: Reason) -> int:
    """Exit status of a command that ended with `reason`; 70 (software) unless a narrower class fits."""
    return _EXIT.get(reason, 70)
