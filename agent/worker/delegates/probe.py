"""The first contact with a delegate, where its library, driver and firmware may raise anything at all."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from agent.errors import AgentError, ModelError, Reason


@contextmanager
def probing(name: str) -> Iterator[None]:
    """Whatever delegate `name` raises inside is an error of ours.

    Raises:
        ModelError: `delegate_busy` when something else has the device open; `delegate_broken` for all that the
            delegate did not foresee. Its own errors and a lack of memory pass as they are.
    """
    try:
        yield
    except (AgentError, MemoryError):
        raise
    except Exception as e:
        said = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)[:300]
        if (isinstance(e, OSError) and e.errno == errno.EBUSY) or "resource busy" in said.lower():
            raise ModelError(Reason.DELEGATE_BUSY, f"{name} is in use elsewhere: {said}") from e
        raise ModelError(Reason.DELEGATE_BROKEN, f"{name} does not start: {type(e).__name__}: {said}") from e
