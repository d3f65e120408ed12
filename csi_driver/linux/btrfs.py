# SPDX-License-Identifier: Apache-2.0
"""Btrfs subvolumes and their quotas by ioctl and sysfs; the btrfs binary is never run.

Which subvolume is a volume, and what its limit should be, is not its business.

Quotas come in two kinds. Full qgroups know what a subvolume refers to, shared or not, and pay for it at each
commit and snapshot. Simple quotas (kernel 6.7) charge an extent to the subvolume that wrote it, for ever: cheap, never
inconsistent, no rescan; but blocks shared by a snapshot stay charged to the subvolume that wrote them, also after that
is deleted, and a clone starts at 0.
"""

import concurrent.futures
import contextlib
import ctypes
import errno
import os
import threading
from concurrent.futures import Future
from ctypes import c_char, c_int64, c_uint8, c_uint16, c_uint32, c_uint64
from pathlib import Path
from typing import Final, Literal

from csi_driver.linux import syscall
from csi_driver.linux.syscall import ioctl, request_code

BTRFS_FIRST_FREE_OBJECTID: Final = 256
BTRFS_ROOT_TREE_OBJECTID: Final = 1
BTRFS_ROOT_BACKREF_KEY: Final = 144
BTRFS_SUPER_MAGIC: Final = 0x9123683E
BTRFS_SUBVOL_RDONLY: Final = 1 << 1
BTRFS_QUOTA_CTL_ENABLE: Final = 1
BTRFS_QUOTA_CTL_DISABLE: Final = 2
BTRFS_QUOTA_CTL_ENABLE_SIMPLE_QUOTA: Final = 4
BTRFS_QGROUP_LIMIT_MAX_RFER: Final = 1 << 0
_UNLIMITED: Final = (1 << 64) - 1
_LEVEL_SHIFT: Final = 48
_REQUEST_S: Final = 0.1
"""A commit that was asked for has begun by then, or the request was missed (or the disk is slow)."""
_PAUSE_S: Final = 2.0
"""While another commit goes on all requests are missed; then there is one within this."""
_MAGIC: Final = 0x94


class VolArgs(ctypes.Structure):
    """struct btrfs_ioctl_vol_args."""

    _fields_ = [("fd", c_int64), ("name", c_char * 4088)]


class VolArgsV2(ctypes.Structure):
    """struct btrfs_ioctl_vol_args_v2."""

    _fields_ = [
        ("fd", c_int64),
        ("transid", c_uint64),
        ("flags", c_uint64),
        ("unused", c_uint64 * 4),
        ("name", c_char * 4040),
    ]


class QgroupLimit(ctypes.Structure):
    """struct btrfs_ioctl_qgroup_limit_args, its struct btrfs_qgroup_limit inlined."""

    _fields_ = [
        ("qgroupid", c_uint64),
        ("flags", c_uint64),
        ("max_rfer", c_uint64),
        ("max_excl", c_uint64),
        ("rsv_rfer", c_uint64),
        ("rsv_excl", c_uint64),
    ]


class QgroupCreate(ctypes.Structure):
    """struct btrfs_ioctl_qgroup_create_args."""

    _fields_ = [("create", c_uint64), ("qgroupid", c_uint64)]


class QgroupAssign(ctypes.Structure):
    """struct btrfs_ioctl_qgroup_assign_args."""

    _fields_ = [("assign", c_uint64), ("src", c_uint64), ("dst", c_uint64)]


class QuotaCtl(ctypes.Structure):
    """struct btrfs_ioctl_quota_ctl_args."""

    _fields_ = [("cmd", c_uint64), ("status", c_uint64)]


class FsInfo(ctypes.Structure):
    """struct btrfs_ioctl_fs_info_args."""

    _fields_ = [
        ("max_id", c_uint64),
        ("num_devices", c_uint64),
        ("fsid", c_uint8 * 16),
        ("nodesize", c_uint32),
        ("sectorsize", c_uint32),
        ("clone_alignment", c_uint32),
        ("csum_type", c_uint16),
        ("csum_size", c_uint16),
        ("flags", c_uint64),
        ("generation", c_uint64),
        ("metadata_uuid", c_uint8 * 16),
        ("reserved", c_uint8 * 944),
    ]


