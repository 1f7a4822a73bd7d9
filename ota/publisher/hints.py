"""Telling devices over the broker that there is something to look at. A hint decides nothing; devices verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ota.errors import OtaError, exit_code
from ota.publisher.certificates import OPERATOR_NAME
from ota.publisher.repository import Repository

# A person waits for the command, and devices look by themselves sooner or later.
_TIMEOUT_S = 6.0


@dataclass(frozen=True, slots=True)
class Hinted:
    """The lines that devices were told of. When the broker did not take it, `warnings` says why and `status` is the
    exit code of the reason: what was signed before stays signed."""

    lines: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    status: int = 0


def tell(repository: Repository, broker: tuple[str, int] | None, lines: Sequence[str] | None, spread_s: int) -> Hinted:
    """Tell all devices of the tenant about `lines`, as the identity `ota_operator`; None for no line in particular.

    Args:
        broker: host and port; None sends nothing.
        spread_s: devices wait a random part of it first.
    """
    if broker is None or lines == []:
        return Hinted()
    # paho is loaded by commands that talk to a broker alone
    from ota.brokertls import Tls
    from ota.publisher import announce

    paths = repository.authority.operator_tls
    tls = Tls(str(paths.ca), str(paths.certificate), str(paths.key))
    try:
        for line in (None,) if lines is None else lines:
            announce.send_hint(
                host=broker[0],
                port=broker[1],
                tls=tls,
                tenant=repository.tenant,
                client_id=OPERATOR_NAME,
                line=line,
                spread_s=spread_s,
                timeout_s=_TIMEOUT_S,
            )
    except OtaError as e:
        warning = f"no hint was sent: {e.message}" + (f"; {e.hint}" if e.hint else "")
        return Hinted(warnings=(warning,), status=exit_code(e.reason))
    what = " at " + ", ".join(lines) if lines else ""
    return Hinted(tuple(lines or ()), (f"devices were told to look{what} within {spread_s} s",))
