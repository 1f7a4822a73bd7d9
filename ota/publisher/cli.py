"""`edge-ota`: the publisher's command. Parses arguments, calls one function of this package, prints what it answered.

Results go to stdout, as text or with `--json` as one object; an error is one line `error: … [reason]` on stderr, one
line `hint: …`, and the exit code of its reason. Nothing here decides anything about a release.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from ota import __version__
from ota.errors import OtaError, PublishError, Reason, exit_code
from ota.publisher import (
    build,
    captureverbs,
    deviceverbs,
    director,
    enroll,
    files,
    hints,
    keyverbs,
    publish,
    revocation,
    spec,
    sticks,
)
from ota.publisher.arguments import Parser, address, listening_address, seconds, web_address
from ota.publisher.certificates import DEFAULT_BROKER_NAMES, SERVICE_NAME
from ota.publisher.configure import add_configure_verb
from ota.publisher.create import create
from ota.publisher.garbage import add_garbage_verb
from ota.publisher.ovir import add_pack_verb
from ota.publisher.publish import Published
from ota.publisher.recorder import Recorder
from ota.publisher.reports import Add, Report, Surroundings, Verb, device_data, release_data, release_lines
from ota.publisher.repository import Clock, Repository, system_clock
from ota.publisher.rollback import add_rollback_verb
from ota.publisher.settings import Settings
from ota.publisher.stickverbs import add_stick_verbs

_DEFAULT_SPREAD_S = 60
_NO_IMAGES = "  golden vectors are of generated inputs; [golden] images in the spec would tell more"


def main(
    argv: Sequence[str],
    *,
    recorder: Recorder | None = None,
    out: TextIO | None = None,
    err: TextIO | None = None,
    now: Clock = system_clock,
) -> int:
    """Run one command and return its exit status.

    Args:
        argv: arguments without the program's name.
        recorder: how models are described and run; without one, `release` refuses.
    """
    out, err = out or sys.stdout, err or sys.stderr
    arguments = argparse.Namespace(json=False)
    try:
        arguments = _parser().parse_args(argv)
        verb: Verb = arguments.verb
        report = verb(arguments, Surroundings(recorder, now))
    except SystemExit as e:  # --help and --version
        return int(e.code or 0)
    except OtaError as e:
        if arguments.json:
            print(json.dumps({"error": e.reason.value, "message": e.message, "hint": e.hint}), file=out)
        print(f"error: {e.message} [{e.reason.value}]" + (f"\nhint: {e.hint}" if e.hint else ""), file=err)
        return exit_code(e.reason)
    if isinstance(report, int):
        return report
    for warning in report.warnings:
        print(f"warning: {warning}", file=err)
    print(json.dumps(report.data, indent=2) if arguments.json else "\n".join(report.lines), file=out)
    return report.status


# -- verbs ------------------------------------------------------------------------------------------------------------


def _init(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = create(
        arguments.repository,
        configured=replace(Settings(), tenant=arguments.tenant),
        broker_names=tuple(arguments.broker_name or DEFAULT_BROKER_NAMES),
        now=around.now,
    )
    with repository.locked():
        sticks.create(repository)
    tls = repository.authority.broker_tls
    return Report(
        {
            "repository": str(repository.path),
            "tenant": repository.tenant,
            "broker": {"ca": str(tls.ca), "certificate": str(tls.certificate), "key": str(tls.key)},
        },
        (
            f"repository {repository.path} for tenant {repository.tenant}",
            f"  broker: {tls.ca.name}, {tls.certificate.name} and {tls.key.name} in {tls.ca.parent}, "
            f"valid for {', '.join(repository.authority.broker_names())}",
            "  keep root-*.pem and targets.pem elsewhere, of sticks/keys too: they sign new roots and new lines; "
            "publish asks for them in time",
            f"next: edge-ota release {repository.path} --spec FILE",
        ),
    )


def _release(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    wanted = spec.load(arguments.spec, model=arguments.model)
    release = build.build_release(repository, wanted, recorder=around.recorder, counter=arguments.counter)
    lines = [
        f"{release.line} {release.version} built, counter {release.release_counter}",
        *release_lines(repository, release),
        *(() if wanted.images else (_NO_IMAGES,)),
        f"next: edge-ota publish {repository.path}",
    ]
    return Report(release_data(repository, release, signed=False), tuple(lines))


def _publish(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    names: list[str] = arguments.releases
    if len(names) % 2:
        raise PublishError(
            Reason.BAD_SPEC, "name releases as LINE VERSION pairs", hint="or name none, to sign them all"
        )
    pairs = list(zip(names[::2], names[1::2], strict=True))
    signed = publish.publish(repository, pairs or None)
    renewed, missed, status = _renew_desired(repository)
    lines = [f"{r.line} {r.version} signed, counter {r.release_counter}" for r in signed.releases]
    lines += [] if lines or signed.unsigned else ["nothing was waiting to be signed"]
    lines += [f"desired.json of {len(renewed)} devices renewed"] if renewed else []
    lines.append(f"timestamp {signed.roles['timestamp']} is valid until {signed.timestamp_expires:%Y-%m-%d %H:%M} UTC")
    hint = hints.tell(
        repository, arguments.broker, sorted({release.line for release in signed.releases}), arguments.spread
    )
    return Report(
        {
            "releases": [release_data(repository, release, signed=True) for release in signed.releases],
            "roles": signed.roles,
            "timestamp_expires": signed.timestamp_expires.isoformat(),
            "renewed": [desired.device for desired in renewed],
            "hinted": list(hint.lines),
        },
        (*lines, *hint.told),
        (*_missing_keys(repository, signed), *missed, *keyverbs.ending(repository), *hint.warnings),
        exit_code(Reason.KEY_MISSING) if signed.unsigned else status or hint.status,
    )


def _renew_desired(repository: Repository) -> tuple[list[director.Desired], list[str], int]:
    """What was renewed for devices; or a warning and an exit status why not all was, the rest being signed."""
    try:
        return director.renew(repository), [], 0
    except OtaError as e:
        warning = f"not every desired.json could be renewed: {e.message}" + (f"; {e.hint}" if e.hint else "")
        return [], [warning], exit_code(e.reason)


def _missing_keys(repository: Repository, signed: Published) -> list[str]:
    """What a person has to bring keys for: now, or before it expires."""

    def bring(name: str) -> str:
        return f"bring {repository.keys.directory / name}.pem and publish again"

    advice = {"root": f"bring the root keys and replace one: edge-ota rotate {repository.path} root-1"}
    told = [f"{line} {version} is not signed: {bring(key)}" for (line, version), key in signed.unsigned.items()]
    for name, expires in signed.waiting.items():
        told.append(f"{name} expires on {expires:%Y-%m-%d} and has to be signed anew: {advice.get(name, bring(name))}")
    return told


def _grant(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    desired = director.grant(repository, arguments.device, arguments.line, arguments.version)
    lines = [
        f"{desired.device} may run {', '.join(f'{r.line} {r.version}' for r in desired.releases)}",
        f"  desired.json {desired.version}, {desired.grants} keys, valid until {desired.expires:%Y-%m-%d} UTC",
    ]
    hint = hints.tell(repository, arguments.broker, [arguments.line], arguments.spread)
    return Report(
        {
            "device": desired.device,
            "version": desired.version,
            "expires": desired.expires.isoformat(),
            "releases": [{"line": r.line, "version": r.version, "counter": r.counter} for r in desired.releases],
            "grants": desired.grants,
            "hinted": list(hint.lines),
        },
        (*lines, *hint.told),
        hint.warnings,
        hint.status,
    )


def _serve(arguments: argparse.Namespace, around: Surroundings) -> int:
    # paho is needed by this verb and by hints alone
    from ota.brokertls import Tls
    from ota.publisher import serve

    repository = Repository.open(arguments.repository, now=around.now)
    host, port = arguments.broker
    paths = repository.authority.client_tls(arguments.identity)
    with contextlib.ExitStack() as stack:
        if arguments.enroll is not None:
            listener = deviceverbs.start_listener(
                repository, arguments.enroll, arguments.broker, arguments.url, arguments.https
            )
            stack.callback(listener.close)
        return serve.run(
            repository,
            host=host,
            port=port,
            tls=Tls(str(paths.ca), str(paths.certificate), str(paths.key)),
            tenant=repository.tenant,
            client_id=arguments.identity,
        )


def _enroll(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    request = files.read_regular(arguments.request.resolve(), enroll.MAX_REQUEST_BYTES)
    if request is None:
        raise PublishError(Reason.NOT_FOUND, f"there is no request at {arguments.request}", hint="check the path")
    host, port = arguments.broker
    places = enroll.Places(host, port, arguments.renewal, arguments.https)
    wanted = enroll.parse_request(request)
    with repository.locked():
        enrolled = (revocation.take_over if arguments.replace else enroll.admit)(repository, wanted, places)
    files.write_atomic(arguments.out, enrolled.bundle)
    device = enrolled.device
    names = repository.authority.broker_names()
    warnings = (
        ()
        if host in names
        else (
            f"the broker's certificate is not valid for {host!r} but for {', '.join(names)}; "
            f"edge-ota broker-certificate {repository.path} {host} makes another",
        )
    )
    return Report(
        {**device_data(repository, device), "bundle": str(arguments.out)},
        (
            f"{device.device} enrolled, certificate valid until {device.certificate_expires}",
            f"  bundle for the device: {arguments.out}",
        ),
        warnings,
    )


def _devices(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    found = [device_data(repository, enroll.load_device(repository, name)) for name in repository.devices()]
    lines = [
        f"{d['device']}  {', '.join(r['line'] + ' ' + r['version'] for r in d['desired']) or 'nothing granted'}  "
        + (f"revoked {d['revoked']}" if d["revoked"] else f"certificate until {d['certificate_expires']}")
        for d in found
    ]
    return Report({"devices": found}, tuple(lines or ["no device is enrolled"]))


def _show(arguments: argparse.Namespace, around: Surroundings) -> Report:
    repository = Repository.open(arguments.repository, now=around.now)
    waiting = {(r.line, r.version): r for r in repository.prepared()}
    release = waiting.get((arguments.line, arguments.version))
    signed = release is None
    if release is None:
        release = repository.release(repository.find(arguments.line, arguments.version))
    state = "signed" if signed else "built, not signed"
    lines = [
        f"{release.line} {release.version}, counter {release.release_counter}, {state}, issued {release.issued}",
        f"  {release.graph['task']}, {len(release.graph['labels'])} labels, licence {release.licence}",
        *release_lines(repository, release),
    ]
    return Report(release_data(repository, release, signed=signed), tuple(lines))


# -- arguments ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="edge-ota", description="Builds, signs and serves releases of models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"edge-ota {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=Parser)

    def add(name: str, verb: Verb, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("repository", type=Path, metavar="REPO", help="directory of the repository")
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        sub.set_defaults(verb=verb)
        return sub

    _add_releases(add)
    _add_fleet(add)
    add_rollback_verb(add)
    add_garbage_verb(add)
    add_stick_verbs(add)
    deviceverbs.add_device_verbs(add)
    add_configure_verb(add)
    keyverbs.add_key_verbs(add)
    captureverbs.add_capture_verbs(add)
    add_pack_verb(verbs)
    return parser


def _add_releases(add: Add) -> None:
    sub = add("init", _init, "Make a repository with new keys.")
    sub.add_argument("--tenant", default=Settings().tenant, help="tenant in the topics (default: %(default)s)")
    sub.add_argument(
        "--broker-name", action="append", metavar="NAME", help="host name or address of the broker; may be repeated"
    )

    sub = add("release", _release, "Build a release: run its golden images, seal its files, make deltas.")
    sub.add_argument("--from", dest="model", type=Path, metavar="MODEL", help="the one model file of the release")
    sub.add_argument("--spec", type=Path, required=True, metavar="FILE", help="spec.toml")
    sub.add_argument("--counter", type=int, help="release counter (default: the line's last + 1)")

    sub = add("publish", _publish, "Sign what is built and a new timestamp; run it daily, it also renews.")
    sub.add_argument("releases", nargs="*", metavar="LINE VERSION", help="sign these alone")
    _add_hint(sub)

    sub = add("grant", _grant, "Say which release of a line a device should run, and give it the keys.")
    sub.add_argument("device", metavar="DEVICE")
    sub.add_argument("line", metavar="LINE")
    sub.add_argument("version", metavar="VERSION")
    _add_hint(sub)


def _add_fleet(add: Add) -> None:
    sub = add("serve", _serve, "Answer devices over MQTT until stopped.")
    sub.add_argument("--broker", type=address, required=True, metavar="HOST[:PORT]")
    sub.add_argument(
        "--as",
        dest="identity",
        default=SERVICE_NAME,
        metavar="NAME",
        help="identity towards the broker, one for each server process (default: %(default)s)",
    )
    sub.add_argument(
        "--enroll", type=listening_address, metavar="HOST[:PORT]", help="also run the enrolment listener there"
    )
    deviceverbs.add_listener_options(sub)

    sub = add("enroll", _enroll, "Answer a device's enroll-request.json with its bundle.")
    sub.add_argument("request", type=Path, metavar="REQUEST")
    sub.add_argument("--broker", type=address, required=True, metavar="HOST[:PORT]", help="as the device reaches it")
    sub.add_argument("--out", type=Path, required=True, metavar="BUNDLE")
    sub.add_argument("--renewal", type=web_address, default="", metavar="URL", help="of the enrolment listener")
    sub.add_argument("--https", type=web_address, default="", metavar="URL", help="of a web server with the repository")
    sub.add_argument("--replace", action="store_true", help="a known device came back with new keys")

    add("devices", _devices, "List the enrolled devices.")

    sub = add("show", _show, "Show a release and the size of its payloads.")
    sub.add_argument("line", metavar="LINE")
    sub.add_argument("version", metavar="VERSION")


def _add_hint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--broker", type=address, metavar="HOST[:PORT]", help="tell the devices to look")
    parser.add_argument(
        "--spread",
        type=seconds,
        default=_DEFAULT_SPREAD_S,
        metavar="S",
        help="devices look after a random delay of at most S seconds (default: %(default)s)",
    )
