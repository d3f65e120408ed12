# SPDX-License-Identifier: Apache-2.0
"""What can be done to a filesystem only while it is not mounted: grow ext4 without CAP_SYS_RESOURCE.

Whether it is mounted is the caller's to know; the tools refuse a mounted one themselves.
"""

import os
import struct
from pathlib import Path
from typing import Final

from csi_driver.linux.run import CommandFailed, run

_SUPERBLOCK: Final = 1024
_MAGIC_AT: Final = 0x38
_TAIL_BLOCKS: Final = 600
"""What mke2fs may leave unused at the end, where a last group would be too small for its own tables."""


def grow_ext4(device: Path, size_bytes: int, timeout_s: float = 600) -> bool:
    """Grow the ext4 filesystem on an unmounted device of `size_bytes` to fill it; whether there was anything to do.

    e2fsck(8) comes first, as resize2fs(8) demands. Raises run.CommandFailed: the filesystem is damaged, or in use.
    """
    if not has_room(device, size_bytes):
        return False
    try:
        run(["e2fsck", "-f", "-p", device], timeout_s=timeout_s)
    except CommandFailed as error:
        # 1: errors were corrected.
        if error.returncode != 1:
            raise
    run(["resize2fs", device], timeout_s=timeout_s)
    return True


def has_room(device: Path, size_bytes: int) -> bool:
    """Whether the ext4 filesystem, mounted or not, is smaller than its device of `size_bytes`."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        block = os.pread(fd, 1024, _SUPERBLOCK)
    finally:
        os.close(fd)
    if block[_MAGIC_AT : _MAGIC_AT + 2] != b"\x53\xef":
        return False
    low, log_size = struct.unpack_from("<I", block, 4)[0], struct.unpack_from("<I", block, 0x18)[0]
    count = low | struct.unpack_from("<I", block, 0x150)[0] << 32
    return bool(size_bytes // (1024 << log_size) - count > _TAIL_BLOCKS)
