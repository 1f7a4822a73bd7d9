"""The verb of `edge-agent` for the technician with a stick: sideload, by the daemon or beside a dead one."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from agent import client, config, screen
from agent.errors import ConfigError, Reason


def sideload(args: argparse.Namespace) -> int:
    """Install from a directory or a stored zip, or answer those who want to on the socket from systemd.

    Raises:
        AgentError, OtaError: nothing was installed.
    """
    if args.socket:
        from agent import logs, rescue

        logs.set_up("INFO")
        return rescue.serve(config.load(args.config), os.environ)
    place = _absolute(args.path)
    loaded = client.located(args.config)
    if (reachable := client.who_installs(loaded)) is not None:
        body = {"path": _text(place), "allow_expired": args.allow_expired}
        answer = client.ask(reachable, "POST", "/sideload", body, timeout_s=client.WORK_TIMEOUT_S)
    else:
        from agent import logs, service
        from agent.daemon import askers

        logs.set_up("ERROR")  # how the update ended is this command's answer
        asker = askers.of_user(os.getuid())
        answer = service.sideload_once(loaded, os.environ, place, asker, allow_expired=args.allow_expired)
    return screen.answer(args, answer)


def _absolute(path: Path | None) -> Path:
    """The place that was named. One that this user may not look at may be open to whoever installs from it, who says
    what is wrong with it otherwise.

    Raises:
        ConfigError: `bad_usage`: none was named, or nothing is there.
    """
    hint = "edge-ota bundle REPO DEVICE OUT makes a stick"
    if path is None:
        raise ConfigError(Reason.BAD_USAGE, "no PATH is named", hint=hint)
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise ConfigError(Reason.BAD_USAGE, f"{path} does not exist", hint=f"is it mounted? {hint}") from e
    except OSError:
        pass
    return path.absolute()


def _text(path: Path) -> str:
    """`path` as a request can carry it.

    Raises:
        ConfigError: `bad_usage`.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as e:
        raise ConfigError(
            Reason.BAD_USAGE, f"{path} is a name that is not UTF-8", hint="mount the stick elsewhere: /media/stick"
        ) from e
    return os.fspath(path)
