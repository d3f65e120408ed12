# SPDX-License-Identifier: Apache-2.0
"""Copy one file's content into another: shared where the filesystem can, else data by data, holes left holes.

How fast it may go and when it must stop, a `Transfer` says. Trees of files are in `treecopy`.
"""

import errno
import os
import threading
import time
from typing import Final

from csi_driver.linux import syscall
from csi_driver.linux.holes import data_ranges

_CHUNK: Final = 8 << 20
_SMALL: Final = 64 << 10


class Stopped(Exception):
    """A copy was told to stop, or was out of time, before its end."""


class Rate:
    """Bytes a second that several copies may move together; 0 is no limit."""

    def __init__(self, bytes_per_s: int = 0) -> None:
        self._bytes_per_s = bytes_per_s
        self._guard = threading.Lock()
        self._free_at = 0.0

    def take(self, size: int) -> float:
        """Book so many bytes; how long to wait until they may be moved, in seconds."""
        if not self._bytes_per_s:
            return 0.0
        with self._guard:
            now = time.monotonic()
            begin = max(now, self._free_at)
            self._free_at = begin + size / self._bytes_per_s
            return begin - now


class Transfer:
    """One copy under way: how far it is, and whether it may go on. Read by other threads."""

    def __init__(self, rate: Rate | None = None, deadline: float | None = None) -> None:
        self.done_bytes = 0
        self.total_bytes = 0
        """What there is to copy, as far as it is known; 0 if it is not."""
        self._rate = rate or Rate()
        self.deadline = deadline
        """On time.monotonic's clock; may be set later."""
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Have it end at the next step."""
        self._stopping.set()

    def check(self) -> None:
        """Raises Stopped: it may not go on."""
        if self._stopping.is_set():
            raise Stopped("the copy was called off")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise Stopped("the copy was out of time")

    def advance(self, size: int) -> None:
        """About to move so many bytes: waits for its turn, unless it has a deadline. Raises Stopped."""
        self.check()
        # Somebody is kept waiting by a copy that has a deadline: the shorter the better.
        wait = self._rate.take(size) if self.deadline is None else 0.0
        if wait > 0 and self._stopping.wait(wait):
            self.check()
        self.done_bytes += size


def copy_sparse(src_fd: int, dst_fd: int, transfer: Transfer, found: os.stat_result | None = None) -> None:
    """Make the empty destination read as the source; it shares nothing with it. Not synced.

    `found` is what fstat(2) says of the source, if the caller has asked. Blocks that the destination has allocated stay so.
    Raises Stopped; OSError: ENOSPC, EDQUOT, EIO, …
    """
    found = found or os.fstat(src_fd)
    size = found.st_size
    if size <= _SMALL and found.st_blocks * 512 >= size:
        # No hole: to ask for one costs more than to copy blocks that were never written.
        transfer.advance(size)
        _copy_small(src_fd, dst_fd, size)
        return
    if os.fstat(dst_fd).st_size < size:
        os.ftruncate(dst_fd, size)
    for start, end in data_ranges(src_fd, size):
        os.lseek(dst_fd, start, os.SEEK_SET)
        while start < end:
            step = min(end - start, _CHUNK)
            transfer.advance(step)
            moved = _move(src_fd, dst_fd, start, step)
            if not moved:
                return  # the source was cut meanwhile
            start += moved


def _copy_small(src_fd: int, dst_fd: int, size: int) -> None:
    data = os.pread(src_fd, size, 0)
    done = 0
    while done < len(data):
        done += os.pwrite(dst_fd, data[done:], done)


def _move(src_fd: int, dst_fd: int, offset: int, size: int) -> int:
    # Not copy_file_range: on a filesystem that can, it shares the blocks instead of copying them.
    try:
        return os.sendfile(dst_fd, src_fd, offset, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise syscall.failure("sendfile", syscall.describe(dst_fd), error.errno) from None
    data = os.pread(src_fd, size, offset)
    written = os.write(dst_fd, data)
    return written
