"""Errors of the `agent` package: one root, a closed set of reasons, and what to do next.

A reason is at once the telemetry value, the key of the exit code and what a test asserts; its text never changes.
Importable on Python 3.10 with the standard library alone: workers raise these too.
"""

from __future__ import annotations

import enum

from ota.errors import one_line


class Reason(str, enum.Enum):
    """Why the agent refused to start, to run a model, or to obey."""

    BAD_CONFIG = "bad_config"
    BAD_PROFILE = "bad_profile"
    BAD_MESSAGE = "bad_message"
    BAD_USAGE = "bad_usage"
    SOURCE_MISSING = "source_missing"
    SOURCE_UNREADABLE = "source_unreadable"
    SOURCE_BUSY = "source_busy"
    SOURCE_REFUSED = "source_refused"
    SOURCE_LOST = "source_lost"
    SOURCE_STALE = "source_stale"
    SOURCE_CHANGED = "source_changed"
    RUNTIME_MISSING = "runtime_missing"
    UNKNOWN_DELEGATE = "unknown_delegate"
    UNKNOWN_FORMAT = "unknown_format"
    MODEL_MISSING = "model_missing"
    MODEL_UNLOADABLE = "model_unloadable"
    MODEL_SHAPE = "model_shape"
    IMAGE_UNREADABLE = "image_unreadable"
    DELEGATE_FELL_BACK = "delegate_fell_back"
    DELEGATE_BROKEN = "delegate_broken"
    DELEGATE_BUSY = "delegate_busy"
    DELEGATE_COMPILING = "delegate_compiling"
    DELEGATE_EXCLUSIVE = "delegate_exclusive"
    DELEGATE_LEAKS = "delegate_leaks"
    DELEGATE_PARTIAL = "delegate_partial"
    DELEGATE_TAKEN = "delegate_taken"
    DELEGATE_UNSTEADY = "delegate_unsteady"
    OUTPUT_NOT_FINITE = "output_not_finite"
    GOLDEN_MISMATCH = "golden_mismatch"
    WORKER_CRASHED = "worker_crashed"
    WORKER_HUNG = "worker_hung"
    WORKER_OUT_OF_MEMORY = "worker_out_of_memory"
    WORKER_UNAVAILABLE = "worker_unavailable"
    NO_DELEGATE = "no_delegate"
    OVER_BUDGET = "over_budget"
    KEY_UNSAFE = "key_unsafe"
    KEY_MISSING = "key_missing"
    SEALED_KEY_UNAVAILABLE = "sealed_key_unavailable"
    NOT_ENROLLED = "not_enrolled"
    BAD_BUNDLE = "bad_bundle"
    ALREADY_ENROLLED = "already_enrolled"
    DEVICE_REVOKED = "device_revoked"
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
    NOT_PERMITTED = "not_permitted"
    CLOCK_UNSETTABLE = "clock_unsettable"


class AgentError(Exception):
    """Root of every error this package raises on purpose.

    Args:
        reason: stable cause.
        message: names the thing at fault; never contains a secret. What it quotes from outside is made one line.
        hint: what a person can do next; what helps with the reason in general when nothing narrower is known.
    """

    def __init__(self, reason: Reason, message: str, *, hint: str = "") -> None:
        self.message = one_line(message)
        super().__init__(self.message)
        self.reason = reason
        self.hint = one_line(hint) or _NEXT.get(reason, "")


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


