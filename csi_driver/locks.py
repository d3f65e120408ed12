# SPDX-License-Identifier: Apache-2.0
"""Locks by key that refuse instead of waiting, so that a slow volume never holds up a worker thread."""

import threading
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from csi_driver.errors import Aborted


class Locks:
    """A set of keys that calls are working on in this process."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held: set[str] = set()
        self._shared: Counter[str] = Counter()

    @contextmanager
    def hold(self, *keys: str, shared: Collection[str] = ()) -> Iterator[None]:
        """Hold all of `keys` or none; those `shared` with others that only read. Not bound to a thread.

        Raises:
            Aborted: another call holds one of them (CSI: operation pending for the volume).
        """
        wanted, read = set(keys), set(shared) - set(keys)
        with self._guard:
            busy = (wanted | read) & self._held | {key for key in wanted if self._shared[key]}
            if busy:
                raise Aborted(
                    f"another call is working on {', '.join(sorted(busy))}: repeat when it has ended"
                )
            self._held |= wanted
            self._shared.update(read)
        try:
            yield
        finally:
            with self._guard:
                self._held -= wanted
                self._shared.subtract(read)
                self._shared += Counter()  # drop what nobody holds any more
