"""Errors of the `ota` package: one root, a closed set of reasons, and what to do next.

A reason is at once the telemetry value, the key of the exit code and what a test asserts; its text never changes.
"""

from __future__ import annotations

import enum

MAX_MESSAGE_CHARS = 400


class Reason(str, enum.Enum):
    """Why an operation on a release, its metadata or its bytes was refused."""

    BAD_JSON = "bad_json"
    BAD_RELEASE = "bad_release"
    BAD_SPEC = "bad_spec"
    BAD_TARGET_NAME = "bad_target_name"
    BAD_SIGNATURE = "bad_signature"
    # signed metadata past its date, by whose it is: each wants another key, and another person
    ROOT_EXPIRED = "root_expired"
    TIMESTAMP_EXPIRED = "timestamp_expired"
    SNAPSHOT_EXPIRED = "snapshot_expired"
    TARGETS_EXPIRED = "targets_expired"
    DELEGATED_EXPIRED = "delegated_expired"
    DESIRED_EXPIRED = "desired_expired"
    METADATA_ROLLBACK = "metadata_rollback"
    METADATA_MISMATCH = "metadata_mismatch"
    METADATA_TOO_LARGE = "metadata_too_large"
    NOT_FOUND = "not_found"
    SOURCE_UNREACHABLE = "source_unreachable"
    TRANSFER_TIMEOUT = "transfer_timeout"
    ROOT_UNREACHABLE = "root_unreachable"
    TRANSFER_CORRUPT = "transfer_corrupt"
    BLOCK_TOO_LARGE = "block_too_large"
    # not failures: the device waits for a better moment to fetch
    OUTSIDE_WINDOW = "outside_window"
    METERED = "metered"
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
    STATE_TIMEOUT = "state_timeout"
    SUPERSEDED = "superseded"
    SETTINGS_FAILED = "settings_failed"
    SETTINGS_REFUSED = "settings_refused"
    UNSAFE_FILE = "unsafe_file"
    BAD_ARCHIVE = "bad_archive"
    KEYRING_CORRUPT = "keyring_corrupt"
    KEYS_WIPED = "keys_wiped"
    SEALED_KEY_UNAVAILABLE = "sealed_key_unavailable"
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
    # the enrolment listener, and what it says of a device
    TOKEN_UNKNOWN = "token_unknown"
    TOKEN_USED = "token_used"
    TOKEN_EXPIRED = "token_expired"
    TOKEN_OTHER_DEVICE = "token_other_device"
    BAD_PROOF = "bad_proof"
    DEVICE_REVOKED = "device_revoked"
    CERTIFICATE_EXPIRED = "certificate_expired"
    TOO_MANY_ATTEMPTS = "too_many_attempts"
    SERVER_UNREACHABLE = "server_unreachable"
    SERVER_UNTRUSTED = "server_untrusted"
    SERVER_REFUSED = "server_refused"
    SERVER_NOT_YET_VALID = "server_not_yet_valid"