# What helps in general; docs/reference/reasons.md says more.
_NEXT = {
    Reason.CLOCK_UNSETTABLE: "edge-agent-clock.service sets it; see its unit for the right it needs",
    Reason.NOT_PERMITTED: "use sudo, or ask for the group that may",
    Reason.BAD_CONFIG: "edge-agent config check tests the file; docs/reference/config.md lists the keys",
    Reason.BAD_PROFILE: "set profile in agent.toml",
    Reason.BAD_MESSAGE: "update the older of the two ends",
    Reason.BAD_USAGE: "see --help",
    Reason.SOURCE_MISSING: "mend the path of the source in agent.toml",
    Reason.SOURCE_UNREADABLE: "let the edge-worker user read it, or encode it again",
    Reason.SOURCE_BUSY: "end the other program that uses the camera",
    Reason.SOURCE_REFUSED: "correct user and password of the camera",
    Reason.SOURCE_LOST: "it is opened again by itself; check cable, power and network",
    Reason.SOURCE_STALE: "it is waited for; check the camera",
    Reason.SOURCE_CHANGED: "it is opened again by itself; set one picture size in the camera",
    Reason.RUNTIME_MISSING: "install the runtime: pip install the extra litert, onnx or openvino",
    Reason.UNKNOWN_DELEGATE: "see docs/reference/cli.md for those that are known",
    Reason.UNKNOWN_FORMAT: "convert the model to .tflite or .onnx",
    Reason.MODEL_MISSING: "check the path of the model",
    Reason.MODEL_UNLOADABLE: "export the model again",
    Reason.MODEL_SHAPE: "correct the spec: the message names the tensor",
    Reason.IMAGE_UNREADABLE: "give a whole PNG or JPEG",
    Reason.DELEGATE_FELL_BACK: "use the delegate that really ran",
    Reason.DELEGATE_BROKEN: "check driver and firmware; the delegate's library is there and does not start",
    Reason.DELEGATE_BUSY: "it is tried again by itself; see what else has the device open",
    Reason.DELEGATE_COMPILING: "nothing to do: another delegate serves until it is ready, or compile_timeout_s is over",
    Reason.DELEGATE_EXCLUSIVE: "name it in exclusive of the device profile",
    Reason.DELEGATE_LEAKS: "update the runtime or driver; allow another delegate until then",
    Reason.DELEGATE_PARTIAL: "convert the model so that all of it runs there, or lower min_coverage of the line",
    Reason.DELEGATE_TAKEN: "give one of the two lines another delegate in agent.toml",
    Reason.DELEGATE_UNSTEADY: "update the driver, check power supply and temperature",
    Reason.OUTPUT_NOT_FINITE: "compare the delegates in edge-agent status; half precision may overflow",
    Reason.GOLDEN_MISMATCH: "compare the delegates in edge-agent status, or build the release again",
    Reason.WORKER_CRASHED: "reproduce it with edge-agent bench",
    Reason.WORKER_HUNG: "reproduce it with edge-agent bench",
    Reason.WORKER_OUT_OF_MEMORY: "use a smaller model, or raise trial_memory_mb",
    Reason.WORKER_UNAVAILABLE: "systemctl status edge-worker",
    Reason.NO_DELEGATE: "publish a component in another format; see the verdicts in edge-agent status",
    Reason.OVER_BUDGET: "use a smaller model or another budget",
    Reason.KEY_UNSAFE: "mend owner and mode; if others could read it, enrol again",
    Reason.KEY_MISSING: "enrol the device: edge-agent enroll --help",
    Reason.SEALED_KEY_UNAVAILABLE: "systemctl status edge-agent; seal the credentials anew or enrol the device again",
    Reason.NOT_ENROLLED: "enrol the device: edge-agent enroll --help",
    Reason.BAD_BUNDLE: "ask the operator for a new one: edge-ota enroll",
    Reason.ALREADY_ENROLLED: "edge-agent reset --owner --yes wipes the device; then enrol it",
    Reason.DEVICE_REVOKED: "ask the operator; edge-agent reset --yes, then enrol anew",
    Reason.BROKER_UNREACHABLE: "check network, name and port; it is tried again by itself",
    Reason.BROKER_REFUSED: "look at the certificate, and at the broker's log and ACL",
    Reason.BROKER_TLS: "is it the broker's TLS port?",
    Reason.UNKNOWN_COMMAND: "update the agent",
    Reason.COMMAND_EXPIRED: "send it again; check the clocks",
    Reason.COMMAND_RETAINED: "publish commands without retain",
    Reason.COMMAND_FLOOD: "send fewer",
    Reason.DAEMON_UNREACHABLE: "systemctl status edge-agent",
    Reason.DAEMON_RUNNING: "systemctl stop edge-agent first, or use the daemon",
    Reason.UNKNOWN_LINE: "edge-agent status lists the lines",
    Reason.NO_PREVIOUS: "publish the older model under a new version",
    Reason.STATE_UNWRITABLE: "run as the service's user; check state_dir and run_dir",
}

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
    Reason.SOURCE_BUSY: 75,
    Reason.SOURCE_REFUSED: 77,
    Reason.SOURCE_LOST: 69,
    Reason.SOURCE_STALE: 69,
    Reason.SOURCE_CHANGED: 69,
    Reason.KEY_MISSING: 66,
    Reason.SEALED_KEY_UNAVAILABLE: 69,
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
    Reason.ALREADY_ENROLLED: 77,
    Reason.DEVICE_REVOKED: 77,
    Reason.NOT_PERMITTED: 77,
    Reason.CLOCK_UNSETTABLE: 77,
}


def exit_code(reason: Reason) -> int:
    """Exit status of a command that ended with `reason`; 70 (software) unless a narrower class fits."""
    return _EXIT.get(reason, 70)