class DevInfo(ctypes.Structure):
    """struct btrfs_ioctl_dev_info_args."""

    _fields_ = [
        ("devid", c_uint64),
        ("uuid", c_uint8 * 16),
        ("bytes_used", c_uint64),
        ("total_bytes", c_uint64),
        ("unused", c_uint64 * 379),
        ("path", c_char * 1024),
    ]


class InoLookup(ctypes.Structure):
    """struct btrfs_ioctl_ino_lookup_args."""

    _fields_ = [("treeid", c_uint64), ("objectid", c_uint64), ("name", c_char * 4080)]


class SearchArgs(ctypes.Structure):
    """struct btrfs_ioctl_search_args, its struct btrfs_ioctl_search_key inlined."""

    _fields_ = [
        ("tree_id", c_uint64),
        ("min_objectid", c_uint64),
        ("max_objectid", c_uint64),
        ("min_offset", c_uint64),
        ("max_offset", c_uint64),
        ("min_transid", c_uint64),
        ("max_transid", c_uint64),
        ("min_type", c_uint32),
        ("max_type", c_uint32),
        ("nr_items", c_uint32),
        ("unused", c_uint32),
        ("unused1", c_uint64 * 4),
        ("buf", c_char * 3992),
    ]


_W: Final = 1
_R: Final = 2
BTRFS_IOC_RESIZE: Final = request_code(_W, _MAGIC, 3, ctypes.sizeof(VolArgs))
BTRFS_IOC_SUBVOL_CREATE: Final = request_code(_W, _MAGIC, 14, ctypes.sizeof(VolArgs))
BTRFS_IOC_SNAP_DESTROY: Final = request_code(_W, _MAGIC, 15, ctypes.sizeof(VolArgs))
BTRFS_IOC_TREE_SEARCH: Final = request_code(_R | _W, _MAGIC, 17, ctypes.sizeof(SearchArgs))
BTRFS_IOC_INO_LOOKUP: Final = request_code(_R | _W, _MAGIC, 18, ctypes.sizeof(InoLookup))
BTRFS_IOC_WAIT_SYNC: Final = request_code(_W, _MAGIC, 22, 8)
BTRFS_IOC_SNAP_CREATE_V2: Final = request_code(_W, _MAGIC, 23, ctypes.sizeof(VolArgsV2))
BTRFS_IOC_START_SYNC: Final = request_code(_R, _MAGIC, 24, 8)
BTRFS_IOC_SUBVOL_GETFLAGS: Final = request_code(_R, _MAGIC, 25, 8)
BTRFS_IOC_SUBVOL_SETFLAGS: Final = request_code(_W, _MAGIC, 26, 8)
BTRFS_IOC_DEV_INFO: Final = request_code(_R | _W, _MAGIC, 30, ctypes.sizeof(DevInfo))
BTRFS_IOC_FS_INFO: Final = request_code(_R, _MAGIC, 31, ctypes.sizeof(FsInfo))
BTRFS_IOC_QUOTA_CTL: Final = request_code(_R | _W, _MAGIC, 40, ctypes.sizeof(QuotaCtl))
BTRFS_IOC_QGROUP_ASSIGN: Final = request_code(_W, _MAGIC, 41, ctypes.sizeof(QgroupAssign))
BTRFS_IOC_QGROUP_CREATE: Final = request_code(_W, _MAGIC, 42, ctypes.sizeof(QgroupCreate))
BTRFS_IOC_QGROUP_LIMIT: Final = request_code(_R, _MAGIC, 43, ctypes.sizeof(QgroupLimit))
BTRFS_IOC_QUOTA_RESCAN_WAIT: Final = request_code(0, _MAGIC, 46, 0)


def _name(name: str) -> bytes:
    encoded = os.fsencode(name)
    # The kernel's own checks are for '/' and "..", each with its own errno; a name too long would be cut here.
    if not encoded or len(encoded) > 255 or b"/" in encoded or encoded in (b".", b".."):
        raise OSError(errno.EINVAL, "not a single path component", name)
    return encoded


def create_subvolume(dir_fd: int, name: str) -> None:
    """Make an empty subvolume in the directory. EEXIST, ENOTTY if this is not btrfs."""
    ioctl(dir_fd, BTRFS_IOC_SUBVOL_CREATE, VolArgs(0, _name(name)), f"BTRFS_IOC_SUBVOL_CREATE {name}")


