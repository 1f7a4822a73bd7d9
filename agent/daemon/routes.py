"""What may be asked of the running daemon: by the command line over the control socket, by the fleet over the broker.

Every request is checked here and carried out by the part that it concerns. Not here: how requests travel
(`agent.daemon.control`, `agent.daemon.link`), what an update does (`ota.client.updater`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from agent.daemon import metrics
from agent.daemon.commands import Check, Command, Hint, Rollback
from agent.daemon.control import Reply, Route, asker, json_reply, text_reply
from agent.daemon.link import Link
from agent.daemon.sideload import Sideloads, parse_request
from agent.daemon.status import Status
from agent.daemon.telemetry import Telemetry
from agent.daemon.updates import UpdateLoop
from agent.errors import ControlError, Reason
from ota.client.updater import Updater
from ota.errors import OtaError

log = logging.getLogger(__name__)

Spawn = Callable[[Coroutine[Any, Any, Any], str], None]


class Routes:
    """The requests of one daemon.

    Args:
        lines: names of the lines it has.
        link: None for a daemon without a broker.
        spawn: runs work that nobody waits for, under a name.
    """

    def __init__(
        self,
        lines: tuple[str, ...],
        updater: Updater,
        updates: UpdateLoop,
        sideloads: Sideloads,
        status: Status,
        link: Callable[[], Link | None],
        telemetry: Telemetry,
        spawn: Spawn,
    ) -> None:
        self._lines = lines
        self._updater = updater
        self._updates = updates
        self._sideloads = sideloads
        self._status = status
        self._link = link
        self._telemetry = telemetry
        self._spawn = spawn

    def table(self) -> dict[str, Route]:
        """The routes of the control socket."""
        return {
            "GET /status": self._get_status,
            "GET /metrics": self._get_metrics,
            "GET /modules": self._get_modules,
            "POST /check": self._post_check,
            "POST /rollback": self._post_rollback,
            "POST /cancel": self._post_cancel,
            "POST /retry": self._post_retry,
            "POST /sideload": self._post_sideload,
        }

    # --- over the broker ---------------------------------------------------------------------------------------------

    def command(self, command: Command) -> None:
        """Carry out an admitted command, or leave it to a task.

        Raises:
            ControlError: `unknown_line`, `no_previous`.
        """
        if isinstance(command, Check):
            self._updates.poke()
        elif isinstance(command, Rollback):
            self._check_rollback(command.line)
            self._spawn(self._roll_back(command.line), f"rollback {command.line}")
        elif (link := self._link()) is not None:
            link.report({**self._status.reported(), "asked": command.id})

    def hint(self, hint: Hint, delay_s: float) -> None:
        """Something may be new: look after `delay_s`."""
        self._updates.poke(delay_s)

    async def _roll_back(self, line: str) -> None:
        """An operator's wish, accepted before it was known whether it can be fulfilled: what hinders it is told."""
        try:
            await self._updater.rollback(line)
        except OtaError as e:
            log.error("line %s: no rollback: %s", line, e.message, extra={"reason": e.reason.value, "hint": e.hint})
            facts = {"line": line, "reason": e.reason.value, "message": e.message, "hint": e.hint}
            self._telemetry.event("rollback_refused", facts, alarm=True)

    # --- over the control socket -------------------------------------------------------------------------------------

    async def _get_status(self, _: Mapping[str, Any]) -> Reply:
        return json_reply(self._status.document())

    async def _get_metrics(self, _: Mapping[str, Any]) -> Reply:
        return text_reply(metrics.render(self._status.document()))

    async def _get_modules(self, _: Mapping[str, Any]) -> Reply:
        return json_reply({"modules": sorted({name.partition(".")[0] for name in sys.modules})})

    async def _post_check(self, _: Mapping[str, Any]) -> Reply:
        if (link := self._link()) is not None:
            link.retry_now()
        self._updates.poke()
        return json_reply({"state": "looking"})

    async def _post_rollback(self, fields: Mapping[str, Any]) -> Reply:
        line = self._check_rollback(fields.get("line"))
        event = await self._updater.rollback(line)
        return json_reply({"line": line, "version": event.version, "outcome": event.outcome})

    async def _post_cancel(self, fields: Mapping[str, Any]) -> Reply:
        line = self._check_line(fields.get("line"))
        cancelled = await self._updater.cancel(line)
        return json_reply({"line": line, "state": "cancelled" if cancelled else "no update was running"})

    async def _post_retry(self, fields: Mapping[str, Any]) -> Reply:
        line = self._check_line(fields.get("line"))
        lifted = list(self._updater.record.line(line).quarantine.values())
        self._updater.retry(line)
        self._updates.poke()
        return json_reply({"line": line, "quarantine lifted": len(lifted), "state": "looking"})

    async def _post_sideload(self, fields: Mapping[str, Any]) -> Reply:
        path, allow_expired = parse_request(fields)
        return json_reply(await self._sideloads.install(path, asker(), allow_expired=allow_expired))

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check_line(self, line: object) -> str:
        if not isinstance(line, str) or line not in self._lines:
            raise ControlError(
                Reason.UNKNOWN_LINE, f"this device has no line {line!r}", hint=f"lines: {', '.join(self._lines)}"
            )
        return line

    def _check_rollback(self, line: object) -> str:
        known = self._check_line(line)
        if self._updater.record.line(known).previous is None:
            raise ControlError(
                Reason.NO_PREVIOUS, f"{known} has no previous release", hint="edge-agent status shows what is installed"
            )
        return known
