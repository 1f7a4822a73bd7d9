"""Who asks: the user behind a request on a local socket, or behind a command, and what his groups allow.

Names of the groups are the shipped ones (packaging/systemd/sysusers.conf). A technician may use the control socket, so
he may install what the operator signed for this device. Only an operator, or root, may set a date aside.
"""

from __future__ import annotations

import grp
import os
import pwd
import socket
import struct
from dataclasses import dataclass

from agent.errors import ControlError, Reason

OPERATORS = "edge-operator"
TECHNICIANS = "edge-technician"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


@dataclass(frozen=True, slots=True)
class Asker:
    """A user of this board. `operator` says that he is root or in the operators' group."""

    uid: int
    name: str
    operator: bool

    def require_operator(self, what: str) -> None:
        """Refuse anybody else.

        Raises:
            ControlError: `not_permitted`.
        """
        if not self.operator:
            raise ControlError(
                Reason.NOT_PERMITTED,
                f"{self.name} may not {what}",
                hint=f"use sudo, or become a member of {OPERATORS}: usermod -aG {OPERATORS} USER",
            )


def of_user(uid: int) -> Asker:
    """The user with that number; his groups are those of the system's data bases now, not those of his session."""
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        return Asker(uid, f"user {uid}", uid == 0)
    return Asker(uid, account.pw_name, uid == 0 or group_id(OPERATORS) in _groups(account))


def of_peer(sock: socket.socket) -> Asker:
    """The user at the other end of a connected unix socket, as the kernel knows him."""
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return of_user(uid)


def group_id(name: str) -> int | None:
    """Number of the group, None where it does not exist."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def _groups(account: pwd.struct_passwd) -> list[int]:
    return os.getgrouplist(account.pw_name, account.pw_gid)
