# SPDX-License-Identifier: Apache-2.0
"""Which bytes of a file are data, and which differ between two copies of it, from their extent maps.

The cost follows the number of extents, not the size: bytes that both have at one place of the disk are the same.
Where the map tells nothing (compressed or inline extents, copies that share nothing), both are read. The files must
not be written to meanwhile.
"""

import os
from collections.abc import Iterator
from typing import Final

from csi_driver.linux import fiemap

BLOCK: Final = 64 << 10
"""Bytes compared at once where content must be read."""

_UNTOLD: Final = fiemap.UNKNOWN | fiemap.DELALLOC | fiemap.ENCODED | fiemap.NOT_ALIGNED
_ZERO: Final = -1
_HIDDEN: Final = -2

Range = tuple[int, int]
"""Start and end, in bytes."""


_Piece = tuple[int, int, int]
"""Start and end of bytes from one source, and where on the disk they begin, or _ZERO, or _HIDDEN where that is not told.

A bare tuple: an image that is written to at random has tens of thousands of them.
"""


def allocated(fd: int, start: int = 0) -> Iterator[Range]:
    """The ranges that may hold anything but zeros, from `start` on, in order, as long as they can be."""
    size = os.fstat(fd).st_size
    return _joined((begin, end) for begin, end, place in _pieces(fd, start, size, size) if place != _ZERO)


def changed(base_fd: int, target_fd: int, start: int = 0, *, share: bool = True) -> Iterator[Range]:
    """The ranges of the target that differ from the base (beyond whose end is nothing but zeros).

    Where the two `share` no blocks, as copies on a filesystem that cannot, they are compared by what they hold.
    """
    size = os.fstat(target_fd).st_size
    return _joined(_differing(base_fd, target_fd, start, size, share=share))


def _differing(base_fd: int, target_fd: int, start: int, size: int, *, share: bool) -> Iterator[Range]:
    olds = _pieces(base_fd, start, min(size, os.fstat(base_fd).st_size), size)
    news = _pieces(target_fd, start, size, size)
    # Both tell all bytes, up to the same end.
    ended = (size, size, _ZERO)
    (old_start, old_end, old), (new_start, new_end, new) = next(olds, ended), next(news, ended)
    position = start
    while position < size:
        end = min(old_end, new_end)
        if old < 0 or new < 0:
            same = old == new == _ZERO
        else:
            same = old - old_start == new - new_start
        if not same:
            if share and _HIDDEN not in (old, new):
                yield position, end
            else:
                yield from _compared(base_fd, target_fd, position, end)
        position = end
        if old_end == end:
            old_start, old_end, old = next(olds, ended)
        if new_end == end:
            new_start, new_end, new = next(news, ended)


def _compared(base_fd: int, target_fd: int, start: int, end: int) -> Iterator[Range]:
    while start < end:
        step = min(BLOCK - start % BLOCK, end - start)
        old, new = os.pread(base_fd, step, start), os.pread(target_fd, step, start)
        # What lies beyond a file's end reads as zero in a larger copy.
        if old.ljust(step, b"\0") != new.ljust(step, b"\0"):
            yield start, start + step
        start += step


def _pieces(fd: int, start: int, size: int, whole: int) -> Iterator[_Piece]:
    """All bytes from `start` to `whole`, of which the file has `size`. What is one piece on the disk is one here.

    (Not so in the map, where a piece ends wherever it is shared by others than before.)
    """
    position, waiting, place = start, start, _ZERO
    for batch in fiemap.batches(fd, start, sync=True):
        for logical, physical, length, flags in batch:
            begin = logical if logical > position else position
            end = logical + length
            if end > size:
                end = size
            if begin >= end:
                continue
            if flags & fiemap.UNWRITTEN:
                here = _ZERO
            elif flags & _UNTOLD:
                here = _HIDDEN
            else:
                here = physical + begin - logical
            if begin > position and place != _ZERO:
                # A hole, which begins where the piece before it has ended.
                yield waiting, position, place
                waiting, place = position, _ZERO
            goes_on = here == place if here < 0 or place < 0 else here - begin == place - waiting
            if not goes_on:
                if waiting < begin:
                    yield waiting, begin, place
                waiting, place = begin, here
            position = end
    if position < whole and place != _ZERO:
        if waiting < position:
            yield waiting, position, place
        waiting, place = position, _ZERO
    if waiting < whole:
        yield waiting, whole, place


def _joined(ranges: Iterator[Range]) -> Iterator[Range]:
    """The same bytes in as few ranges as can be."""
    last: Range | None = None
    for start, end in ranges:
        if last is not None and last[1] == start:
            last = (last[0], end)
            continue
        if last is not None:
            yield last
        last = (start, end)
    if last is not None:
        yield last
