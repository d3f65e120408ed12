# SPDX-License-Identifier: Apache-2.0
"""Who is at which home, where several drivers have one pool: locks by id, in one file of the pool that all of them open.

An id's lock is that of one byte of the file, at a place that the id says (fcntl(2), F_OFD_SETLK), so that nothing has to be
made for a claim, or removed after it. The kernel and the server end it with the process, or with its machine.
"""

import hashlib
import os
import threading
import time
from contextlib import suppress
from typing import Final

from csi_driver.errors import Aborted
from csi_driver.linux import files

CLAIMS_FILE = "claims"
SURE_S: Final = 30.0
"""How long a claim is had for certain: servers forget the locks of a client that they have not heard of for a minute or more."""


class Claims:
    """Those of one process on one pool, which `root_fd` is the directory of (and stays the caller's)."""

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        self._held: dict[str, float] = {}
        """When each was made sure of."""
        self._fd = -1
        # What one thread gives back last must not be closed under another that claims.
        self._guard = threading.RLock()

    def close(self) -> None:
        """Give all of them back."""
        with self._guard:
            self._held.clear()
            self._rest()

    def take(self, home_id: str) -> bool:
        """Claim what is nobody's, ours neither; whether that worked."""
        with self._guard:
            return home_id not in self._held and self._lock(home_id)

    def hold(self, home_id: str) -> None:
        """Claim it, if it is not ours already.

        Raises:
            Aborted: another driver has it, perhaps since the server has forgotten us.
        """
        with self._guard:
            since = self._held.get(home_id)
            if since is not None and _now() - since < SURE_S:
                return
            # What is ours yet can be locked once more.
            if not self._lock(home_id):
                # What this machine still takes for ours must not keep its other drivers off.
                with suppress(OSError):
                    self.give_back(home_id)
                raise Aborted(f"{home_id!r}: another driver that has this pool is making it: repeat")

    def give_back(self, home_id: str) -> None:
        """Let others have it; nothing if it is not ours."""
        with self._guard:
            if home_id not in self._held:
                return
            del self._held[home_id]
            try:
                if self._held:
                    files.unlock_byte(self._fd, _place(home_id))
            finally:
                self._rest()

    def _lock(self, home_id: str) -> bool:
        if self._fd < 0:
            self._fd = files.open_beneath(self._root_fd, CLAIMS_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            locked = files.lock_byte(self._fd, _place(home_id))
            if locked:
                self._held[home_id] = _now()
        finally:
            self._rest()
        return locked

    def _rest(self) -> None:
        # A file that is open for writing keeps its filesystem from being remounted read-only, and what a server knows of it
        # may be lost while nobody asks.
        if not self._held and self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _now() -> float:
    # A machine's sleep counts: its server is awake.
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _place(home_id: str) -> int:
    # Offsets are signed; that two ids meet at one of so many is less likely than that the disk errs.
    return int.from_bytes(hashlib.sha256(home_id.encode()).digest()[:8]) >> 2