def one_line(text: str) -> str:
    """`text` on one line of at most `MAX_MESSAGE_CHARS`: control characters and line breaks are shown, not obeyed."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"


class OtaError(Exception):
    """Root of every error this package raises on purpose.

    Args:
        reason: stable cause.
        message: names the thing at fault; never contains a secret. What it quotes from outside is made one line.
        hint: what a person can do next; what helps with the reason in general when nothing narrower is known.
        retry: whether the same call can succeed later without anybody changing anything.
    """

    def __init__(self, reason: Reason, message: str, *, hint: str = "", retry: bool = False) -> None:
        self.message = one_line(message)
        super().__init__(self.message)
        self.reason = reason
        self.hint = one_line(hint) or _NEXT.get(reason, "")
        self.retry = retry


class TrustError(OtaError):
    """Metadata that does not verify: the signer, or whoever stands between, is at fault."""


class TransferError(OtaError):
    """Bytes did not arrive, or arrived wrong."""


class RootUnreachable(TransferError):
    """Root metadata stays unanswered while other metadata is answered: somebody may be holding back a rotation of
    keys, so the check does not go on from the root that is known."""


class BlockTooLarge(TransferError):
    """The source cannot send so large a block; one of `largest_bytes` gets through."""

    def __init__(self, message: str, largest_bytes: int) -> None:
        super().__init__(Reason.BLOCK_TOO_LARGE, message, hint="raise the broker's max_packet_size", retry=True)
        self.largest_bytes = largest_bytes


class Postponed(TransferError):
    """Nothing is wrong: payloads are not fetched now, by policy.

    `retry_in_s` is when to look again, None when only a change of the network or of the configuration helps.
    """

    def __init__(self, reason: Reason, message: str, *, hint: str, retry_in_s: float | None) -> None:
        super().__init__(reason, message, hint=hint, retry=False)
        self.retry_in_s = retry_in_s


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


# What helps in general; docs/reference/reasons.md says more.
_NEXT = {
    Reason.SETTINGS_REFUSED: "mend the settings and configure anew: edge-ota configure REPO DEVICE FILE",
    Reason.SETTINGS_FAILED: "nothing: the former settings are in force again; mend them and configure anew",
    Reason.SERVER_REFUSED: "look at the log of the enrolment server",
    Reason.BAD_JSON: "the file was damaged or was not made by edge-ota: copy it again",
    Reason.BAD_RELEASE: "build the release again: edge-ota release",
    Reason.BAD_SPEC: "correct the file; ota/FORMAT.md lists its keys",
    Reason.BAD_TARGET_NAME: "use a-z 0-9 . _ - and single /",
    Reason.BAD_SIGNATURE: "somebody else signed it, or keys changed without a new root",
    Reason.ROOT_EXPIRED: "check the clock; with the root keys: edge-ota rotate",
    Reason.TIMESTAMP_EXPIRED: "check the clock; publish again, or write the stick anew",
    Reason.SNAPSHOT_EXPIRED: "check the clock; publish again, or write the stick anew",
    Reason.TARGETS_EXPIRED: "check the clock; publish again, or write the stick anew",
    Reason.DELEGATED_EXPIRED: "check the clock; publish again, or write the stick anew",
    Reason.DESIRED_EXPIRED: "check the clock; publish again, or write the stick anew",
    Reason.METADATA_ROLLBACK: "an old copy is being served, or the repository was restored from a backup",
    Reason.METADATA_MISMATCH: "the repository is inconsistent: publish again",
    Reason.METADATA_TOO_LARGE: "look at who serves it: a publisher keeps within the limits of ota/FORMAT.md",
    Reason.NOT_FOUND: "publish, grant or copy what is missing",
    Reason.SOURCE_UNREACHABLE: "check the network, or mount the stick where the service sees it",
    Reason.TRANSFER_TIMEOUT: "it resumes where it stopped; is edge-ota serve running?",
    Reason.ROOT_UNREACHABLE: "compare the broker's ACL and bridges; a stick gets past it",
    Reason.TRANSFER_CORRUPT: "look at the block server or who stands between; copy the stick again",
    Reason.PAYLOAD_CORRUPT: "it is fetched again; if that fails too, publish a new version",
    Reason.PAYLOAD_TRUNCATED: "it is fetched again; if that fails too, publish a new version",
    Reason.NOT_FOR_THIS_DEVICE: "ask the operator for a grant: edge-ota grant REPO DEVICE LINE VERSION",
    Reason.NO_GRANT: "ask the operator for a grant: edge-ota grant REPO DEVICE LINE VERSION",
    Reason.UNSUPPORTED: "update the older of the two ends",
    Reason.INCOMPATIBLE: "update the agent, or grant a release for this device",
    Reason.COUNTER_ROLLBACK: "publish the older model again under a new version",
    Reason.QUARANTINED: "publish a newer release",
    Reason.DELTA_MISMATCH: "nothing: the full payload is fetched instead",
    Reason.DELTA_CORRUPT: "nothing: the full payload is fetched instead",
    Reason.NO_SPACE: "free space on the device's state partition",
    Reason.STATE_CORRUPT: "check the storage; a publisher's repository is restored from one backup",
    Reason.IO_ERROR: "check the storage: is it read-only, or failing?",
    Reason.BUSY: "wait and try again",
    Reason.UNSAFE_FILE: "copy it again as a plain file that only its owner can read",
    Reason.BROKER_UNREACHABLE: "check network, name and port; it is tried again by itself",
    Reason.BROKER_TLS: "is it the broker's TLS port?",
    Reason.BROKER_UNTRUSTED: "is it the right broker? give it a certificate of this repository",
    Reason.BROKER_WRONG_NAME: "edge-ota broker-certificate REPO NAME, with the name devices use",
    Reason.BROKER_EXPIRED: "check the clock; edge-ota broker-certificate makes a new certificate",
    Reason.BROKER_NOT_YET_VALID: "set the clock",
    Reason.BROKER_REFUSED: "look at the certificate, and at the broker's log and ACL",
    Reason.BROKER_LOST: "it comes back by itself; the broker's log says why",
    Reason.SESSION_TAKEN_OVER: "two devices have one certificate: revoke it and enrol one anew",
    Reason.GOLDEN_MISMATCH: "compare the delegates in edge-agent status, or build the release again",
    Reason.WORKER_CRASHED: "reproduce it with edge-agent bench",
    Reason.WORKER_HUNG: "reproduce it with edge-agent bench",
    Reason.WORKER_OUT_OF_MEMORY: "use a smaller model, or raise trial_memory_mb",
    Reason.MODEL_UNLOADABLE: "export the model again",
    Reason.OVER_BUDGET: "use a smaller model or another budget",
    Reason.NO_DELEGATE: "publish a component in another format; see the verdicts in edge-agent status",
    Reason.PROBATION_FAILED: "see the journal; publish a newer release",
    Reason.OPERATOR: "nothing: a person asked for it",
    Reason.INTERRUPTED: "nothing: it is tried again by itself",
    Reason.REPOSITORY_EXISTS: "choose another path; nothing is ever overwritten",
    Reason.REPOSITORY_MISSING: "edge-ota init REPO makes one",
    Reason.UNKNOWN_DEVICE: "edge-ota devices REPO lists those that are enrolled",
    Reason.UNKNOWN_RELEASE: "edge-ota publish REPO signs what is built",
    Reason.KEY_MISSING: "bring the key, or run the command where it is",
    Reason.RELEASE_EXISTS: "choose a new version",
    Reason.DEVICE_EXISTS: "choose another id, or add --replace if it is the same device",
    Reason.BAD_REQUEST: "make a new one on the device: edge-agent enroll",
    Reason.BAD_USAGE: "see --help",
    Reason.BLOCK_TOO_LARGE: "raise the broker's max_packet_size",
    Reason.OUTSIDE_WINDOW: "nothing: it is fetched when an update window opens",
    Reason.METERED: "nothing: it is fetched over an unmetered network",
    Reason.STATE_TIMEOUT: "nothing: it is tried again by itself",
    Reason.SUPERSEDED: "nothing: a newer release took its place",
    Reason.BAD_ARCHIVE: "write it again: edge-ota bundle REPO DEVICE OUT.zip",
    Reason.KEYRING_CORRUPT: "check the storage, then enrol the device again",
    Reason.KEYS_WIPED: "enrol the device again",
    Reason.SEALED_KEY_UNAVAILABLE: "systemctl status edge-agent; seal the credentials anew or enrol the device again",
    Reason.TOKEN_UNKNOWN: "ask the operator for a new one: edge-ota token REPO DEVICE",
    Reason.TOKEN_USED: "ask the operator for a new one: edge-ota token REPO DEVICE",
    Reason.TOKEN_EXPIRED: "ask the operator for a new one: edge-ota token REPO DEVICE",
    Reason.TOKEN_OTHER_DEVICE: "use the device id that the token was made for",
    Reason.BAD_PROOF: "enrol the device again",
    Reason.DEVICE_REVOKED: "ask the operator; a revoked device has to be enrolled again",
    Reason.CERTIFICATE_EXPIRED: "ask the operator; the device has to be enrolled again",
    Reason.TOO_MANY_ATTEMPTS: "wait and try again",
    Reason.SERVER_UNREACHABLE: "check network, name and port of the enrolment server",
    Reason.SERVER_UNTRUSTED: "is it the right server? ask the operator for a new token",
    Reason.SERVER_NOT_YET_VALID: "set the clock",
}

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
    Reason.BAD_ARCHIVE: "bad_input",
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
    Reason.SERVER_UNREACHABLE: "unavailable",
    Reason.SERVER_UNTRUSTED: "unavailable",
    Reason.SERVER_REFUSED: "unavailable",
    Reason.SERVER_NOT_YET_VALID: "temporary",
    Reason.TOO_MANY_ATTEMPTS: "temporary",
    Reason.TRANSFER_TIMEOUT: "temporary",
    Reason.ROOT_UNREACHABLE: "unavailable",
    Reason.OUTSIDE_WINDOW: "temporary",
    Reason.METERED: "temporary",
    Reason.BUSY: "temporary",
    Reason.STATE_TIMEOUT: "temporary",
    Reason.SUPERSEDED: "temporary",
    Reason.NO_SPACE: "io",
    Reason.IO_ERROR: "io",
    Reason.STATE_CORRUPT: "io",
    Reason.KEYRING_CORRUPT: "io",
    Reason.SEALED_KEY_UNAVAILABLE: "unavailable",
}


def exit_code(reason: Reason) -> int:
    """Exit status of a command that ended with `reason`; 77 (refused) unless a narrower class fits."""
    return _EXIT[_EXIT_CLASS.get(reason, "refused")]
