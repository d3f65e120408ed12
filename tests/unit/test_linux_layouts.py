# SPDX-License-Identifier: Apache-2.0
"""Our structures and ioctl numbers against the kernel's own headers, by a C program compiled here."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from csi_driver.linux import btrfs, files, loop, mount, online, quota, syscall, tree
from tests.conftest import require_tool

HEADERS = """
#include <stddef.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <linux/stat.h>
#include <linux/fcntl.h>
#include <linux/openat2.h>
#include <linux/mount.h>
#include <linux/loop.h>
#include <linux/fs.h>
#include <linux/btrfs.h>
#include <linux/btrfs_tree.h>
#include <linux/quota.h>
#include <linux/dqblk_xfs.h>
"""

# Newer headers put new fields there.
FILLING = ("spare0", "spare3", "reserved", "unused", "unused1")

STRUCTURES: list[tuple[type[ctypes.Structure], str, dict[str, str]]] = [
    (syscall.Statx, "struct statx", {}),
    (syscall.Timestamp, "struct statx_timestamp", {}),
    (syscall.OpenHow, "struct open_how", {}),
    (syscall.MountAttr, "struct mount_attr", {}),
    (loop.LoopInfo64, "struct loop_info64", {}),
    (loop.LoopConfig, "struct loop_config", {}),
    (quota.FsDiskQuota, "struct fs_disk_quota", {}),
    (quota.FsQfilestatv, "struct fs_qfilestatv", {}),
    (quota.FsQuotaStatv, "struct fs_quota_statv", {}),
    (quota.Fsxattr, "struct fsxattr", {}),
    (btrfs.VolArgs, "struct btrfs_ioctl_vol_args", {}),
    (btrfs.VolArgsV2, "struct btrfs_ioctl_vol_args_v2", {}),
    (
        btrfs.QgroupLimit,
        "struct btrfs_ioctl_qgroup_limit_args",
        {name: f"lim.{name}" for name in ("flags", "max_rfer", "max_excl", "rsv_rfer", "rsv_excl")},
    ),
    (btrfs.QgroupCreate, "struct btrfs_ioctl_qgroup_create_args", {}),
    (btrfs.QuotaCtl, "struct btrfs_ioctl_quota_ctl_args", {}),
    (btrfs.FsInfo, "struct btrfs_ioctl_fs_info_args", {}),
    (btrfs.DevInfo, "struct btrfs_ioctl_dev_info_args", {}),
    (btrfs.QgroupAssign, "struct btrfs_ioctl_qgroup_assign_args", {}),
    (
        btrfs.SearchArgs,
        "struct btrfs_ioctl_search_args",
        {field[0]: f"key.{field[0]}" for field in btrfs.SearchArgs._fields_ if field[0] != "buf"},
    ),
    (btrfs.InoLookup, "struct btrfs_ioctl_ino_lookup_args", {}),
]

# XFS and ext4 keep these to themselves: no header of Debian's linux-libc-dev has them.
CONSTANTS = {
    "STATX_BASIC_STATS": syscall.STATX_BASIC_STATS,
    "STATX_MNT_ID": syscall.STATX_MNT_ID,
    "STATX_DIOALIGN": syscall.STATX_DIOALIGN,
    "STATX_ATTR_MOUNT_ROOT": syscall.STATX_ATTR_MOUNT_ROOT,
    "AT_EMPTY_PATH": syscall.AT_EMPTY_PATH,
    "AT_SYMLINK_NOFOLLOW": syscall.AT_SYMLINK_NOFOLLOW,
    "AT_NO_AUTOMOUNT": syscall.AT_NO_AUTOMOUNT,
    "AT_STATX_DONT_SYNC": syscall.AT_STATX_DONT_SYNC,
    "RESOLVE_NO_XDEV": syscall.RESOLVE_NO_XDEV,
    "RESOLVE_NO_MAGICLINKS": syscall.RESOLVE_NO_MAGICLINKS,
    "RESOLVE_NO_SYMLINKS": syscall.RESOLVE_NO_SYMLINKS,
    "RESOLVE_BENEATH": syscall.RESOLVE_BENEATH,
    "RENAME_NOREPLACE": syscall.RENAME_NOREPLACE,
    "OPEN_TREE_CLONE": mount.OPEN_TREE_CLONE,
    "MOVE_MOUNT_F_EMPTY_PATH": mount.MOVE_MOUNT_F_EMPTY_PATH,
    "MOVE_MOUNT_T_EMPTY_PATH": mount.MOVE_MOUNT_T_EMPTY_PATH,
    "FSCONFIG_SET_FLAG": mount.FSCONFIG_SET_FLAG,
    "FSCONFIG_SET_STRING": mount.FSCONFIG_SET_STRING,
    "FSCONFIG_CMD_CREATE": mount.FSCONFIG_CMD_CREATE,
    "MOUNT_ATTR__ATIME": mount.MOUNT_ATTR__ATIME,
    "MS_BIND": mount.MS_BIND,
    "MS_REMOUNT": mount.MS_REMOUNT,
    "LOOP_CONFIGURE": loop.LOOP_CONFIGURE,
    "LOOP_GET_STATUS64": loop.LOOP_GET_STATUS64,
    "LOOP_SET_STATUS64": loop.LOOP_SET_STATUS64,
    "LOOP_SET_CAPACITY": loop.LOOP_SET_CAPACITY,
    "LOOP_CLR_FD": loop.LOOP_CLR_FD,
    "LOOP_CTL_GET_FREE": loop.LOOP_CTL_GET_FREE,
    "LO_FLAGS_READ_ONLY": loop.LO_FLAGS_READ_ONLY,
    "LO_FLAGS_AUTOCLEAR": loop.LO_FLAGS_AUTOCLEAR,
    "LO_FLAGS_DIRECT_IO": loop.LO_FLAGS_DIRECT_IO,
    "BLKSSZGET": loop.BLKSSZGET,
    "BLKGETSIZE64": online.BLKGETSIZE64,
    "FICLONE": files.FICLONE,
    "FIFREEZE": online.FIFREEZE,
    "FITHAW": online.FITHAW,
    "FS_IOC_GETFLAGS": tree.FS_IOC_GETFLAGS,
    "FS_IOC_SETFLAGS": tree.FS_IOC_SETFLAGS,
    "FS_IMMUTABLE_FL": tree.FS_IMMUTABLE_FL,
    "FS_APPEND_FL": tree.FS_APPEND_FL,
    "FS_IOC_FSGETXATTR": quota.FS_IOC_FSGETXATTR,
    "FS_IOC_FSSETXATTR": quota.FS_IOC_FSSETXATTR,
    "FS_XFLAG_PROJINHERIT": quota.FS_XFLAG_PROJINHERIT,
    "QCMD(Q_XGETQUOTA, PRJQUOTA)": quota.Q_XGETQUOTA,
    "QCMD(Q_XSETQLIM, PRJQUOTA)": quota.Q_XSETQLIM,
    "QCMD(Q_XGETQSTATV, PRJQUOTA)": quota.Q_XGETQSTATV,
    "QCMD(Q_XGETNEXTQUOTA, PRJQUOTA)": quota.Q_XGETNEXTQUOTA,
    "FS_DQ_BHARD": quota.FS_DQ_BHARD,
    "FS_DQ_BSOFT": quota.FS_DQ_BSOFT,
    "FS_DQ_IHARD": quota.FS_DQ_IHARD,
    "FS_DQ_ISOFT": quota.FS_DQ_ISOFT,
    "FS_QUOTA_PDQ_ACCT": quota.FS_QUOTA_PDQ_ACCT,
    "FS_QUOTA_PDQ_ENFD": quota.FS_QUOTA_PDQ_ENFD,
    "FS_PROJ_QUOTA": quota.FS_PROJ_QUOTA,
    "BTRFS_IOC_RESIZE": btrfs.BTRFS_IOC_RESIZE,
    "BTRFS_IOC_SUBVOL_CREATE": btrfs.BTRFS_IOC_SUBVOL_CREATE,
    "BTRFS_IOC_SNAP_DESTROY": btrfs.BTRFS_IOC_SNAP_DESTROY,
    "BTRFS_IOC_TREE_SEARCH": btrfs.BTRFS_IOC_TREE_SEARCH,
    "BTRFS_IOC_QGROUP_ASSIGN": btrfs.BTRFS_IOC_QGROUP_ASSIGN,
    "BTRFS_IOC_START_SYNC": btrfs.BTRFS_IOC_START_SYNC,
    "BTRFS_IOC_WAIT_SYNC": btrfs.BTRFS_IOC_WAIT_SYNC,
    "BTRFS_ROOT_BACKREF_KEY": btrfs.BTRFS_ROOT_BACKREF_KEY,
    "BTRFS_ROOT_TREE_OBJECTID": btrfs.BTRFS_ROOT_TREE_OBJECTID,
    "BTRFS_FIRST_FREE_OBJECTID": btrfs.BTRFS_FIRST_FREE_OBJECTID,
    "BTRFS_IOC_INO_LOOKUP": btrfs.BTRFS_IOC_INO_LOOKUP,
    "BTRFS_IOC_SNAP_CREATE_V2": btrfs.BTRFS_IOC_SNAP_CREATE_V2,
    "BTRFS_IOC_SUBVOL_GETFLAGS": btrfs.BTRFS_IOC_SUBVOL_GETFLAGS,
    "BTRFS_IOC_SUBVOL_SETFLAGS": btrfs.BTRFS_IOC_SUBVOL_SETFLAGS,
    "BTRFS_IOC_DEV_INFO": btrfs.BTRFS_IOC_DEV_INFO,
    "BTRFS_IOC_FS_INFO": btrfs.BTRFS_IOC_FS_INFO,
    "BTRFS_IOC_QUOTA_CTL": btrfs.BTRFS_IOC_QUOTA_CTL,
    "BTRFS_IOC_QGROUP_CREATE": btrfs.BTRFS_IOC_QGROUP_CREATE,
    "BTRFS_IOC_QGROUP_LIMIT": btrfs.BTRFS_IOC_QGROUP_LIMIT,
    "BTRFS_IOC_QUOTA_RESCAN_WAIT": btrfs.BTRFS_IOC_QUOTA_RESCAN_WAIT,
    "BTRFS_SUBVOL_RDONLY": btrfs.BTRFS_SUBVOL_RDONLY,
    "BTRFS_QGROUP_LIMIT_MAX_RFER": btrfs.BTRFS_QGROUP_LIMIT_MAX_RFER,
}


def expressions() -> dict[str, int]:
    """C expression -> what we hold it to be."""
    ours = dict(CONSTANTS)
    for structure, name, renamed in STRUCTURES:
        ours[f"sizeof({name})"] = ctypes.sizeof(structure)
        for field in (entry[0] for entry in structure._fields_ if entry[0] not in FILLING):
            ours[f"offsetof({name}, {renamed.get(field, field)})"] = getattr(structure, field).offset
    return ours


def compiled(source: Path, wanted: list[str]) -> dict[str, int]:
    lines = [f'printf("%llu\\n", (unsigned long long)({expression}));' for expression in wanted]
    source.write_text(HEADERS + "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n")
    program = source.with_suffix("")
    subprocess.run(["gcc", "-w", "-o", program, source], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(wanted, map(int, printed), strict=True))


@pytest.mark.skipif(not Path("/usr/include/linux/btrfs.h").exists(), reason="linux-libc-dev is not installed")
def test_layouts_and_numbers_are_those_of_the_kernel(tmp_path: Path) -> None:
    require_tool("gcc")
    ours = expressions()

    theirs = compiled(tmp_path / "layout.c", list(ours))

    assert ours == theirs


def test_what_newer_or_private_headers_define_has_its_documented_size() -> None:
    # statmount(2), kernel 6.8; xfs_fs.h.
    assert ctypes.sizeof(mount.MountIdRequest) == 24
    offsets = {name: getattr(mount.Statmount, name).offset for name in ("mnt_id", "mnt_attr")}
    assert offsets == {"mnt_id": 40, "mnt_attr": 64}
    assert (ctypes.sizeof(online.XfsGeometry), ctypes.sizeof(online.XfsGrowData)) == (112, 16)
    assert online.XFS_IOC_FSGEOMETRY_V1 == 0x80705864
    assert online.XFS_IOC_FSGROWFSDATA == 0x4010586E
    assert online.EXT4_IOC_RESIZE_FS == 0x40086610
