"""The one thread in which a live source is waited for, so that the process hears its readers and the daemon meanwhile.

It decides nothing. Invariants: one order at a time, so slot, source and outcome belong to either side alone and need no
lock; the eventfds that hand them over are the only waking up there is. A thread that dies takes the process with it.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

from agent.errors import SourceError

if TYPE_CHECKING:
    from agent.worker.sources import Frame, LiveSource

_CRASHED = 70  # EX_SOFTWARE


class Waiter:
    """Waits for frames of `source`.

    Attributes:
        busy: whether an order is being carried out; `fileno` becomes readable when it is done.
        t_ns: time of the frame that came; None when the source has ended for good.
        error: why the last order failed, or None.
    """

    def __init__(self, source: LiveSource) -> None:
        self.busy = False
        self.t_ns: int | None = None
        self.error: SourceError | None = None
        self._source = source
        self._slot: Frame | None = None
        self._reopen = False
        self._order = os.eventfd(0, os.EFD_CLOEXEC)
        self._done = os.eventfd(0, os.EFD_CLOEXEC)
        threading.excepthook = _die
        threading.Thread(target=self._serve, name="source", daemon=True).start()

    def fileno(self) -> int:
        """Descriptor, for a selector."""
        return self._done

    def wait(self, slot: Frame | None) -> None:
        """Order a frame into `slot`, or one that is thrown away."""
        self._slot, self._reopen, self.busy = slot, False, True
        os.eventfd_write(self._order, 1)

    def reopen(self) -> None:
        """Order the source to be opened again."""
        self._reopen, self.busy = True, True
        os.eventfd_write(self._order, 1)

    def take(self) -> None:
        """The order is done: `t_ns` and `error` say how."""
        os.eventfd_read(self._done)
        self.busy = False

    def _serve(self) -> None:
        source = self._source
        while True:
            os.eventfd_read(self._order)
            self.error = None
            try:
                if self._reopen:
                    source.reopen()
                else:
                    self.t_ns = source.wait_into(self._slot)
            except SourceError as e:
                self.error = e
            os.eventfd_write(self._done, 1)


def _die(args: threading.ExceptHookArgs) -> None:
    """What nobody expected leaves a source that nobody can trust: say it and end; the daemon starts a new process."""
    sys.__excepthook__(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
    sys.stderr.flush()
    os._exit(_CRASHED)
