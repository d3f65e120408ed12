# SPDX-License-Identifier: Apache-2.0
"""What of a file is data: all that may be anything but zeros, and as little else as the filesystem tells.

Copying it is in `copy`; comparing two files by their extents in `changes`.
"""

import errno
import os
from collections.abc import Iterator
from typing import Final

from csi_driver.linux import fiemap, syscall

Range = tuple[int, int]
"""Start and end, in bytes."""

_NO_MAP: Final = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL)


def data_ranges(fd: int, size: int) -> Iterator[Range]:
    """The ranges with data below `size`, in order; all of it where the filesystem does not tell.

    Whatever was written before the call is in them. What is written meanwhile may be or not.
    """
    yield from _without(_outside_holes(fd, size), _unwritten(fd))


def data_bytes(fd: int) -> int:
    """How much of the file is data."""
    return sum(end - start for start, end in data_ranges(fd, os.fstat(fd).st_size))


def _outside_holes(fd: int, size: int) -> Iterator[Range]:
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno != errno.EINVAL:
                raise syscall.failure("lseek SEEK_DATA", syscall.describe(fd), error.errno) from None
            yield end, size
            return
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < end:
            yield start, end


def _unwritten(fd: int) -> Iterator[Range]:
    """Blocks that were allocated and never written, so that they read as zeros.

    SEEK_DATA calls them data while their pages are cached, clean ones that somebody has read as well as dirty ones. The
    map alone would call dirty ones unwritten, for a block is marked as written when its page is: so the file is
    written out before the map is believed (the kernel ends a page's writeback after its block is marked, and a direct
    write likewise).
    """
    try:
        if not any(extent.flags & fiemap.UNWRITTEN for extent in fiemap.extents(fd)):
            return
        for extent in fiemap.extents(fd, sync=True):
            if extent.flags & fiemap.UNWRITTEN and not extent.flags & fiemap.DELALLOC:
                yield extent.logical, extent.logical + extent.length
    except OSError as error:
        if error.errno not in _NO_MAP:
            raise


def _without(ranges: Iterator[Range], gaps: Iterator[Range]) -> Iterator[Range]:
    """What of the ranges is in no gap; both come in order."""
    gap = next(gaps, None)
    for start, end in ranges:
        while gap is not None and gap[0] < end:
            if start < gap[0]:
                yield start, gap[0]
            start = max(start, min(gap[1], end))
            if gap[1] > end:
                break
            gap = next(gaps, None)
        if start < end:
            yield start, end