def snapshot(src_fd: int, dir_fd: int, name: str, readonly: bool = False) -> None:
    """Make `name` in the directory a snapshot of the subvolume `src_fd` (its root). Nested ones stay out of it."""
    args = VolArgsV2(src_fd, 0, BTRFS_SUBVOL_RDONLY if readonly else 0)
    args.name = _name(name)
    ioctl(dir_fd, BTRFS_IOC_SNAP_CREATE_V2, args, f"BTRFS_IOC_SNAP_CREATE_V2 {name}")


def delete_subvolume(dir_fd: int, name: str) -> None:
    """Delete the subvolume, read-only or not, in constant time; the space comes back in the background.

    Its qgroup stays (kernels from 6.11 remove it once the space is back): see `remove_qgroup`. Missing is fine.

    Raises OSError: ENOTEMPTY it holds nested subvolumes (`tree.remove_tree` takes them along), ENOTDIR or EINVAL
    not a subvolume, EBUSY swap file or mount in it, EPERM the default subvolume.
    """
    with contextlib.suppress(FileNotFoundError):
        ioctl(dir_fd, BTRFS_IOC_SNAP_DESTROY, VolArgs(0, _name(name)), f"BTRFS_IOC_SNAP_DESTROY {name}")


def delete_if_subvolume(dir_fd: int, name: str) -> bool:
    """Delete it if it is a subvolume without nested ones; False (and nothing done) if not."""
    found = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    if found.st_ino != BTRFS_FIRST_FREE_OBJECTID or syscall.statfs_type(dir_fd) != BTRFS_SUPER_MAGIC:
        return False
    try:
        delete_subvolume(dir_fd, name)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EINVAL, errno.ENOTDIR):
            return False
        raise
    return True


def is_subvolume(fd: int) -> bool:
    """Whether the directory is the root of a subvolume (the top level included)."""
    return os.fstat(fd).st_ino == BTRFS_FIRST_FREE_OBJECTID and syscall.statfs_type(fd) == BTRFS_SUPER_MAGIC


def subvolume_id(fd: int) -> int:
    """The id of the subvolume that the file or directory is in. ENOTTY if this is not btrfs."""
    args = InoLookup(0, BTRFS_FIRST_FREE_OBJECTID)
    ioctl(fd, BTRFS_IOC_INO_LOOKUP, args, "BTRFS_IOC_INO_LOOKUP")
    return int(args.treeid)


def subvolume_exists(root_fd: int, subvolume_id: int) -> bool:
    """Whether there is such a subvolume; a deleted one is not, though its space may still be on its way back.

    Asks for the name that it has in its parent, which goes with the deletion: BTRFS_IOC_INO_LOOKUP of a subvolume's own
    root succeeds for any number.
    """
    search = SearchArgs(
        tree_id=BTRFS_ROOT_TREE_OBJECTID,
        min_objectid=subvolume_id,
        max_objectid=subvolume_id,
        max_offset=_UNLIMITED,
        max_transid=_UNLIMITED,
        min_type=BTRFS_ROOT_BACKREF_KEY,
        max_type=BTRFS_ROOT_BACKREF_KEY,
        nr_items=1,
    )
    ioctl(root_fd, BTRFS_IOC_TREE_SEARCH, search, "BTRFS_IOC_TREE_SEARCH")
    return bool(search.nr_items)


def set_readonly(fd: int, readonly: bool) -> None:
    """Make the subvolume (its root) read-only or writable."""
    flags = c_uint64()
    ioctl(fd, BTRFS_IOC_SUBVOL_GETFLAGS, flags, "BTRFS_IOC_SUBVOL_GETFLAGS")
    wanted = flags.value | BTRFS_SUBVOL_RDONLY if readonly else flags.value & ~BTRFS_SUBVOL_RDONLY
    if wanted != flags.value:
        ioctl(fd, BTRFS_IOC_SUBVOL_SETFLAGS, c_uint64(wanted), "BTRFS_IOC_SUBVOL_SETFLAGS")


def _filesystem_info(fd: int) -> FsInfo:
    info = FsInfo()
    ioctl(fd, BTRFS_IOC_FS_INFO, info, "BTRFS_IOC_FS_INFO")
    return info


def filesystem_uuid(fd: int) -> bytes:
    """The 16 bytes that the superblock of the mounted filesystem has."""
    return bytes(_filesystem_info(fd).fsid)


