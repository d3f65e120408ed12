# SPDX-License-Identifier: Apache-2.0
"""What can be done to a filesystem while it is mounted, by ioctl and sysfs: grow, freeze, count its errors.

No tool is run. How large it should be is not its business.
"""

import ctypes
import errno
import os
from ctypes import c_uint8, c_uint32, c_uint64
from pathlib import Path
from typing import Final
from uuid import UUID

from csi_driver.linux import btrfs, syscall
from csi_driver.linux.quota import device_path
from csi_driver.linux.syscall import ioctl, request_code


class XfsGeometry(ctypes.Structure):
    """struct xfs_fsop_geom_v1: the first version, which every kernel answers."""

    _fields_ = [
        ("blocksize", c_uint32),
        ("rtextsize", c_uint32),
        ("agblocks", c_uint32),
        ("agcount", c_uint32),
        ("logblocks", c_uint32),
        ("sectsize", c_uint32),
        ("inodesize", c_uint32),
        ("imaxpct", c_uint32),
        ("datablocks", c_uint64),
        ("rtblocks", c_uint64),
        ("rtextents", c_uint64),
        ("logstart", c_uint64),
        ("uuid", c_uint8 * 16),
        ("sunit", c_uint32),
        ("swidth", c_uint32),
        ("version", c_uint32),
        ("flags", c_uint32),
        ("logsectsize", c_uint32),
        ("rtsectsize", c_uint32),
        ("dirblocksize", c_uint32),
    ]


class XfsGrowData(ctypes.Structure):
    """struct xfs_growfs_data."""

    _fields_ = [("newblocks", c_uint64), ("imaxpct", c_uint32)]


EXT4_IOC_RESIZE_FS: Final = request_code(1, ord("f"), 16, 8)
XFS_IOC_FSGEOMETRY_V1: Final = request_code(2, ord("X"), 100, ctypes.sizeof(XfsGeometry))
XFS_IOC_FSGROWFSDATA: Final = request_code(1, ord("X"), 110, ctypes.sizeof(XfsGrowData))
FIFREEZE: Final = request_code(3, ord("X"), 119, 4)
FITHAW: Final = request_code(3, ord("X"), 120, 4)
BLKGETSIZE64: Final = 0x80081272

_BTRFS_SECTOR: Final = 4096


def device_size(fd: int) -> int:
    """Bytes of a block device (BLKGETSIZE64)."""
    size = c_uint64()
    ioctl(fd, BLKGETSIZE64, size, "BLKGETSIZE64")
    return size.value


def grow(fs_type: str, mountpoint_fd: int, size_bytes: int) -> int:
    """Grow the mounted filesystem to `size_bytes` (rounded down to what it can hold); return its bytes then.

    Never shrinks: one that is already that large is left alone. The device must be that large already.

    Raises OSError: EINVAL or EFBIG or ENOSPC beyond the device, EROFS, EBUSY another resize runs; ValueError: unknown `fs_type`.
    """
    match fs_type:
        case "ext4" | "ext3":
            return _grow_ext4(mountpoint_fd, size_bytes)
        case "xfs":
            return _grow_xfs(mountpoint_fd, size_bytes)
        case "btrfs":
            return _grow_btrfs(mountpoint_fd, size_bytes)
    raise ValueError(f"filesystem {fs_type!r} cannot be grown here")


def _grow_ext4(fd: int, size_bytes: int) -> int:
    block, count = _ext4_blocks(fd)
    wanted = size_bytes // block
    if wanted > count:
        try:
            ioctl(fd, EXT4_IOC_RESIZE_FS, c_uint64(wanted), "EXT4_IOC_RESIZE_FS")
        except PermissionError as error:
            # The kernel's other reasons (a backup superblock in use, errors recorded) are in its log.
            why = "ext4 grows only with CAP_SYS_RESOURCE, and not after errors: see the kernel's log"
            raise OSError(error.errno, f"{error.strerror} ({why})", error.filename) from None
        block, count = _ext4_blocks(fd)
    return block * count


def _ext4_blocks(fd: int) -> tuple[int, int]:
    """(block size, blocks), from the superblock: statfs leaves the overhead out and no ioctl tells.

    The device's page cache is where the mounted filesystem keeps it, so this is what it is now.
    """
    path = device_path(os.fstat(fd).st_dev)
    device_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        block = os.pread(device_fd, 1024, 1024)
    finally:
        os.close(device_fd)
    if len(block) < 1024 or block[0x38:0x3A] != b"\x53\xef":
        raise OSError(errno.EIO, "no ext4 superblock", path)
    low, high = (int.from_bytes(block[at : at + 4], "little") for at in (0x4, 0x150))
    return 1024 << int.from_bytes(block[0x18:0x1C], "little"), high << 32 | low


def _grow_xfs(fd: int, size_bytes: int) -> int:
    geometry = _xfs_geometry(fd)
    wanted = size_bytes // geometry.blocksize
    if wanted > geometry.datablocks:
        ioctl(fd, XFS_IOC_FSGROWFSDATA, XfsGrowData(wanted, geometry.imaxpct), "XFS_IOC_FSGROWFSDATA")
        geometry = _xfs_geometry(fd)
    return int(geometry.blocksize * geometry.datablocks)


def _xfs_geometry(fd: int) -> XfsGeometry:
    geometry = XfsGeometry()
    ioctl(fd, XFS_IOC_FSGEOMETRY_V1, geometry, "XFS_IOC_FSGEOMETRY_V1")
    return geometry


def _grow_btrfs(fd: int, size_bytes: int) -> int:
    info = btrfs.device(fd)
    wanted = size_bytes // _BTRFS_SECTOR * _BTRFS_SECTOR
    if wanted > info.total_bytes:
        btrfs.resize(fd, info.devid, wanted)
        info = btrfs.device(fd)
    return int(info.total_bytes)


def mounted_uuid(fs_type: str, fd: int) -> UUID:
    """The uuid in the superblock of the mounted XFS or btrfs that the file or directory is in."""
    return UUID(bytes=bytes(_xfs_geometry(fd).uuid) if fs_type == "xfs" else btrfs.filesystem_uuid(fd))


def freeze(fd: int) -> None:
    """Write everything out and stop all writes until `thaw`. EBUSY: frozen already."""
    ioctl(fd, FIFREEZE, 0, "FIFREEZE")


def thaw(fd: int) -> None:
    """Let writes go on. EINVAL: not frozen."""
    ioctl(fd, FITHAW, 0, "FITHAW")


def error_count(fs_type: str, device: int) -> int:
    """Errors that the filesystem on this block device (st_rdev) has counted; 0 where the kernel counts none.

    ext4 keeps the count in its superblock, over reboots; btrfs per device; XFS counts nothing that sysfs tells.
    """
    disk = os.path.basename(os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))
    try:
        if fs_type == "ext4":
            return int(Path("/sys/fs/ext4", disk, "errors_count").read_text())
        if fs_type == "btrfs":
            return sum(
                _btrfs_errors(path.parent.parent) for path in Path("/sys/fs/btrfs").glob(f"*/devices/{disk}")
            )
    except OSError as error:
        if not syscall.is_gone(error):
            raise
    return 0  # Not mounted, or nothing is counted.


def _btrfs_errors(folder: Path) -> int:
    # "write_errs 0\nread_errs 0\n…", one file for each device (kernel 5.14).
    lines = [line for path in folder.glob("devinfo/*/error_stats") for line in path.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if len(line.split()) == 2)
