"""Sticks beside a dead daemon, for people who are not its user: systemd listens, and starts this with the daemon's own
credentials when somebody connects (edge-agent-sideload.socket). Who may connect, the mode of the socket says.

Answers `POST /sideload` as the daemon does, one after the other, and ends when nobody asks any more.
Invariant: while a daemon lives nothing is installed here (`daemon_running`), because the state directory is its.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent import service
from agent.config import Config
from agent.daemon.control import ControlServer, Reply, asker, json_reply
from agent.daemon.memory import keep_private
from agent.daemon.sideload import parse_request
from agent.errors import ConfigError, Reason

IDLE_S = 15.0
_FIRST_DESCRIPTOR = 3  # sd_listen_fds(3)


def serve(config: Config, environment: Mapping[str, str], idle_s: float = IDLE_S) -> int:
    """Answer until nobody was connected for `idle_s`; returns the exit code.

    Raises:
        ConfigError: `bad_usage` when systemd handed over no socket.
    """
    if (environment.get("LISTEN_PID"), environment.get("LISTEN_FDS")) != (str(os.getpid()), "1"):
        raise ConfigError(
            Reason.BAD_USAGE, "no socket was handed over", hint="systemctl start edge-agent-sideload.socket"
        )
    keep_private()
    with socket.socket(fileno=_FIRST_DESCRIPTOR) as listening:
        asyncio.run(_answer(config, environment, listening, idle_s))
    return 0


async def _answer(config: Config, environment: Mapping[str, str], listening: socket.socket, idle_s: float) -> None:
    one_at_a_time = asyncio.Lock()

    async def install(fields: Mapping[str, Any]) -> Reply:
        path, allow_expired = parse_request(fields)
        who = asker()
        async with one_at_a_time:
            return json_reply(
                await service.sideload_beside(config, environment, path, who, allow_expired=allow_expired)
            )

    server = ControlServer(Path(), {"POST /sideload": install}, listening)
    await server.start()
    try:
        quiet_s = 0.0
        while quiet_s < idle_s:
            await asyncio.sleep(min(1.0, idle_s))
            quiet_s = quiet_s + min(1.0, idle_s) if server.idle else 0.0
    finally:
        await server.stop()
