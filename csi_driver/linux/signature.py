# SPDX-License-Identifier: Apache-2.0
"""What is on a device or image, by the magic numbers where each format keeps them. Reads, never writes.

Only `is_blank` says that nothing is there. That no known signature is found does not.
"""

import errno
import os
import random
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from csi_driver.linux import syscall

_MIB: Final = 1 << 20
_HEAD_BYTES: Final = 1 << 30
_SAMPLES: Final = 1024
_SAMPLE_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class _Magic:
    name: str
    offset: int  # From the end, if negative.
    value: bytes


# Whole-disk formats that hide others come first, partition tables last: a boot sector's 55 AA is in many filesystems.
_MAGICS: Final = (
    _Magic("crypto_LUKS", 0, b"LUKS\xba\xbe"),
    _Magic("crypto_LUKS", 16384, b"SKUL\xba\xbe"),
    *(_Magic("LVM2_member", sector * 512, b"LABELONE") for sector in range(4)),
    _Magic("linux_raid_member", 0, b"\xfc\x4e\x2b\xa9"),
    _Magic("linux_raid_member", 4096, b"\xfc\x4e\x2b\xa9"),
    _Magic("bcache", 4096 + 24, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")),
    _Magic("bcachefs", 4096 + 24, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef")),
    _Magic("ceph_bluestore", 0, b"bluestore block device"),
    _Magic("xfs", 0, b"XFSB"),
    _Magic("btrfs", 65536 + 64, b"_BHRfS_M"),
    *(
        _Magic("swap", page - 10, mark)
        for page in (4096, 16384, 65536)
        for mark in (b"SWAPSPACE2", b"SWAP-SPACE")
    ),
    _Magic("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    _Magic("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    _Magic("squashfs", 0, b"hsqs"),
    _Magic("nilfs2", 1024 + 6, b"\x34\x34"),
    _Magic("jfs", 32768, b"JFS1"),
    _Magic("reiserfs", 65536 + 52, b"ReIsEr"),
    _Magic("reiserfs", 8192 + 52, b"ReIsEr"),
    _Magic("ocfs2", 8192, b"OCFSV2"),
    _Magic("gfs2", 65536, b"\x01\x16\x19\x70"),
    _Magic("iso9660", 32768 + 1, b"CD001"),
    _Magic("udf", 32768 + 1, b"BEA01"),
    _Magic("hfsplus", 1024, b"H+\x00\x04"),
    _Magic("apfs", 32, b"NXSB"),
    _Magic("cramfs", 0, b"\x45\x3d\xcd\x28"),
    _Magic("zfs_member", 128 * 1024, b"\x0c\xb1\xba\x00\x00\x00\x00\x00"),
    _Magic("vmfs", 1024 * 1024, b"\x0d\xd0\x01\xc0"),
    _Magic("drbd", -4096 + 60, b"\x83\x74\x02\x6b"),
    _Magic("linux_raid_member", -65536, b"\xfc\x4e\x2b\xa9"),
    _Magic("linux_raid_member", -8192, b"\xfc\x4e\x2b\xa9"),
    _Magic("ntfs", 3, b"NTFS    "),
    _Magic("exfat", 3, b"EXFAT   "),
    _Magic("vfat", 82, b"FAT32   "),
    _Magic("vfat", 54, b"FAT16   "),
    _Magic("vfat", 54, b"FAT12   "),
    _Magic("gpt", 512, b"EFI PART"),
    _Magic("gpt", 4096, b"EFI PART"),
    _Magic("gpt", -512, b"EFI PART"),
    _Magic("gpt", -4096, b"EFI PART"),
    _Magic("dos", 510, b"\x55\xaa"),
)

# struct ext4_super_block, at byte 1024.
_EXT_SUPERBLOCK: Final = 1024
_EXT_MAGIC: Final = 0xEF53
_COMPAT_HAS_JOURNAL: Final = 0x4
_INCOMPAT_JOURNAL_DEV: Final = 0x8
# What ext3's driver knows; anything beyond is ext4: filetype, recover, meta_bg; sparse_super, large_file, btree_dir.
_EXT3_INCOMPAT: Final = 0x2 | 0x4 | 0x10
_EXT3_RO_COMPAT: Final = 0x1 | 0x2 | 0x4


def detect(fd: int) -> str | None:
    """The name of the first known format found ("ext4", "xfs", "crypto_LUKS", "gpt", …), as blkid(8) has it; or None.

    Raises OSError: the device cannot be read. What cannot be read is never called empty.
    """
    size = _readable_size(fd)
    found = _detect_ext(fd)
    if found is not None:
        return found
    for magic in _MAGICS:
        offset = magic.offset if magic.offset >= 0 else size + magic.offset
        if offset >= 0 and _read(fd, offset, len(magic.value)) == magic.value:
            return magic.name
    return None


def _readable_size(fd: int) -> int:
    size = os.lseek(fd, 0, os.SEEK_END)
    if size and not (_read(fd, 0, 4096) and _read(fd, max(0, size - 4096), 4096)):
        raise OSError(errno.EIO, "the device cannot be read", syscall.describe(fd))
    return size


def _read(fd: int, offset: int, length: int) -> bytes:
    try:
        return os.pread(fd, length, offset)
    except OSError as error:
        raise syscall.failure("pread", syscall.describe(fd), error.errno) from None


def _detect_ext(fd: int) -> str | None:
    block = _read(fd, _EXT_SUPERBLOCK, 0x68)
    if len(block) < 0x68 or int.from_bytes(block[0x38:0x3A], "little") != _EXT_MAGIC:
        return None
    compat, incompat, ro_compat = (int.from_bytes(block[at : at + 4], "little") for at in (0x5C, 0x60, 0x64))
    if incompat & _INCOMPAT_JOURNAL_DEV:
        return "jbd"
    if incompat & ~_EXT3_INCOMPAT or ro_compat & ~_EXT3_RO_COMPAT:
        return "ext4"
    return "ext3" if compat & _COMPAT_HAS_JOURNAL else "ext2"


def is_blank(fd: int) -> bool:
    """Whether there is no known format, and the first and the last MiB are zero (or the file is empty).

    Raises OSError: the device cannot be read.
    """
    if detect(fd) is not None:
        return False
    size = os.lseek(fd, 0, os.SEEK_END)
    return all(is_zero(fd, offset, min(_MIB, size)) for offset in {0, max(0, size - _MIB)})


def is_zero(fd: int, offset: int, length: int) -> bool:
    """Whether these bytes are all zero.

    Raises OSError: they cannot be read, or end early.
    """
    while length > 0:
        part = _read(fd, offset, min(length, _MIB))
        if not part:
            raise OSError(errno.EIO, "ends before its size", syscall.describe(fd))
        if part.count(0) != len(part):
            return False
        offset += len(part)
        length -= len(part)
    return True


@dataclass(frozen=True, slots=True)
class Identity:
    """An XFS or a btrfs, by what its first superblock says."""

    fs_type: str
    uuid: UUID
    size_bytes: int
    """What it needs, or needed when that was last written out: it may have grown since."""


_XFS_SUPERBLOCK: Final = 0
_BTRFS_SUPERBLOCK: Final = 65536


def identify(fd: int) -> Identity | None:
    """Which XFS or btrfs is on the device; None if it is another format, or none. Also while it is mounted.

    Raises OSError: the device cannot be read.
    """
    match detect(fd):
        case "xfs":
            block = _read(fd, _XFS_SUPERBLOCK, 48)
            size = int.from_bytes(block[4:8], "big") * int.from_bytes(block[8:16], "big")
            return Identity("xfs", UUID(bytes=block[32:48]), size)
        case "btrfs":
            block = _read(fd, _BTRFS_SUPERBLOCK, 0x78)
            size = int.from_bytes(block[0x70:0x78], "little")
            return Identity("btrfs", UUID(bytes=block[32:48]), size)
    return None


def is_unused(fd: int) -> bool:
    """Whether a device is blank, as `is_blank` has it, and is zero in its beginning and in many places beyond it.

    All of a small device. Of a large one, which would take hours, so much that a filesystem is met wherever a partition
    usually begins, though nothing may be left of the partition table.
    """
    if not is_blank(fd):
        return False
    size = os.lseek(fd, 0, os.SEEK_END)
    if not is_zero(fd, 0, min(size, _HEAD_BYTES)):
        return False
    # Not at even distances, for filesystems leave the same places of their groups empty; always the same ones, so that
    # what was refused once is refused again.
    places = random.Random(0)
    step = max(0, size - _HEAD_BYTES) / _SAMPLES
    for number in range(_SAMPLES) if step else ():
        offset = _HEAD_BYTES + int((number + places.random()) * step) // 4096 * 4096
        if not is_zero(fd, offset, min(_SAMPLE_BYTES, size - offset)):
            return False
    return True