def _sysfs(fd: int) -> Path:
    digits = bytes(_filesystem_info(fd).fsid).hex()
    uuid = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    return Path("/sys/fs/btrfs", uuid)


def quota_mode(root_fd: int) -> Literal["off", "qgroup", "simple"]:
    """Which quotas the filesystem keeps, from sysfs (kernel 5.9 for qgroups, 6.7 for simple ones)."""
    folder = _sysfs(root_fd) / "qgroups"
    try:
        if (folder / "enabled").read_text().strip() != "1":
            return "off"
    except OSError as error:
        if not syscall.is_gone(error):
            raise
        return "off"
    try:
        mode = (folder / "mode").read_text().strip()
    except FileNotFoundError:
        return "qgroup"  # The file came with simple quotas.
    return "simple" if mode == "squota" else "qgroup"


def enable_quota(root_fd: int, mode: Literal["qgroup", "simple"] = "simple") -> None:
    """Keep quotas of this kind; full qgroups are waited for until their first scan is done.

    Quotas that are already kept stay as they are. Simple quotas mark the filesystem so that kernels before 6.7
    refuse to mount it. Raises OSError: EINVAL or EOPNOTSUPP the kernel has no simple quotas.
    """
    if quota_mode(root_fd) != "off":
        return
    if mode == "simple":
        _quota_ctl(root_fd, BTRFS_QUOTA_CTL_ENABLE_SIMPLE_QUOTA)
    else:
        _quota_ctl(root_fd, BTRFS_QUOTA_CTL_ENABLE)
        wait_rescan(root_fd)


def _quota_ctl(root_fd: int, command: int) -> None:
    ioctl(root_fd, BTRFS_IOC_QUOTA_CTL, QuotaCtl(command, 0), "BTRFS_IOC_QUOTA_CTL")


def qgroup_id(level: int, number: int) -> int:
    """The id of qgroup `level`/`number`. Those of subvolumes have level 0, so their ids are the subvolumes' own."""
    return level << _LEVEL_SHIFT | number


def ensure_qgroup(root_fd: int, qgroup: int) -> None:
    """Make sure that the qgroup exists. ENOTCONN: quotas are off."""
    with contextlib.suppress(FileExistsError):
        ioctl(root_fd, BTRFS_IOC_QGROUP_CREATE, QgroupCreate(1, qgroup), "BTRFS_IOC_QGROUP_CREATE")


def ensure_member(root_fd: int, qgroup: int, parent: int) -> None:
    """Make sure that what `qgroup` holds counts for `parent`, of a higher level, too.

    With simple quotas, subvolumes made inside a subvolume become members of its parents by themselves; with full
    qgroups they do not.
    """
    with contextlib.suppress(FileExistsError):
        ioctl(root_fd, BTRFS_IOC_QGROUP_ASSIGN, QgroupAssign(1, qgroup, parent), "BTRFS_IOC_QGROUP_ASSIGN")


def set_limit(root_fd: int, qgroup: int, size_bytes: int) -> None:
    """Let the qgroup refer to at most `size_bytes` (full qgroups), or write as much (simple); 0: no limit.

    Metadata counts. A limit below what is used refuses further writes only; a write past it fails with EDQUOT. Not
    on disk before the next commit. Raises OSError: ENOTCONN quotas are off, ENOENT no such qgroup.
    """
    limit = QgroupLimit(qgroup, BTRFS_QGROUP_LIMIT_MAX_RFER, size_bytes or _UNLIMITED)
    ioctl(root_fd, BTRFS_IOC_QGROUP_LIMIT, limit, "BTRFS_IOC_QGROUP_LIMIT")


def usage(root_fd: int, qgroup: int) -> tuple[int, int, int | None]:
    """(referenced, exclusive, limit) in bytes, limit None if there is none; as of the last commit.

    Raises FileNotFoundError: quotas are off, or no such qgroup.
    """
    number = qgroup & (1 << _LEVEL_SHIFT) - 1
    folder = _sysfs(root_fd) / "qgroups" / f"{qgroup >> _LEVEL_SHIFT}_{number}"

    def read(name: str) -> int:
        return int((folder / name).read_text())

    limited = read("limit_flags") & BTRFS_QGROUP_LIMIT_MAX_RFER
    limit = read("max_referenced") if limited else _UNLIMITED
    return read("referenced"), read("exclusive"), None if limit in (0, _UNLIMITED) else limit


