# SPDX-License-Identifier: Apache-2.0
"""Where a file's bytes lie on its filesystem's disk: the extent map (FS_IOC_FIEMAP).

What follows from it (how much is shared, what differs between two copies) is the caller's business.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from csi_driver.linux.syscall import ioctl, request_code

FS_IOC_FIEMAP: Final = request_code(3, ord("f"), 11, 32)
FIEMAP_FLAG_SYNC: Final = 1
LAST: Final = 0x1
UNKNOWN: Final = 0x2
DELALLOC: Final = 0x4
ENCODED: Final = 0x8
NOT_ALIGNED: Final = 0x100
UNWRITTEN: Final = 0x800
SHARED: Final = 0x2000

_HEADER: Final = struct.Struct("=QQLLLL")
_EXTENT: Final = struct.Struct("=QQQ16xL12x")
_BATCH: Final = 1024


class Extent(NamedTuple):
    """A run of a file's bytes. `physical` means nothing where `flags` has UNKNOWN or DELALLOC."""

    logical: int
    physical: int
    length: int
    flags: int


def extents(fd: int, start: int = 0, *, sync: bool = False) -> Iterator[Extent]:
    """The extents from `start` on, in order; holes are left out. The first may begin before `start`.

    With `sync` the file is written out first. Raises OSError: EOPNOTSUPP the filesystem has no such map.
    """
    for batch in batches(fd, start, sync=sync):
        yield from map(Extent._make, batch)


def batches(fd: int, start: int = 0, *, sync: bool = False) -> Iterator[list[tuple[int, int, int, int]]]:
    """The same, many at a time and as bare tuples (logical, physical, length, flags)."""
    flags = FIEMAP_FLAG_SYNC if sync else 0
    while True:
        buffer = bytearray(_HEADER.size + _BATCH * _EXTENT.size)
        _HEADER.pack_into(buffer, 0, start, (1 << 63) - start, flags, 0, _BATCH, 0)
        ioctl(fd, FS_IOC_FIEMAP, buffer, "FS_IOC_FIEMAP")
        mapped = _HEADER.unpack_from(buffer)[3]
        if not mapped:
            return
        found = memoryview(buffer)[_HEADER.size : _HEADER.size + mapped * _EXTENT.size]
        batch = list(_EXTENT.iter_unpack(found))
        yield batch
        logical, _, length, last_flags = batch[-1]
        if last_flags & LAST:
            return
        start = logical + length
        flags = 0


def exclusive_bytes(fd: int) -> int:
    """Bytes on disk that no other file has a part in."""
    return sum(extent.length for extent in extents(fd) if not extent.flags & SHARED)
