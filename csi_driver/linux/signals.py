# SPDX-License-Identifier: Apache-2.0
"""Waiting for the signal that ends the process. What is to be done then is not this module's business."""

import os
import select
import signal
from types import FrameType


class Stopping:
    """Asked for by the first SIGTERM or SIGINT; the second ends the process at once. Made and waited for by the main thread.

    No `threading.Event`: a signal that arrives as the main thread is about to wait for one finds the lock taken that it wants
    to set it, by the very thread that it interrupts; and one that another thread receives wakes nobody. Signals write to a
    pipe instead (signal.set_wakeup_fd), whoever receives them.
    """

    def __init__(self) -> None:
        self._asked = False
        self._read, written = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def wait(self) -> None:
        """Return once it is asked for."""
        while not self._asked:
            select.select([self._read], [], [])

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._asked:
            os._exit(128 + number)
        self._asked = True
