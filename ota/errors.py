"""Errors of the `ota` package: one root, a closed set of reasons, and what to do next.

A reason is at once the telemetry value, the key of the exit code and what a test asserts; its text never changes.
"""

from __future__ import annotations

import enum


class Reason(str, enum.Enum):
    """Why an operation on a release, its metadata or its bytes was refused."""

    BAD_JSON = "bad_json"
    BAD_RELEASE = "bad_release"
    BAD_SPEC = "bad_spec"
    BAD_TARGET_NAME = "bad_target_name"
    BAD_SIGNATURE = "bad_signature"
    METADATA_EXPIRED = "metadata_expired"
    METADATA_ROLLBACK = "metadata_rollback"
    METADATA_MISMATCH = "metadata_mismatch"
    METADATA_TOO_LARGE = "metadata_too_large"
    NOT_FOUND = "not_found"
    SOURCE_UNREACHABLE = "source_unreachable"
    TRANSFER_TIMEOUT = "transfer_timeout"
    TRANSFER_CORRUPT = "transfer_corrupt"
    PAYLOAD_CORRUPT = "payload_corrupt"
    PAYLOAD_TRUNCATED = "payload_truncated"
    NOT_FOR_THIS_DEVICE = "not_for_this_device"
    NO_GRANT = "no_grant"
    UNSUPPORTED = "unsupported"
    INCOMPATIBLE = "incompatible"
    COUNTER_ROLLBACK = "counter_rollback"
    QUARANTINED = "quarantined"
    DELTA_MISMATCH = "delta_mismatch"
    DELTA_CORRUPT = "delta_corrupt"
    NO_SPACE = "no_space"
    STATE_CORRUPT = "state_corrupt"
    IO_ERROR = "io_error"
    BUSY = "busy"
    UNSAFE_FILE = "unsafe_file"
    # the broker: absent, not who it claims to be, or unwilling
    BROKER_UNREACHABLE = "broker_unreachable"
    BROKER_TLS = "broker_tls"
    BROKER_UNTRUSTED = "broker_untrusted"
    BROKER_WRONG_NAME = "broker_wrong_name"
    BROKER_EXPIRED = "broker_expired"
    BROKER_NOT_YET_VALID = "broker_not_yet_valid"
    BROKER_REFUSED = "broker_refused"
    BROKER_LOST = "broker_lost"
    SESSION_TAKEN_OVER = "session_taken_over"
    # what the trial and the probation of a candidate answer; the host that runs models maps its own faults onto these
    GOLDEN_MISMATCH = "golden_mismatch"
    WORKER_CRASHED = "worker_crashed"
    WORKER_HUNG = "worker_hung"
    WORKER_OUT_OF_MEMORY = "worker_out_of_memory"
    MODEL_UNLOADABLE = "model_unloadable"
    OVER_BUDGET = "over_budget"
    NO_DELEGATE = "no_delegate"
    PROBATION_FAILED = "probation_failed"
    OPERATOR = "operator"
    INTERRUPTED = "interrupted"
    # publisher
    REPOSITORY_EXISTS = "repository_exists"
    REPOSITORY_MISSING = "repository_missing"
    UNKNOWN_DEVICE = "unknown_device"
    UNKNOWN_RELEASE = "unknown_release"
    KEY_MISSING = "key_missing"
    RELEASE_EXISTS = "release_exists"
    DEVICE_EXISTS = "device_exists"
    BAD_REQUEST = "bad_request"
    BAD_USAGE = "bad_usage"


class OtaError(Exception):
    """Root of every error this package raises on purpose.

    Args:
        reason: stable cause.
        message: one line, names the thing at fault; never contains a secret.
        hint: one line, what a person can do next.
        retry: whether the same call can succeed later without anybody changing anything.
    """

    def __init__(self, reason: Reason, message: str, *, hint: str = "", retry: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.hint = hint
        self.retry = retry


class TrustError(OtaError):
    """Metadata that does not verify: the signer, or whoever stands between, is at fault."""


class TransferError(OtaError):
    """Bytes did not arrive, or arrived wrong."""


class BrokerError(OtaError):
    """The broker cannot be reached, is not the one it should be, or refuses."""


class PayloadError(OtaError):
    """A sealed payload, a grant or a delta that cannot be opened."""


class StoreError(OtaError):
    """The device's own disk refuses or lies."""


class Rejected(OtaError):
    """A candidate release that the device tried and refuses to run."""


class PublishError(OtaError):
    """The publisher's input or repository is wrong."""


# Exit codes shared by the two commands: sysexits where one fits, so that shell scripts can tell classes apart.
_EXIT = {
    "usage": 64,
    "bad_input": 65,
    "missing": 66,
    "unavailable": 69,
    "software": 70,
    "io": 74,
    "temporary": 75,
    "refused": 77,
}
_EXIT_CLASS = {
    Reason.BAD_USAGE: "usage",
    Reason.BAD_JSON: "bad_input",
    Reason.BAD_RELEASE: "bad_input",
    Reason.BAD_SPEC: "bad_input",
    Reason.BAD_REQUEST: "bad_input",
    Reason.BAD_TARGET_NAME: "bad_input",
    Reason.NOT_FOUND: "missing",
    Reason.REPOSITORY_MISSING: "missing",
    Reason.UNKNOWN_DEVICE: "missing",
    Reason.UNKNOWN_RELEASE: "missing",
    Reason.KEY_MISSING: "missing",
    Reason.SOURCE_UNREACHABLE: "unavailable",
    Reason.BROKER_UNREACHABLE: "unavailable",
    Reason.BROKER_TLS: "unavailable",
    Reason.BROKER_UNTRUSTED: "unavailable",
    Reason.BROKER_WRONG_NAME: "unavailable",
    Reason.BROKER_EXPIRED: "unavailable",
    Reason.BROKER_NOT_YET_VALID: "unavailable",
    Reason.BROKER_REFUSED: "unavailable",
    Reason.BROKER_LOST: "unavailable",
    Reason.SESSION_TAKEN_OVER: "unavailable",
    Reason.TRANSFER_TIMEOUT: "temporary",
    Reason.BUSY: "temporary",
    Reason.NO_SPACE: "io",
    Reason.IO_ERROR: "io",
    Reason.STATE_CORRUPT: "io",
}


def exit_code(reason: Reason) -> int:
    """Exit status of a command that ended with `reason`; 77 (refused) unless a narrower class fits."""
    return _EXIT[_EXIT_CLASS.get(reason, "refused")]
