# SPDX-License-Identifier: Apache-2.0
"""Which bytes of a file are data, and which differ between two copies of it, from their extent maps.

The cost follows the number of extents, not the size: bytes that both have at one place of the disk are the same.
Where the map tells nothing (compressed or inline extents, copies that share nothing), both are read. The files must
not be written to meanwhile.
"""

import os
from collections.abc import Iterator
from typing import Final, NamedTuple

from csi_driver.linux import fiemap

BLOCK: Final = 64 << 10
"""Bytes compared at once where content must be read."""

_UNTOLD: Final = fiemap.UNKNOWN | fiemap.DELALLOC | fiemap.ENCODED | fiemap.NOT_ALIGNED
_ZERO: Final = -1
_HIDDEN: Final = -2

Range = tuple[int, int]
"""Start and end, in bytes."""


class _Piece(NamedTuple):
    """Bytes from one source: `place` is where on the disk they begin, or _ZERO, or _HIDDEN where that is not told."""

    start: int
    end: int
    place: int


def allocated(fd: int, start: int = 0) -> Iterator[Range]:
    """The ranges that may hold anything but zeros, from `start` on, in order, as long as they can be."""
    size = os.fstat(fd).st_size
    return _joined(
        (piece.start, piece.end) for piece in _pieces(fd, start, size, size) if piece.place != _ZERO
    )


def changed(base_fd: int, target_fd: int, start: int = 0, *, share: bool = True) -> Iterator[Range]:
    """The ranges of the target that differ from the base (beyond whose end is nothing but zeros).

    Where the two `share` no blocks, as copies on a filesystem that cannot, they are compared by what they hold.
    """
    size = os.fstat(target_fd).st_size
    return _joined(_differing(base_fd, target_fd, start, size, share=share))


def _differing(base_fd: int, target_fd: int, start: int, size: int, *, share: bool) -> Iterator[Range]:
    olds = _pieces(base_fd, start, min(size, os.fstat(base_fd).st_size), size)
    news = _pieces(target_fd, start, size, size)
    old, new = next(olds, None), next(news, None)
    position = start
    while old is not None and new is not None:
        end = min(old.end, new.end)
        if not _same(old, new, position):
            if share and _HIDDEN not in (old.place, new.place):
                yield position, end
            else:
                yield from _compared(base_fd, target_fd, position, end)
        position = end
        if old.end == end:
            old = next(olds, None)
        if new.end == end:
            new = next(news, None)


def _same(old: _Piece, new: _Piece, position: int) -> bool:
    if old.place < 0 or new.place < 0:
        return old.place == new.place == _ZERO
    return old.place + position - old.start == new.place + position - new.start


def _compared(base_fd: int, target_fd: int, start: int, end: int) -> Iterator[Range]:
    while start < end:
        step = min(BLOCK - start % BLOCK, end - start)
        old, new = os.pread(base_fd, step, start), os.pread(target_fd, step, start)
        # What lies beyond a file's end reads as zero in a larger copy.
        if old.ljust(step, b"\0") != new.ljust(step, b"\0"):
            yield start, start + step
        start += step


def _pieces(fd: int, start: int, size: int, whole: int) -> Iterator[_Piece]:
    """All bytes from `start` to `whole`, of which the file has `size`."""
    position = start
    for logical, physical, length, flags in fiemap.extents(fd, start, sync=True):
        begin, end = max(logical, position), min(logical + length, size)
        if begin >= end:
            continue
        if begin > position:
            yield _Piece(position, begin, _ZERO)
        if flags & fiemap.UNWRITTEN:
            place = _ZERO
        elif flags & _UNTOLD:
            place = _HIDDEN
        else:
            place = physical + begin - logical
        yield _Piece(begin, end, place)
        position = end
    if position < whole:
        yield _Piece(position, whole, _ZERO)


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
