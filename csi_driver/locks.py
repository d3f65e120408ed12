# SPDX-License-Identifier: Apache-2.0
"""Locks by key that refuse instead of waiting, so that a slow volume never holds up a worker thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from csi_driver.errors import Aborted


class Locks:
    """A set of keys that calls are working on in this process."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held: set[str] = set()

    @contextmanager
    def hold(self, *keys: str) -> Iterator[None]:
        """Hold all of `keys` or none.

        Raises:
            Aborted: another call holds one of them (CSI: operation pending for the volume).
        """
        wanted = set(keys)
        with self._guard:
            busy = wanted & self._held
            if busy:
                raise Aborted(
                    f"another call is working on {', '.join(sorted(busy))}: repeat when it has ended"
                )
            self._held |= wanted
        try:
            yield
        finally:
            with self._guard:
                self._held -= wanted
