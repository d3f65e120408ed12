# SPDX-License-Identifier: Apache-2.0
"""Bring what mkfs has made in a sparse file onto a device, so that mkfs itself never runs on it.

A program that is started lives on when its starter is killed, and would write to the device late; what this module
writes ends with this process. What may be overwritten is the caller's business.
"""

import errno
import os
from typing import Final

from csi_driver.linux import fiemap, files, holes, syscall

FALLOC_FL_ZERO_RANGE: Final = 0x10
_CHUNK: Final = 4 << 20
_MAP_MISSING: Final = frozenset((errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL))


def transplant(image_fd: int, target_fd: int, start: int) -> None:
    """Make the target hold all that the image does from `start` on, and zeros where it has unwritten blocks; synced.

    What is a hole in the image is left as it is in the target. Raises OSError.
    """
    files.sync(image_fd)
    for first, last, written in _ranges(image_fd):
        first = max(first, start)
        if first >= last:
            continue
        if written:
            _move(image_fd, target_fd, first, last)
        else:
            syscall.fallocate(target_fd, FALLOC_FL_ZERO_RANGE, first, last - first)
    files.sync(target_fd)


def _ranges(fd: int) -> list[tuple[int, int, bool]]:
    """(start, end, whether there is data). mkfs zeroes a log by making its blocks unwritten, which look like holes."""
    size = os.fstat(fd).st_size
    try:
        return [
            (one.logical, min(size, one.logical + one.length), not one.flags & fiemap.UNWRITTEN)
            for one in fiemap.extents(fd, sync=True)
        ]
    except OSError as error:
        if error.errno not in _MAP_MISSING:
            raise
        # Filesystems without such a map (tmpfs) have no unwritten blocks either.
        return [(start, end, True) for start, end in holes.data_ranges(fd, size)]


def _move(image_fd: int, target_fd: int, first: int, last: int) -> None:
    while first < last:
        data = os.pread(image_fd, min(_CHUNK, last - first), first)
        if not data:
            raise OSError(errno.EIO, "the image ends before its size", syscall.describe(image_fd))
        write_all(target_fd, data, first)
        first += len(data)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """pwrite(2), all of it."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written
