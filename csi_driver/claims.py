# SPDX-License-Identifier: Apache-2.0
"""Who is at which home, where several drivers have one pool: locks by id, in one file of the pool that all of them open.

An id's lock is that of one byte of the file, at a place that the id says (fcntl(2), F_OFD_SETLK), so that nothing has to be
made for a claim, or removed after it. The kernel and the server end it with the process, or with its machine. Not for several
threads.
"""

import hashlib
import os

from csi_driver.errors import Aborted
from csi_driver.linux import files

CLAIMS_FILE = "claims"


class Claims:
    """Those of one process on one pool, which `root_fd` is the directory of (and stays the caller's)."""

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        self._held: set[str] = set()
        self._fd = -1

    def close(self) -> None:
        """Give all of them back."""
        self._held.clear()
        self._rest()

    def take(self, home_id: str) -> bool:
        """Claim what is nobody's, ours neither; whether that worked."""
        if home_id in self._held:
            return False
        if self._fd < 0:
            self._fd = files.open_beneath(self._root_fd, CLAIMS_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            taken = files.lock_byte(self._fd, _place(home_id))
            if taken:
                self._held.add(home_id)
        finally:
            self._rest()
        return taken

    def hold(self, home_id: str) -> None:
        """Claim it, if it is not ours already.

        Raises:
            Aborted: another driver has it.
        """
        if home_id not in self._held and not self.take(home_id):
            raise Aborted(f"{home_id!r}: another driver that has this pool is making it: repeat")

    def give_back(self, home_id: str) -> None:
        """Let others have it; nothing if it is not ours."""
        if home_id not in self._held:
            return
        self._held.remove(home_id)
        try:
            if self._held:
                files.unlock_byte(self._fd, _place(home_id))
        finally:
            self._rest()

    def _rest(self) -> None:
        # A file that is open for writing keeps its filesystem from being remounted read-only, and what a server knows of it
        # may be lost while nobody asks.
        if not self._held and self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _place(home_id: str) -> int:
    # Offsets are signed; that two ids meet at one of so many is less likely than that the disk errs.
    return int.from_bytes(hashlib.sha256(home_id.encode()).digest()[:8]) >> 2
