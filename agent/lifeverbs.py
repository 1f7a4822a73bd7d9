"""The verbs of `edge-agent` that begin and end a device's life in a fleet: enroll, reset."""

from __future__ import annotations

import argparse
import sys

from agent import client, config, screen
from agent.daemon import enroll as enrolment
from agent.daemon import enrolling
from agent.daemon.lock import become_owner
from agent.errors import ConfigError, Reason

_MAX_TOKEN = 1024


def enroll(args: argparse.Namespace) -> int:
    """Make a request, install a bundle, or do both with a token.

    Raises:
        AgentError, OtaError: it is not enrolled; what was there stays.
    """
    loaded = config.load(args.config)
    if (args.server is None) != (args.token is None):
        raise ConfigError(Reason.BAD_USAGE, "--server and --token belong together", hint="edge-agent enroll --help")
    bundle = None if args.bundle is None else enrolment.read(args.bundle)
    # on the command line every user of the board could read it
    token = sys.stdin.readline(_MAX_TOKEN).strip() if args.token == "-" else args.token
    become_owner(loaded.state_dir)
    try:
        with enrolling.opened(loaded.state_dir) as custody:
            if bundle is not None:
                done = enrolment.install(bundle, custody.load(), loaded.state_dir)
            elif args.server is not None:
                done = enrolment.by_token(args.server, token, custody.create(), loaded.state_dir)
            else:
                return _request(args, enrolment.request(enrolment.check_device(args.device), custody.create()))
        return screen.answer(args, {"device": done.device, "tenant": done.tenant, "broker": f"{done.host}:{done.port}"})
    except OSError as e:
        raise ConfigError(
            Reason.STATE_UNWRITABLE,
            f"{e.filename}: {e.strerror}",
            hint="run as the user of the service, or set state_dir",
        ) from e


def _request(args: argparse.Namespace, request: bytes) -> int:
    if args.out is None:
        sys.stdout.write(request.decode())
        return 0
    try:
        args.out.write_bytes(request)
    except OSError as e:
        raise ConfigError(
            Reason.BAD_USAGE,
            f"cannot write {args.out}: {e.strerror}",
            hint="as root this runs as the service's user, who must be allowed to write there; without --out the "
            "request is printed",
        ) from e
    print(
        f"wrote {args.out}; next: edge-ota enroll REPO {args.out.name} --broker HOST:PORT --out bundle.json",
        file=sys.stderr,
    )
    return 0


def reset(args: argparse.Namespace) -> int:
    """Wipe this device, by the daemon or beside a dead one.

    Raises:
        AgentError, OtaError: it is not done; once begun, the next start finishes it.
    """
    from agent import service  # with everything that a daemon needs

    loaded = config.load(args.config)
    if not args.yes:
        what = "destroys the keys, models, enrolment and settings of this device; there is no way back"
        if not sys.stdin.isatty() or input(f"this {what}. Type yes: ") != "yes":
            raise ConfigError(Reason.BAD_USAGE, f"reset {what}", hint="add --yes")
    if client.daemon_runs(loaded):
        client.ask(loaded, "POST", "/reset", {"owner": args.owner})
        client.wait_until_gone(loaded)
    else:
        service.reset_once(loaded, owner=args.owner)
    return screen.answer(args, {"state": "reset", "next": "edge-agent enroll --server URL --token TOKEN"})