def qgroup_numbers(root_fd: int, level: int) -> list[int]:
    """The numbers of all qgroups of a level; none if quotas are off."""
    try:
        names = os.listdir(_sysfs(root_fd) / "qgroups")
    except FileNotFoundError:
        return []
    parts = [name.split("_") for name in names]
    return sorted(
        int(part[1]) for part in parts if len(part) == 2 and part[0] == str(level) and part[1].isdecimal()
    )


def is_inconsistent(root_fd: int) -> bool:
    """Whether full qgroups have lost count, and stay so until a rescan. Simple quotas never do."""
    try:
        return (_sysfs(root_fd) / "qgroups" / "inconsistent").read_text().strip() == "1"
    except OSError as error:
        if not syscall.is_gone(error):
            raise
        return False


def remove_qgroup(root_fd: int, qgroup: int) -> None:
    """Forget the qgroup of a deleted subvolume, or one without members. Missing is fine, quotas off too.

    Raises OSError: EBUSY while the subvolume, or with simple quotas space that it wrote, is still there (after a
    deletion that takes until after the next commit): repeat later.
    """
    try:
        ioctl(root_fd, BTRFS_IOC_QGROUP_CREATE, QgroupCreate(0, qgroup), "BTRFS_IOC_QGROUP_CREATE")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTCONN):
            raise


def commit(fd: int) -> None:
    """Have all metadata on disk: subvolumes, qgroups, limits. fsync(2) promises only files and directories."""
    ioctl(fd, BTRFS_IOC_WAIT_SYNC, c_uint64(start_commit(fd)), "BTRFS_IOC_WAIT_SYNC")


def start_commit(fd: int) -> int:
    """Begin a commit and do not wait. After it the kernel begins to give back the space of deleted subvolumes.

    The kernel's thread for it can miss a request, and who made it then sleeps until that thread's next round, up to half a
    minute, and cannot be killed (seen on Linux 6.18: the request's flag is cleared as another commit ends). One more
    request wakes it, so one is made whenever the others take long; on a slow disk that does no harm.
    """
    requests: list[Future[int]] = []
    patience_s = _REQUEST_S
    while True:
        requests.append(_request_commit(fd))
        # All of them: they have our fd, and no process ends while a thread of it sleeps like that.
        if not concurrent.futures.wait(requests, patience_s).not_done:
            return requests[0].result()
        patience_s = min(2 * patience_s, _PAUSE_S)


def _request_commit(fd: int) -> Future[int]:
    answer: Future[int] = Future()

    def request() -> None:
        transaction = c_uint64()
        try:
            ioctl(fd, BTRFS_IOC_START_SYNC, transaction, "BTRFS_IOC_START_SYNC")
        except Exception as error:  # noqa: BLE001 - told to who waits, and always told
            answer.set_exception(error)
        else:
            answer.set_result(transaction.value)

    try:
        threading.Thread(target=request, name="commit", daemon=True).start()
    except RuntimeError as error:
        answer.set_exception(OSError(errno.EAGAIN, f"BTRFS_IOC_START_SYNC: {error}", syscall.describe(fd)))
    return answer


def wait_rescan(root_fd: int) -> None:
    """Wait until a scan of full qgroups is done, if one runs."""
    ioctl(root_fd, BTRFS_IOC_QUOTA_RESCAN_WAIT, 0, "BTRFS_IOC_QUOTA_RESCAN_WAIT")


def device(fd: int) -> DevInfo:
    """The first device of a mounted filesystem: its id and size."""
    for devid in range(1, int(_filesystem_info(fd).max_id) + 1):
        info = DevInfo(devid)
        try:
            ioctl(fd, BTRFS_IOC_DEV_INFO, info, "BTRFS_IOC_DEV_INFO")
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            continue
        return info
    raise OSError(errno.ENODEV, "no device", syscall.describe(fd))


def resize(fd: int, device_id: int, size_bytes: int) -> None:
    """BTRFS_IOC_RESIZE of one device of the mounted filesystem."""
    ioctl(fd, BTRFS_IOC_RESIZE, VolArgs(0, b"%d:%d" % (device_id, size_bytes)), "BTRFS_IOC_RESIZE")
