"""The verbs of `edge-ota` for the life of a device: token, listen, revoke, replace, decommission."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ota import enrolment
from ota.errors import PublishError, Reason
from ota.publisher import enroll, files, hints, revocation, tokens
from ota.publisher.arguments import address, hours, listening_address, seconds, web_address
from ota.publisher.certificates import REVOKED_LIST
from ota.publisher.enroll import Places
from ota.publisher.reports import Add, Report, Surroundings, device_data
from ota.publisher.repository import Repository

if TYPE_CHECKING:
    from ota.publisher.listener import Listener

_DEFAULT_SPREAD_S = 60
_ANYWHERE = ("0.0.0.0", "::")


def add_device_verbs(add: Add) -> None:
    """Add them to the parser."""
    sub = add("token", _token, "Make a one-time token with which a new device enrols itself.")
    sub.add_argument("device", metavar="DEVICE")
    _add_hours(sub)

    sub = add("listen", _listen, "Enrol devices by token and renew their certificates, over HTTPS, until stopped.")
    sub.add_argument(
        "--bind", type=listening_address, required=True, metavar="HOST[:PORT]",
        help=f"address to listen on (default port: {enrolment.DEFAULT_PORT})",
    )  # fmt: skip
    sub.add_argument("--broker", type=address, required=True, metavar="HOST[:PORT]", help="as devices reach it")
    add_listener_options(sub)

    sub = add("revoke", _revoke, "Expel a lost or stolen device: certificates revoked, no grants, its keys wiped.")
    sub.add_argument("device", metavar="DEVICE")
    _add_reason_and_hint(sub)

    sub = add("replace", _replace, "Give a device's id to another board: old certificates revoked, same releases.")
    sub.add_argument("device", metavar="DEVICE")
    sub.add_argument("request", nargs="?", type=Path, metavar="REQUEST", help="the new board's enroll-request.json")
    sub.add_argument("--token", action="store_true", help="print a token for the new board instead")
    _add_hours(sub)
    sub.add_argument("--broker", type=address, metavar="HOST[:PORT]", help="with REQUEST: as the device reaches it")
    sub.add_argument("--out", type=Path, metavar="BUNDLE", help="with REQUEST: where the bundle goes")
    sub.add_argument("--renewal", type=web_address, default="", metavar="URL", help="of the enrolment listener")
    sub.add_argument("--https", type=web_address, default="", metavar="URL", help="of a web server with the repository")

    sub = add("decommission", _decommission, "Take a device out for good: revoked, and its assignments removed.")
    sub.add_argument("device", metavar="DEVICE")
    _add_reason_and_hint(sub)


def add_listener_options(sub: argparse.ArgumentParser) -> None:
    """Options of whoever runs a listener."""
    sub.add_argument(
        "--url", type=web_address, default="", metavar="URL",
        help="https://HOST:PORT under which devices reach the listener (default: where it listens)",
    )  # fmt: skip
    sub.add_argument(
        "--https", type=web_address, default="", metavar="URL", help="of a web server with the repository, for bundles"
    )


def _add_hours(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--hours", type=hours, default=tokens.DEFAULT_HOURS, metavar="N",
        help=f"life of the token, at most {tokens.MAX_HOURS} (default: %(default)s)",
    )  # fmt: skip


def _add_reason_and_hint(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--reason", default="", metavar="TEXT", help="kept in audit.jsonl")
    sub.add_argument("--broker", type=address, metavar="HOST[:PORT]", help="tell the devices to look")
    sub.add_argument(
        "--spread", type=seconds, default=_DEFAULT_SPREAD_S, metavar="S",
        help="devices look after a random delay of at most S seconds (default: %(default)s)",
    )  # fmt: skip


# --- verbs -----------------------------------------------------------------------------------------------------------


def _token(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    return _token_report(tokens.make(repository, arguments.device, arguments.hours))


def _token_report(made: tokens.Made) -> Report:
    return Report(
        {
            "device": made.device,
            "token": made.text,
            "expires": made.expires.isoformat(),
            "replaces": made.replaces,
        },
        (
            made.text,
            f"  for {made.device}, once, until {made.expires:%Y-%m-%d %H:%M} UTC; it is a secret until then",
            "  on the device: edge-agent enroll --server https://HOST:PORT --token TOKEN",
        ),
    )


def _listen(arguments: argparse.Namespace, around: Surroundings) -> int:
    repository = Repository.open(arguments.repository, now=around.now)
    stop = threading.Event()
    former = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    listening = start_listener(repository, arguments.bind, arguments.broker, arguments.url, arguments.https)
    try:
        stop.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        listening.close()
    return 0


def start_listener(
    repository: Repository, bind: tuple[str, int], broker: tuple[str, int], url: str, https: str
) -> Listener:
    """Start the enrolment listener in threads of this process; the caller closes it.

    Args:
        url: under which devices reach it; empty for where it listens.

    Raises:
        PublishError: `bad_usage` when devices cannot be told where it is; `io_error`, `key_missing`.
    """
    # http.server is needed by this alone
    from ota.publisher.listener import Listener, Registrar, tls_context

    if not url and bind[0] in _ANYWHERE:
        raise PublishError(
            Reason.BAD_USAGE,
            f"{bind[0]} is no address that a device could be told",
            hint="add --url https://HOST:PORT as devices reach it",
        )
    shown = f"[{bind[0]}]" if ":" in bind[0] else bind[0]
    url = url or f"https://{shown}:{bind[1]}"
    name = web_address(url).removeprefix("https://").rpartition(":")[0].strip("[]")
    context = tls_context(repository, (name,))
    registrar = Registrar(repository, Places(broker[0], broker[1], url, https), clock=time.monotonic)
    listener = Listener(registrar, bind, context, _to_stderr)
    port = listener.start()
    _to_stderr(f"listening on {shown}:{port}, bundles say {url}")
    return listener


def _revoke(arguments: argparse.Namespace, around: Surroundings) -> Report:
    return _expel(arguments, around, decommission=False)


def _decommission(arguments: argparse.Namespace, around: Surroundings) -> Report:
    return _expel(arguments, around, decommission=True)


def _expel(arguments: argparse.Namespace, around: Surroundings, *, decommission: bool) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    with repository.locked():
        enroll.load_device(repository, arguments.device)
        # first: whoever enrols with one until then is expelled, whoever comes later finds none
        withdrawn = tokens.withdraw(repository, arguments.device)
    done = revocation.revoke(repository, arguments.device, arguments.reason, decommission=decommission)
    hint = hints.tell(repository, arguments.broker, None, arguments.spread)
    what = "decommissioned" if decommission else "revoked"
    return Report(
        {
            **device_data(repository, done.device),
            "certificates_revoked": done.certificates,
            "tokens_withdrawn": withdrawn,
            "crl": str(done.crl),
            "hinted": list(hint.lines),
        },
        (
            f"{arguments.device} is {what}: no grants, no renewal, {done.certificates} certificates revoked",
            f"  install {done.crl} as the broker's crlfile and restart it: systemctl restart mosquitto",
            f"  desired.json {done.desired_version} tells the device to wipe its keys when it next asks",
            *hint.told,
        ),
        hint.warnings,
        hint.status,
    )


def _replace(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    if arguments.token == (arguments.request is not None):
        raise PublishError(Reason.BAD_USAGE, "name the new board's REQUEST, or --token", hint="edge-ota replace --help")
    if arguments.token:
        return _token_report(tokens.make(repository, arguments.device, arguments.hours, replace=True))
    if arguments.broker is None or arguments.out is None:
        raise PublishError(Reason.BAD_USAGE, "REQUEST needs --broker and --out", hint="edge-ota replace --help")
    data = files.read_regular(arguments.request.resolve(), enroll.MAX_REQUEST_BYTES)
    if data is None:
        raise PublishError(Reason.NOT_FOUND, f"there is no request at {arguments.request}", hint="check the path")
    places = Places(arguments.broker[0], arguments.broker[1], arguments.renewal, arguments.https)
    enrolled = replace_board(repository, arguments.device, data, places)
    files.write_atomic(arguments.out, enrolled.bundle)
    device = enrolled.device
    return Report(
        {**device_data(repository, device), "bundle": str(arguments.out)},
        (
            f"{device.device} is another board now, certificate valid until {device.certificate_expires}",
            f"  bundle for the board: {arguments.out}",
            f"  install {repository.path / REVOKED_LIST} as the broker's crlfile and restart it: "
            "systemctl restart mosquitto",
        ),
    )


def replace_board(repository: Repository, device: str, request: bytes, places: Places) -> enroll.Enrolled:
    """Give the id of `device` to the board that made `request`, with everything the old board was granted.

    Raises:
        PublishError: `unknown_device` when there is nothing to replace; `bad_request` for another device's request, and
            as `enroll.enroll`.
    """
    wanted = enroll.parse_request(request)
    if wanted.device != device:
        raise PublishError(
            Reason.BAD_REQUEST, f"the request is of {wanted.device}, not of {device}", hint="name the right file"
        )
    with repository.locked():
        enroll.load_device(repository, device)
        return revocation.take_over(repository, wanted, places)


def _to_stderr(line: str) -> None:
    print(f"edge-ota listen: {line}", file=sys.stderr, flush=True)
