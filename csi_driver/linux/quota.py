# SPDX-License-Identifier: Apache-2.0
"""Project quotas of ext4 and XFS through quotactl: a directory's limit in bytes and inodes.

Both filesystems answer the XFS flavour of the calls (Q_X…), so there is one path for both. Which id belongs to which
volume is not its business. Note that ext4 lets CAP_SYS_RESOURCE (root) write past a hard limit; XFS does not.
"""

import ctypes
import errno
import os
from ctypes import c_char, c_int8, c_int16, c_int32, c_uint8, c_uint16, c_uint32, c_uint64
from dataclasses import dataclass
from typing import Final

from csi_driver.linux import syscall
from csi_driver.linux.files import filesystem_type
from csi_driver.linux.syscall import ioctl, request_code

PRJQUOTA: Final = 2
FS_DQUOT_VERSION: Final = 1
FS_PROJ_QUOTA: Final = 2
FS_DQ_ISOFT: Final = 1
FS_DQ_IHARD: Final = 2
FS_DQ_BSOFT: Final = 4
FS_DQ_BHARD: Final = 8
FS_QSTATV_VERSION1: Final = 1
FS_QUOTA_PDQ_ACCT: Final = 1 << 4
FS_QUOTA_PDQ_ENFD: Final = 1 << 5
FS_XFLAG_PROJINHERIT: Final = 0x200
_BASIC_BLOCK: Final = 512


class FsDiskQuota(ctypes.Structure):
    """struct fs_disk_quota."""

    _fields_ = [
        ("d_version", c_int8),
        ("d_flags", c_int8),
        ("d_fieldmask", c_uint16),
        ("d_id", c_uint32),
        ("d_blk_hardlimit", c_uint64),
        ("d_blk_softlimit", c_uint64),
        ("d_ino_hardlimit", c_uint64),
        ("d_ino_softlimit", c_uint64),
        ("d_bcount", c_uint64),
        ("d_icount", c_uint64),
        ("d_itimer", c_int32),
        ("d_btimer", c_int32),
        ("d_iwarns", c_uint16),
        ("d_bwarns", c_uint16),
        ("d_itimer_hi", c_int8),
        ("d_btimer_hi", c_int8),
        ("d_rtbtimer_hi", c_int8),
        ("d_padding2", c_int8),
        ("d_rtb_hardlimit", c_uint64),
        ("d_rtb_softlimit", c_uint64),
        ("d_rtbcount", c_uint64),
        ("d_rtbtimer", c_int32),
        ("d_rtbwarns", c_uint16),
        ("d_padding3", c_int16),
        ("d_padding4", c_char * 8),
    ]


class FsQfilestatv(ctypes.Structure):
    """struct fs_qfilestatv."""

    _fields_ = [
        ("qfs_ino", c_uint64),
        ("qfs_nblks", c_uint64),
        ("qfs_nextents", c_uint32),
        ("qfs_pad", c_uint32),
    ]


class FsQuotaStatv(ctypes.Structure):
    """struct fs_quota_statv."""

    _fields_ = [
        ("qs_version", c_int8),
        ("qs_pad1", c_uint8),
        ("qs_flags", c_uint16),
        ("qs_incoredqs", c_uint32),
        ("qs_uquota", FsQfilestatv),
        ("qs_gquota", FsQfilestatv),
        ("qs_pquota", FsQfilestatv),
        ("qs_btimelimit", c_int32),
        ("qs_itimelimit", c_int32),
        ("qs_rtbtimelimit", c_int32),
        ("qs_bwarnlimit", c_uint16),
        ("qs_iwarnlimit", c_uint16),
        ("qs_rtbwarnlimit", c_uint16),
        ("qs_pad3", c_uint16),
        ("qs_pad4", c_uint32),
        ("qs_pad2", c_uint64 * 7),
    ]


class Fsxattr(ctypes.Structure):
    """struct fsxattr."""

    _fields_ = [
        ("fsx_xflags", c_uint32),
        ("fsx_extsize", c_uint32),
        ("fsx_nextents", c_uint32),
        ("fsx_projid", c_uint32),
        ("fsx_cowextsize", c_uint32),
        ("fsx_pad", c_uint8 * 8),
    ]


def _xqm(number: int) -> int:
    # XQM_CMD(), then QCMD() with the project type.
    return ((ord("X") << 8) + number) << 8 | PRJQUOTA


Q_XGETQUOTA: Final = _xqm(3)
Q_XSETQLIM: Final = _xqm(4)
Q_XGETQSTATV: Final = _xqm(8)
Q_XGETNEXTQUOTA: Final = _xqm(9)
FS_IOC_FSGETXATTR: Final = request_code(2, ord("X"), 31, ctypes.sizeof(Fsxattr))
FS_IOC_FSSETXATTR: Final = request_code(1, ord("X"), 32, ctypes.sizeof(Fsxattr))


@dataclass(frozen=True, slots=True)
class ProjectUsage:
    """A project's limits and what it holds; a limit of 0 is none."""

    limit_bytes: int
    used_bytes: int
    limit_inodes: int
    used_inodes: int


