"""A device that its fleet expelled: it wipes its keys, stops serving, and stays so over every restart.

Whether it is expelled only verified metadata says (`ota.client`); this module acts on it. Invariants: the mark is on
the disk before the first key is destroyed, so that a cut in between ends in the same state; a marked device opens no
key, no store and no connection, and serves nothing; it still answers `edge-agent status` with the reason.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent import __version__
from agent.config import Config
from agent.daemon import enroll, metrics
from agent.daemon.control import ControlServer, Reply, asker, json_reply, text_reply
from agent.daemon.notify import Notifier
from agent.errors import ControlError, Reason
from ota import strictjson
from ota.client import keyring
from ota.client.fsops import Fs
from ota.errors import Reason as OtaReason
from ota.errors import StoreError

MARK = "revoked.json"
HINT = "ask the operator; to use the board again: edge-agent reset --yes, then enrol it"
_BEAT_S = 5.0
# what people ask a daemon that serves
_REFUSED = (
    *("POST /cancel", "POST /check", "POST /retry", "POST /rollback", "POST /sideload"),
    *("GET /config", "GET /keys", "GET /modules", "POST /config", "POST /keys/rotate", "POST /keys/seal"),
)


def mark(state_dir: Path) -> None:
    """Expel this device: the mark, then the end of every key, then of the files they sealed.

    Raises:
        StoreError: the disk refuses; `serve` tries again at every start.
    """
    fs = Fs(state_dir)
    if not is_marked(state_dir):
        about = strictjson.canonical({"v": 1, "wall_s": int(time.time())})
        try:
            fs.write_atomic(MARK, about)
        except StoreError as e:
            if e.reason is not OtaReason.NO_SPACE:
                raise
            # a full disk must not save the keys: the models are room enough, and go anyway
            _remove_sealed(fs)
            fs.write_atomic(MARK, about)
    wipe(state_dir)


def is_marked(state_dir: Path) -> bool:
    """Whether this device was expelled."""
    return (state_dir / MARK).exists()


def wipe(state_dir: Path) -> None:
    """Destroy the keys, remove what they sealed and what says when something was seen here; again is well.

    Raises:
        StoreError: `io_error`.
    """
    fs = Fs(state_dir)
    keyring.wipe(fs)
    _remove_sealed(fs)


def _remove_sealed(fs: Fs) -> None:
    for folder in ("store", "inbox", "compiled", "captures"):
        for name in fs.names(folder):
            fs.remove(f"{folder}/{name}")


class RevokedDevice:
    """What is left of the daemon: its answers on the control socket."""

    def __init__(self, config: Config, environment: Mapping[str, str]) -> None:
        self._config = config
        self._notifier = Notifier(environment)
        self._started = time.monotonic()
        self._routes = {
            "GET /status": self._get_status,
            "GET /metrics": self._get_metrics,
            "POST /reset": self._post_reset,
        }
        self._routes |= dict.fromkeys(_REFUSED, self._refuse)
        self._control = ControlServer(config.control_socket, self._routes)
        self.leaving = asyncio.Event()

    async def serve(self) -> None:
        """Answer until SIGTERM, SIGINT or a reset."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.leaving.set)
        await self._control.start()
        self._notifier.send("READY=1", "STATUS=revoked")
        try:
            while not self.leaving.is_set():
                self._notifier.send("WATCHDOG=1")
                try:
                    async with asyncio.timeout(_BEAT_S):
                        await self.leaving.wait()
                except TimeoutError:
                    pass
        finally:
            self._notifier.send("STOPPING=1")
            await self._control.stop()

    def status(self) -> dict[str, Any]:
        """The status document of a device that does nothing."""
        enrolment = enroll.load(self._config.state_dir)
        message = "this device was revoked by its operator: its keys are destroyed and it serves nothing"
        return {
            "device": {
                "id": enrolment.device if enrolment else "",
                "tenant": enrolment.tenant if enrolment else "",
                "profile": "",
                "agent": __version__,
                "boot_id": "",
            },
            "isolation": "none",
            "custody": {"kind": "none", "sealed_to": "", "worth": "the keys were destroyed"},
            "link": {"state": "revoked", "message": message, "bytes": {}, "broker": "", "reason": "device_revoked"},
            "certificate": None,
            "sources": {},
            "lines": {},
            "locks": [],
            "conditions": [
                {"type": "Revoked", "status": "True", "reason": "device_revoked", "message": message, "hint": HINT}
            ],
            "process": {"pid": os.getpid(), "rss_bytes": 0, "uptime_s": round(time.monotonic() - self._started, 1)},
        }

    async def _get_status(self, _: Mapping[str, Any]) -> Reply:
        return json_reply(self.status())

    async def _get_metrics(self, _: Mapping[str, Any]) -> Reply:
        return text_reply(metrics.render(self.status()))

    async def _post_reset(self, fields: Mapping[str, Any]) -> Reply:
        from agent.daemon import reset

        asker().require_operator("reset this device")
        reset.begin(self._config.state_dir, owner=fields.get("owner") is True)
        self.leaving.set()
        return json_reply({"state": "resetting"})

    async def _refuse(self, _: Mapping[str, Any]) -> Reply:
        raise ControlError(Reason.DEVICE_REVOKED, "this device was revoked by its operator", hint=HINT)