def state(root_fd: int) -> str | None:
    """Why project quotas are not enforced on this filesystem, with the remedy; None if they are."""
    fs_type = filesystem_type(root_fd)
    if fs_type not in _REMEDY:
        return f"{fs_type} has no project quotas that this driver knows: use ext4 or xfs"
    status = FsQuotaStatv(qs_version=FS_QSTATV_VERSION1)
    try:
        _quotactl(root_fd, Q_XGETQSTATV, 0, status)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ESRCH, errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP):
            return f"project quotas are off: {_REMEDY[fs_type]}"
        raise
    if status.qs_flags & FS_QUOTA_PDQ_ENFD:
        return None
    if status.qs_flags & FS_QUOTA_PDQ_ACCT:
        return f"project quotas are counted but not enforced: {_REMEDY[fs_type]}"
    return f"project quotas are off: {_REMEDY[fs_type]}"


_REMEDY: Final = {
    "ext4": "unmount it, run `tune2fs -O project,quota -Q prjquota DEVICE`, mount it with -o prjquota"
    " (the kernel needs CONFIG_QUOTA and CONFIG_QFMT_V2)",
    "xfs": "mount it with -o prjquota (for the root filesystem: rootflags=prjquota; the kernel needs CONFIG_XFS_QUOTA)",
}


def set_project(dir_fd: int, project_id: int) -> None:
    """Give the directory to a project, and all that is made in it from now on. What is in it already stays as it is.

    Raises OSError: EOPNOTSUPP or ENOTTY the filesystem has no projects, EINVAL the feature is off.
    """
    attributes = _attributes(dir_fd)
    attributes.fsx_projid = project_id
    attributes.fsx_xflags |= FS_XFLAG_PROJINHERIT
    ioctl(dir_fd, FS_IOC_FSSETXATTR, attributes, "FS_IOC_FSSETXATTR")


def project(dir_fd: int) -> int:
    """The project id of the file or directory; 0: none."""
    return int(_attributes(dir_fd).fsx_projid)


def _attributes(fd: int) -> Fsxattr:
    attributes = Fsxattr()
    ioctl(fd, FS_IOC_FSGETXATTR, attributes, "FS_IOC_FSGETXATTR")
    return attributes


def set_limit(root_fd: int, project_id: int, size_bytes: int, inodes: int = 0) -> None:
    """Limit what the project may hold; 0 is no limit. Bytes are rounded down to 512 (ext4: to 1024)."""
    limit = FsDiskQuota(
        d_version=FS_DQUOT_VERSION,
        d_flags=FS_PROJ_QUOTA,
        d_fieldmask=FS_DQ_BHARD | FS_DQ_BSOFT | FS_DQ_IHARD | FS_DQ_ISOFT,
        d_id=project_id,
        d_blk_hardlimit=size_bytes // _BASIC_BLOCK,
        d_ino_hardlimit=inodes,
    )
    _quotactl(root_fd, Q_XSETQLIM, project_id, limit)


def get(root_fd: int, project_id: int) -> ProjectUsage:
    """Limits and usage of the project; all 0 if the filesystem has never heard of it."""
    found = FsDiskQuota()
    try:
        _quotactl(root_fd, Q_XGETQUOTA, project_id, found)
    except FileNotFoundError:
        return ProjectUsage(0, 0, 0, 0)
    return ProjectUsage(
        limit_bytes=int(found.d_blk_hardlimit) * _BASIC_BLOCK,
        used_bytes=int(found.d_bcount) * _BASIC_BLOCK,
        limit_inodes=int(found.d_ino_hardlimit),
        used_inodes=int(found.d_icount),
    )


def next_id(root_fd: int, after: int) -> int | None:
    """The smallest project id above `after` that has a limit or holds anything; None if there is none.

    Raises OSError: ESRCH or ENOSYS quotas are off.
    """
    found = FsDiskQuota()
    try:
        _quotactl(root_fd, Q_XGETNEXTQUOTA, after + 1, found)
    except FileNotFoundError:
        return None
    return int(found.d_id)


def _quotactl(root_fd: int, command: int, project_id: int, argument: ctypes.Structure) -> None:
    address = ctypes.byref(argument)
    if syscall.quotactl_fd(root_fd, command, project_id, address) == 0:
        return
    # quotactl_fd came with kernel 5.14; before that the device must be named.
    if ctypes.get_errno() == errno.ENOSYS:
        device = os.fsencode(device_path(os.fstat(root_fd).st_dev))
        if syscall.quotactl(command, device, project_id, address) == 0:
            return
    raise syscall.failure("quotactl", syscall.describe(root_fd))


def device_path(device: int) -> str:
    """The node of a block device by its number, as devtmpfs names it. FileNotFoundError if there is none."""
    entry = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/uevent"
    with open(entry) as file:
        for line in file:
            key, _, value = line.rstrip("\n").partition("=")
            if key == "DEVNAME":
                return f"/dev/{value}"
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), entry)
